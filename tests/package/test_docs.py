"""Promise: the documentation builds without a warning, and its API reference has every public name."""

from __future__ import annotations

import ast
import posixpath
import subprocess
import sys
from pathlib import Path

import pytest

from documents import ROOT

MODULES = ["longtail", "longtail.reference", "longtail.training", *(
    f"longtail.integrations.{name}" for name in ("lightning", "timm", "transformers", "trl")
)]  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(ROOT / "docs"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def public_names(module: str) -> set[str]:
    """What stands in the ``__all__`` of a module's source, without its own modules."""
    path = ROOT / "python" / Path(*module.split("."))
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    (found,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return {f"{module}.{name}" for name in found} - set(MODULES)


def test_every_public_name_is_in_the_reference(built: Path) -> None:
    from sphinx.util.inventory import InventoryFile

    with (built / "objects.inv").open("rb") as stream:
        inventory = InventoryFile.load(stream, "", posixpath.join)
    documented = {*inventory["py:function"], *inventory["py:class"]}
    names = set().union(*map(public_names, MODULES))
    assert len(names) > 45
    assert names - documented == set()


def test_signatures_are_those_of_the_functions(built: Path) -> None:
    page = (built / "api" / "losses.html").read_text(encoding="utf-8")
    assert "**options" not in page
    assert page.count('<span class="n"><span class="pre">complement_gamma</span></span>') > 3


def test_descriptions_read_as_sentences(built: Path) -> None:
    """One such as "C." reads as an enumeration."""
    pages = list((built / "api").glob("*.html"))
    assert len(pages) > 5
    assert [page.name for page in pages if "<ol" in page.read_text(encoding="utf-8")] == []
