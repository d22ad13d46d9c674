"""What torch.func's vmap, and jacrev by way of it, say of the losses: nothing batches them.

Forward mode (jvp, jacfwd, hessian) is left to torch's own error: torch.compile takes no Function that has a ``jvp``.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from . import ops


def refuse(_info: Any, _in_dims: Any, *_arguments: Any) -> NoReturn:
    raise RuntimeError(
        "longtail: the fused losses have no rule for vmap, which torch.func.jacrev uses too. Rows are the batch "
        "already: torch.func.grad and vjp of a sum give the gradient of every row in one call. "
        "longtail.reference.cross_entropy and longtail.reference.sigmoid_loss are plain PyTorch, which vmap takes"
    )


_library = torch.library.Library("longtail", "FRAGMENT")


def refuse_vmap() -> None:
    """Registers the refusal for every operator."""
    for name in (*ops.SCHEMAS, "linear_softmax_loss", "linear_softmax_loss_and_grad"):
        torch.library.register_vmap(f"longtail::{name}", refuse, lib=_library)
