"""Checkpoints of the CIFAR runs: written whole after every epoch, and taken only if they are of the same run."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..files import brief, check_writable, one_line, read_whole, write_whole
from .output import number_text
from .pickles import check_pickle

if TYPE_CHECKING:
    from .cifar import Plan, Run

ANYTHING = object()
"""What is set anew before each epoch, whatever a file holds."""


def checkpoint_path(plan: Plan, name: str, folder: Path) -> Path:
    factor = number_text(plan.imbalance_factor)
    return folder / f"experiment_cifar_{plan.dataset}_{factor}_{name}_{plan.epochs}_{plan.seed}.pt"


def save(run: Run, path: Path) -> None:
    """Writes the checkpoint; a run that is stopped meanwhile leaves the one before.

    Raises:
        OSError: it cannot be written.
    """
    content = io.BytesIO()  # torch's own writing to a file raises RuntimeError on a full disk
    torch.save(run.state(), content)
    write_whole(path, content.getvalue())


def load(run: Run, path: Path) -> None:
    """Resumes from a checkpoint if there is one.

    Raises:
        ValueError: the file is no checkpoint of this run, or none could be written there.
        OSError: it cannot be read.
    """
    if not path.exists():
        check_writable(path)
        return
    content = read_whole(path)
    try:
        run.resume(_unpacked(content))
    except Exception as error:  # torch.load raises almost anything on a damaged file
        reason = one_line(error, 500) or type(error).__name__
        raise ValueError(f"{str(path)!r} is no checkpoint of this run ({reason}): delete it to start anew") from error
    if not run.finished():
        check_writable(path)


def _unpacked(content: bytes) -> Any:
    """The state in a file.

    torch gets a new archive of the parts that were looked at: it checks no checksums, and where parts have one name,
    or something stands before the archive, it may read others than zipfile does.
    """
    looked_at = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(looked_at, "w") as copy:
        size = sum(part.file_size for part in archive.infolist())
        if size > len(content):  # compressed, or of parts that overlap
            raise ValueError(f"it unpacks to {size} bytes")
        for name in dict.fromkeys(archive.namelist()):
            part = archive.read(name)
            if name.lower().endswith("data.pkl"):  # torch finds names in any case
                check_pickle(part)
            copy.writestr(name, part)
    looked_at.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged files: several lines
        try:
            return torch.load(looked_at, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # a text on how to read it nevertheless, before what is wrong
            raise error.__context__ or error from None


def check_state(run: Run, saved: Any) -> None:
    """Compares what a file holds with what the run would write.

    Raises:
        ValueError: it is of another run, or of none.
    """
    own = run.state()
    if not isinstance(saved, dict) or not isinstance(saved.get("plan"), dict):
        raise ValueError("it has no plan")
    for key, value in own["plan"].items():
        found = saved["plan"].get(key)
        if type(found) is not type(value) or found != value:
            raise ValueError(f"it is of another run: {key} is {brief(found)}, expected {brief(value)}")
    _check_history(saved.get("history"), run.plan.epochs)
    for optimizer, state in zip(run.training.optimizers, own["optimizers"], strict=True):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state["state"] = {i: {"momentum_buffer": parameter} for i, parameter in enumerate(parameters)}
        for group in state["param_groups"]:
            group["lr"] = ANYTHING
    for key in ("model", "optimizers", "generator"):
        _check_alike(key, saved.get(key), own[key])


def _check_history(history: Any, epochs: int) -> None:
    names = ("train_loss", "test_error")
    if not isinstance(history, dict) or {*history} != {*names}:
        raise ValueError("it has no history")
    for name in names:
        values = history[name]
        if not isinstance(values, list) or any(type(value) is not float for value in values):
            raise ValueError(f"{name} is {brief(values)}, expected a list of numbers")
    lengths = [len(history[name]) for name in names]
    if lengths[0] != lengths[1] or not 1 <= lengths[0] <= epochs:
        raise ValueError(f"its history has {lengths[0]} and {lengths[1]} epochs, expected 1 to {epochs} of both")
    if not all(0 <= error <= 100 for error in history["test_error"]):
        raise ValueError("test_error is not between 0 and 100 in every epoch")


def _check_alike(where: str, saved: Any, own: Any) -> None:
    """The same keys, lengths and values, tensors of the same shape and dtype."""
    if own is ANYTHING:
        return
    if isinstance(own, Tensor):
        form = _form(own)
        if _form(saved) != form:
            raise ValueError(f"{where} is {_form(saved)}, expected {form}")
    elif isinstance(own, dict):
        if not isinstance(saved, dict) or saved.keys() != own.keys():
            raise ValueError(f"{where} has not the entries {brief(', '.join(map(str, own)))}")
        for key, value in own.items():
            _check_alike(f"{where}, {key}", saved[key], value)
    elif isinstance(own, list):
        if not isinstance(saved, list) or len(saved) != len(own):
            raise ValueError(f"{where} is {brief(saved)}, expected a list of {len(own)}")
        for i, value in enumerate(own):
            _check_alike(f"{where} {i}", saved[i], value)
    elif type(saved) is not type(own) or saved != own:
        raise ValueError(f"{where} is {brief(saved)}, expected {brief(own)}")


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return brief(value)
    dtype = str(value.dtype).removeprefix("torch.")
    dense = value.layout == torch.strided and value.device.type != "meta"
    return f"{dtype} {list(value.shape)}" if dense else f"a tensor of layout {value.layout} on {value.device}"
