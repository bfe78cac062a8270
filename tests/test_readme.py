"""The README's code runs as written."""

import pathlib
import re

import jax
import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"


@pytest.fixture
def user_settings():
    """What a user's program has, not what the other tests set."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        with jax.numpy_rank_promotion("allow"):
            yield


def test_the_readme_runs_as_written(user_settings, capsys):
    text = README.read_text()
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(code, scope)
    printed = capsys.readouterr().out.strip().splitlines()
    assert float(printed[-1].removeprefix("loss ")) < 0.3
    table = re.search(r"prints\n\n```\n(.*?)```", text, flags=re.DOTALL)
    assert table and _cells(printed[:-1]) == _cells(table[1].strip().splitlines())


def _cells(lines):
    return [line.split() for line in lines if not line.startswith("---")]
