"""Promise: imports inside the package go down only, without circles, and nothing inside stands on public functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import longtail

# From the ground up: folders, and single modules; those of one floor do not know each other.
FLOORS = [
    {"errors", "files", "signatures", "version"}, {"arguments"}, {"options"}, {"reference"}, {"ops"}, {"softmax"},
    {"sigmoid"}, {"two_way"}, {"linear"}, {"hierarchical"}, {"parallel"}, {"class_balance"}, {"functional"},
    {"modules"}, {"training"}, {"integrations"}, {"experiments"}, {"__init__", "__main__"},
]  # fmt: skip
ABOVE_FUNCTIONS = {"functional", "modules", "training", "integrations", "experiments", "__init__", "__main__"}
KERNELS = "triton_kernels"  # a folder of its own, outside of the package's
Imports = dict[str, set[str]]


def modules(folder: Path) -> dict[str, Path]:
    """Dotted name, without the package's own -> file; a folder by its own name."""
    found = {".".join(path.relative_to(folder).with_suffix("").parts): path for path in folder.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from executed(node)


def imported(name: str, path: Path, known: set[str], package: str) -> Iterator[str]:
    """Modules of the package that a module names in any import, those inside functions too."""
    above = name.split(".") if path.stem == "__init__" and name != "__init__" else name.split(".")[:-1]
    for node in executed(ast.parse(path.read_text(encoding="utf-8"))):
        places = []
        if isinstance(node, ast.Import):
            places = [x.name for x in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [package, *above[: len(above) + 1 - node.level]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            places = [f"{module}.{x.name}" for x in node.names]
        for place in places:
            root, *parts = place.split(".")
            if root == package and parts[:1] != [KERNELS]:
                candidates = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
                yield next((x for x in candidates if x in known), "__init__")


def imports(folder: Path) -> Imports:
    files = modules(folder)
    return {name: set(imported(name, path, set(files), folder.name)) - {name} for name, path in files.items()}


def room(module: str) -> str:
    return module.split(".")[0]


def faults(found: Imports) -> list[str]:
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    wrong = [f"{name} is on no floor" for name in found if room(name) not in floor]
    for name, others in found.items():
        for other in others:
            here, there = room(name), room(other)
            if here != there and floor.get(here, -1) <= floor.get(there, -1):
                wrong.append(f"{name} imports {other}, which is not below it")
            if there == "functional" and here not in ABOVE_FUNCTIONS:
                wrong.append(f"{name} imports public functions, {other}")
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        wrong.append(f"circle: {' -> '.join(error.args[1])}")
    return wrong


def test_imports_go_down_only() -> None:
    assert faults(imports(Path(longtail.__file__).parent)) == []


TREE = {
    "__init__.py": "from .functional.softmax import loss\n",
    "errors.py": "import os\n",
    "arguments.py": "from .errors import Problem\nfrom toy import errors\n",
    "softmax/__init__.py": "",
    "softmax/loss.py": "from ..arguments import checked\nfrom . import autograd\n",
    "softmax/autograd.py": "import toy.errors\nfrom toy.triton_kernels import launching\n",
    "functional/__init__.py": "from .softmax import loss\n",
    "functional/softmax.py": "from ..softmax.loss import rows\n\ndef late():\n    from ..arguments import checked\n",
}
PLANTED: dict[str, tuple[dict[str, str], str]] = {
    "none": ({}, ""),
    "upwards": ({"errors.py": "from .arguments import checked\n"}, "errors imports arguments, which is not below it"),
    "inside a function": (
        {"arguments.py": "def late():\n    import toy.softmax.loss\n"},
        "arguments imports softmax.loss, which is not below it",
    ),
    "the package itself": (
        {"softmax/autograd.py": "import toy\n"}, "softmax.autograd imports __init__, which is not below it"
    ),
    "types alone": ({"errors.py": "if TYPE_CHECKING:\n    from .arguments import checked\n"}, ""),
    "circle": ({"softmax/autograd.py": "from .loss import rows\n"}, "circle: softmax.loss -> softmax.autograd"),
    "public": (
        {"softmax/loss.py": "from ..functional import softmax\n"},
        "softmax.loss imports public functions, functional.softmax",
    ),
    "no floor": ({"cellar.py": ""}, "cellar is on no floor"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_faults_are_seen(fault: str, tmp_path: Path) -> None:
    changed, expected = PLANTED[fault]
    for name, text in {**TREE, **changed}.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = faults(imports(tmp_path / "toy"))
    assert (found == []) == (expected == ""), found
    assert any(expected in x for x in found) or not expected, found
