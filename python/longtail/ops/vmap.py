"""What torch.func's vmap, and jacrev by way of it, say of the losses: nothing batches them.

Forward mode (jvp, jacfwd, hessian) is left to torch's own error: torch.compile takes no Function that has a ``jvp``.
"""

from __future__ import annotations

from typing import Any, NoReturn


def refuse_vmap(_info: Any, _in_dims: Any, *_arguments: Any) -> NoReturn:
    raise RuntimeError(
        "longtail: the fused losses have no rule for vmap, which torch.func.jacrev uses too. Rows are the batch "
        "already: torch.func.grad and vjp of a sum give the gradient of every row in one call. "
        "The functions of longtail.reference are plain PyTorch, which vmap takes"
    )
