"""The existing library in the same environment is told apart."""

import warnings

import pytest

from kfac_jax._utils.installed import warn_of_the_other


def install(folder, *files):
    info = folder / "kfac_jax-0.0.8.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kfac-jax\nVersion: 0.0.8\n"
    )
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def test_the_existing_library_is_told(tmp_path):
    install(tmp_path, "kfac_jax/__init__.py", "kfac_jax/_src/optimizer.py")
    with pytest.warns(UserWarning, match=r"kfac-jax 0\.0\.8 is installed beside"):
        warn_of_the_other([str(tmp_path)])


@pytest.mark.parametrize("files", [None, ["kfac_jax/__init__.py", "kfac_jax/tags.py"]])
def test_others_are_not(tmp_path, files):
    """Such as this library under the name that it once had."""
    if files is not None:
        install(tmp_path, *files)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_the_other([str(tmp_path)])
