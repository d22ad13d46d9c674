"""What complement objective training asks of an optimizer: its parameters, their gradients, what its step needs."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer


def check_optimizer(optimizer: object) -> None:
    """An optimizer that steps by the gradients that lie there, without a closure."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"an optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    # Wrappers that derive from LBFGS make its closure optional, and have none to give.
    if isinstance(optimizer, LBFGS) or (closure is not None and closure.default is closure.empty):
        raise ValueError(
            f"an optimizer is a {type(optimizer).__name__}, whose step needs a closure, expected one that steps without"
        )


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def has_gradients(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for parameter in parameters_of(optimizer))


def depends_on(loss: Tensor, parameters: Collection[Tensor]) -> bool:
    """Whether the graph of ``loss``, even of one that a backward pass has used up, leads to one of the leaves."""
    wanted = {id(parameter) for parameter in parameters}
    nodes: list[Any] = [loss.grad_fn]
    seen = {None}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        nodes.extend(following for following, _ in node.next_functions)
    return False


def second_backward(loss: Tensor, model: nn.Module, optimizer: Optimizer) -> None:
    """Makes the gradients of an optimizer by a second backward pass through one forward of the model.

    DistributedDataParallel averages over its ranks in the first, and in no other: here that is done for it. It does
    not see this pass, after which it would take the parameters for used in its next forward. A parameter that no
    rank's loss depends on has no gradient, as in one process.
    """
    groups = {
        id(parameter): module.process_group
        for module in model.modules()
        if isinstance(module, DistributedDataParallel)
        for name, parameter in module.module.named_parameters()
        if name not in module.parameters_to_ignore
    }
    parameters = [parameter for parameter in parameters_of(optimizer) if parameter.requires_grad]
    if not (groups and parameters):
        loss.backward()
        return
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        parameter.grad = None if gradient is None else gradient.clone()  # two parameters may have got one tensor
    for group in dict.fromkeys(groups.values()):  # in the same order on all ranks
        _average([parameter for parameter in parameters if groups.get(id(parameter)) == group], group)


def _average(parameters: list[Tensor], group: Any) -> None:
    """Averages over the ranks the gradients that one of them has at least."""
    if not parameters:
        return
    found = [parameter.grad is not None for parameter in parameters]
    ranks = torch.tensor(found, dtype=torch.int32, device=parameters[0].device)
    torch.distributed.all_reduce(ranks, group=group)
    for parameter, known in zip(parameters, ranks.tolist(), strict=True):  # a GPU's host waits here, once a batch
        if known:
            mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            total = mine.contiguous()  # ranks add up memory, in whatever order each has it
            torch.distributed.all_reduce(total, group=group)
            parameter.grad = total / group.size()
