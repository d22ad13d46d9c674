"""Memory as torch's allocator hands it out on the CPU: the same on every machine.

The resident set also has the BLAS's workspaces (0.02 to 0.11 of the fused linear loss's logits, by processor and
threads), the pages that malloc keeps, and the threads' stacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.autograd.profiler import profile


def peak_while(function: Callable[[], Any]) -> tuple[int, Any]:
    """Most bytes held at once while ``function()`` runs, beyond those before; and what it returns."""
    with profile(profile_memory=True) as profiled:
        result = function()
    held = peak = 0
    events = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert events, "the profiler has seen allocations"
    return peak, result
