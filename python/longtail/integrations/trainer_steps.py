"""What a Trainer is doing while a model is called: in which ``compute_loss``, and whether it uses the model's loss.

Neither a ``compute_loss_func`` nor a model is told, so the calling frames are asked.
"""

from __future__ import annotations

import sys
import threading
import weakref
from types import FrameType
from typing import Any

import torch
from torch import nn


def trainer_at_work() -> Any:
    """The trainer, of transformers or built on it, in whose ``compute_loss`` this is called; None outside of one."""
    frame = _compute_loss_frame()
    return None if frame is None else frame.f_locals["self"]


def _compute_loss_frame() -> FrameType | None:
    """The frame of that ``compute_loss``: the outermost one, where a subclass calls that of its base."""
    found, frame = None, sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "compute_loss":
            caller = frame.f_locals.get("self")
            if hasattr(caller, "compute_loss_func") and (found is None or caller is found.f_locals["self"]):
                found = frame
        frame = frame.f_back  # type: ignore[assignment]
    return found


def label_smoothing_factor(trainer: Any) -> float:
    """That of a trainer's arguments; 0 without one."""
    return getattr(getattr(trainer, "args", None), "label_smoothing_factor", 0.0)


_progress = threading.local()  # DataParallel's replicas run in threads


def mark_used() -> None:
    """Said by our loss: the forward that is running uses it."""
    _progress.used = True


class _Step:
    """What the forwards of one call of a trainer's ``compute_loss`` did. Holds neither its frame nor its tensors."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = weakref.ref(trainer)
        self.used = False


_STEP = "_longtail_step"  # a local variable that the frame of compute_loss gets: lives as long, where an id is reused


def check_that_it_was_used(_model: nn.Module, _args: Any, kwargs: dict[str, Any], _outputs: Any) -> None:
    """A hook after the model's forward.

    A forward without labels is no proof: consistency losses make one beside that of the loss. It is one together with
    a step before in which no forward used the loss.

    Raises:
        ValueError: the trainer computes a loss that is not ours.
    """
    if torch.compiler.is_compiling():
        return
    used, _progress.used = getattr(_progress, "used", False), False
    frame = _compute_loss_frame()
    if frame is None:
        return
    trainer, step = frame.f_locals["self"], frame.f_locals.get(_STEP)
    certain = kwargs.get("labels") is not None or _has_another_loss(trainer)
    if step is None:
        before, step = getattr(_progress, "step", None), _Step(trainer)
        certain = certain or (before is not None and before.trainer() is trainer and not before.used)
        frame.f_locals[_STEP] = _progress.step = step
    step.used = step.used or used
    if certain and not step.used:
        _refuse(trainer)


def _has_another_loss(trainer: Any) -> bool:
    return any(getattr(trainer, name, None) is not None for name in ("label_smoother", "compute_loss_func"))


def _refuse(trainer: Any) -> None:
    factor = label_smoothing_factor(trainer)
    reason = f" (its label_smoothing_factor is {factor})" if factor else ""
    remedy = "pass compute_loss_func=ComputeLoss(loss, shift_labels=...) to it instead of set_loss_function"
    if factor:
        remedy += f", label_smoothing={factor} to the loss, and no label_smoothing_factor"
    elif any(base.__name__ == "SFTTrainer" for base in type(trainer).__mro__):
        remedy = "make it of longtail.integrations.trl.SFTLossMixin, with loss="
    raise ValueError(f"{type(trainer).__name__} computes a loss of its own{reason}, not that of the model: {remedy}")
