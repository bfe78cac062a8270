"""What pages of the documentation refer to exists, and none of it is forgotten."""

import pathlib
import re

import pytest

from kfac_jax import blocks
from tests import test_public_names as public

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
MODULES = set(public.MODULES) | {"initializers"}


def test_every_public_name_is_on_one_page_of_the_api():
    text = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    shown = re.findall(r"\.\. auto(?:class|function):: kfac_jax\.(\w+)$", text, re.M)
    other_names = re.findall(r"`(register_\w+)`", text)
    assert len(shown) == len(set(shown))
    assert {*shown, *other_names} == {*public.TOP.split()} - MODULES
    documented = re.findall(r"\.\. automodule:: kfac_jax\.(\w+)$", text, re.M)
    assert sorted(documented) == sorted(MODULES)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(DOCS).as_posix())
def test_tests_and_files_that_a_page_names_exist(page):
    for path, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text()):
        source = (ROOT / path).read_text()
        assert not test or f"def {test}(" in source, (path, test)
    # further tests of the file that was named last
    for match in re.finditer(r"`::(\w+)`", page.read_text()):
        path = re.findall(r"`(tests/[\w/]+\.py)", page.read_text()[: match.start()])[-1]
        assert f"def {match[1]}(" in (ROOT / path).read_text(), match[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(DOCS).as_posix())
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(
        r"\]\(([^)#\s]+\.(?:md|png|svg))(?:#[\w-]+)?\)", page.read_text()
    ):
        if "://" not in target:
            assert (page.parent / target).resolve().is_file(), target


def test_each_block_has_a_derivation():
    named = {path.stem.replace("_", "") for path in (DOCS / "derivations").glob("*.md")}
    kinds = {n.lower() for n in dir(blocks) if isinstance(getattr(blocks, n), type)}
    no_approximation = {"block", "blockshape", "damped", "spectrum", "identity"}
    assert kinds - no_approximation <= named
    assert {"blocktridiagonal", "samplespace"} <= named
