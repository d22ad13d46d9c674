"""The adapters are imported by name alone, and say what they need."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from importlib import metadata

import pytest


@pytest.mark.parametrize("name", ["transformers", "trl", "lightning"])
def test_a_missing_framework_is_named_with_what_its_extra_installs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("transformers", "lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"longtail.integrations.{name}", raising=False)
    listed = [line.split(";") for line in metadata.requires("longtail") or []]
    needed = [shlex.quote(package) for package, *marker in listed if f'extra == "{name}"' in "".join(marker)]
    assert needed
    with pytest.raises(ImportError, match=rf"{name}.* needs pip install {re.escape(' '.join(needed))}$"):
        importlib.import_module(f"longtail.integrations.{name}")


def test_lightning_under_its_other_name(monkeypatch: pytest.MonkeyPatch) -> None:
    other = pytest.importorskip("pytorch_lightning")
    for module in ("lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "longtail.integrations.lightning", raising=False)
    module = importlib.import_module("longtail.integrations.lightning")
    assert issubclass(module.DeferredReweightingCallback, other.Callback)
    del sys.modules["longtail.integrations.lightning"]
