"""The operators ``torch.ops.longtail.*``: schemas, fake kernels, and the choice of backend at each call.

Python owns the schemas. A shared library adds kernels under ``torch.ops.longtail_<backend>``, with the same schemas;
:mod:`longtail.ops.backends` knows which are there. The kernels registered here only pick one and pass the call on, so
that ``use_backend`` also holds inside compiled graphs. T is float64 for float64 logits, else float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..arguments import arithmetic_dtype
from ..options import HIERARCHY_DEPTH, HierarchicalOptions, SigmoidOptions, SoftmaxOptions, TwoWayOptions, schema
from . import cpu, dispatch, plain
from .backends import COMPILED
from .layout import row_count, stats_like
from .vmap import refuse_vmap

_OPTIONS: tuple[Any, ...] = (SoftmaxOptions, SigmoidOptions, HierarchicalOptions, TwoWayOptions)
SOFTMAX, SIGMOID, HIERARCHICAL, TWO_WAY = map(schema, _OPTIONS)
_OF_LOGITS = "Tensor? class_scale, Tensor? target_scale, Tensor? class_mitigation, Tensor? target_terms"
_APPLY_OPTIONS = (
    f"Tensor? weight, Tensor? class_bias, {_OF_LOGITS}, int ignore_index, float scale, float softcap, "
    "float compensation"
)

# logits: [N, C] with contiguous classes, or [N, C, P] with contiguous pixels and strided classes; [N * P] rows then.
# target: int64 [rows] or, of the first two and logits [N, C], floating point [N, C] with contiguous classes, of the
# logits' dtype or T: a probability for each class, without the options that need one class; stats (m, d, 0, W, 0) then.
SCHEMAS = {
    "softmax_loss": f"(Tensor logits, Tensor target, {SOFTMAX}) -> (Tensor loss, Tensor stats)",
    "softmax_loss_backward": (
        f"(Tensor grad_loss, Tensor logits, Tensor target, Tensor stats, {SOFTMAX}) -> Tensor grad"
    ),
    "softmax_loss_and_grad": (
        f"(Tensor grad_loss, Tensor logits, Tensor target, {SOFTMAX}) -> (Tensor loss, Tensor stats, Tensor grad)"
    ),
    "softmax_loss_and_grad_": (
        f"(Tensor grad_loss, Tensor(a!) logits, Tensor target, {SOFTMAX}) -> (Tensor loss, Tensor stats)"
    ),
    # The steps of one shard of the classes. logits: [N, C] alone. target: a local class, ignore_index, or -1 for one of
    # another shard. stats: of -1 rows, u_g is the effective logit of local class 0, to which U is relative.
    # target_terms: [N, 3], the TargetTerms of each row, or None: those of its class here, and none of -1 rows.
    # row_grad: [N, 5], the RowGrad of each row (m, a, b, S, target) times its upstream gradient.
    "softmax_loss_accumulate": (
        f"(Tensor logits, Tensor target, Tensor? weight, Tensor? class_bias, Tensor? class_margin, {_OF_LOGITS}, "
        "int ignore_index, bool label_smoothing, float scale, float softcap, float compensation) -> Tensor stats"
    ),
    "softmax_loss_apply": f"(Tensor logits, Tensor target, Tensor row_grad, {_APPLY_OPTIONS}) -> Tensor grad",
    "softmax_loss_apply_": f"(Tensor(a!) logits, Tensor target, Tensor row_grad, {_APPLY_OPTIONS}) -> ()",
    # target: int64 [rows] or floating point of the logits' shape; loss: [rows], or of the logits' shape (elementwise);
    # grad_loss: either of the two shapes.
    "sigmoid_loss": f"(Tensor logits, Tensor target, {SIGMOID}, bool elementwise) -> Tensor loss",
    "sigmoid_loss_backward": f"(Tensor grad_loss, Tensor logits, Tensor target, {SIGMOID}) -> Tensor grad",
    "sigmoid_loss_and_grad": (
        f"(Tensor grad_loss, Tensor logits, Tensor target, {SIGMOID}, bool elementwise) -> (Tensor loss, Tensor grad)"
    ),
    "sigmoid_loss_and_grad_": (
        f"(Tensor grad_loss, Tensor(a!) logits, Tensor target, {SIGMOID}, bool elementwise) -> Tensor loss"
    ),
    # logits: [N, C] alone, of all classes of the tree or of one shard; target: int64 [N], of all. stats [N, 2 L + 1]: m
    # and d of each ring, which of empty ones are -inf and 0, then u_g; see longtail.reference.hierarchical. backward
    # takes those of all shards together. Fewer logits than the tree has classes are a shard: their number is the
    # caller's to check.
    "hierarchical_loss": f"(Tensor logits, Tensor target, {HIERARCHICAL}) -> (Tensor loss, Tensor stats)",
    "hierarchical_loss_backward": (
        f"(Tensor grad_loss, Tensor logits, Tensor target, Tensor stats, {HIERARCHICAL}) -> Tensor grad"
    ),
    "hierarchical_loss_backward_": (
        f"(Tensor grad_loss, Tensor(a!) logits, Tensor target, Tensor stats, {HIERARCHICAL}) -> ()"
    ),
    "hierarchical_loss_and_grad": (
        f"(Tensor grad_loss, Tensor logits, Tensor target, {HIERARCHICAL}) -> (Tensor loss, Tensor stats, Tensor grad)"
    ),
    "hierarchical_loss_and_grad_": (
        f"(Tensor grad_loss, Tensor(a!) logits, Tensor target, {HIERARCHICAL}) -> (Tensor loss, Tensor stats)"
    ),
    # target: as of sigmoid_loss. stats [rows, 4], laid out as of softmax_loss: m and d of the negatives, then of the
    # positives, see longtail.reference.two_way; 0 of rows that do not count.
    "two_way_loss": f"(Tensor logits, Tensor target, {TWO_WAY}) -> (Tensor loss, Tensor stats)",
    "two_way_loss_backward": (
        f"(Tensor grad_loss, Tensor logits, Tensor target, Tensor stats, {TWO_WAY}) -> Tensor grad"
    ),
    "two_way_loss_and_grad": (
        f"(Tensor grad_loss, Tensor logits, Tensor target, {TWO_WAY}) -> (Tensor loss, Tensor stats, Tensor grad)"
    ),
    "two_way_loss_and_grad_": (
        f"(Tensor grad_loss, Tensor(a!) logits, Tensor target, {TWO_WAY}) -> (Tensor loss, Tensor stats)"
    ),
    # target: int64 [rows], whose ignored rows stay as they are whatever grad_loss is there, or None.
    "scale_grad_": "(Tensor(a!) grad, Tensor grad_loss, Tensor? target, int ignore_index) -> ()",
    "mean_denominator": "(Tensor target, Tensor? weight, int ignore_index, int num_classes) -> Tensor",
    # loss: [rows] of T; denominator: 0-d. mean: T, their sum over it; divisor: T, the denominator, inf where it is 0.
    "mean_loss": "(Tensor loss, Tensor denominator) -> (Tensor mean, Tensor divisor)",
}


# Where the operators of hierarchical cross-entropy have `path`.
_PATH = {
    "hierarchical_loss": 2,
    "hierarchical_loss_backward": 4,
    "hierarchical_loss_backward_": 4,
    "hierarchical_loss_and_grad": 3,
    "hierarchical_loss_and_grad_": 3,
}


def _too_deep(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a tree is too deep for any kernel."""
    place = _PATH.get(name)
    return place is not None and args[place].dim() == 2 and args[place].shape[1] > HIERARCHY_DEPTH


def _dispatcher(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        deep = _too_deep(name, args)
        return _run(plain.operator(name) if deep else dispatch.kernel(name, args[0].device), args)

    return call


def _run(kernel: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return kernel(*args)
    except RuntimeError as error:
        # The stable ABI carries one type of exception only.
        if "is out of bounds" in str(error):
            raise IndexError(str(error)) from None
        raise


def _fake_loss(logits: Tensor, _target: Tensor, *_options: Any) -> tuple[Tensor, Tensor]:
    dtype = arithmetic_dtype(logits.dtype)
    return logits.new_empty((row_count(logits),), dtype=dtype), stats_like(logits, dtype)


def _fake_two_way_loss(logits: Tensor, _target: Tensor, *_options: Any) -> tuple[Tensor, Tensor]:
    dtype = arithmetic_dtype(logits.dtype)
    return logits.new_empty((row_count(logits),), dtype=dtype), stats_like(logits, dtype, 4)


def _fake_sigmoid_loss(logits: Tensor, _target: Tensor, *options: Any) -> Tensor:
    *_, elementwise = options
    shape = logits.shape if elementwise else (row_count(logits),)
    return logits.new_empty(shape, dtype=arithmetic_dtype(logits.dtype))


def _fake_hierarchical_loss(logits: Tensor, _target: Tensor, path: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty((logits.shape[0],), dtype=arithmetic_dtype(logits.dtype))
    return loss, loss.new_empty((logits.shape[0], 2 * path.shape[1] + 1))


def _fake_grad(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_mean_denominator(target: Tensor, weight: Tensor | None, *_: Any) -> Tensor:
    return target.new_empty(()) if weight is None else weight.new_empty(())


_FAKES: dict[str, Callable[..., Any]] = {
    "softmax_loss": _fake_loss,
    "softmax_loss_backward": lambda _grad_loss, logits, *_: _fake_grad(logits),
    "softmax_loss_and_grad": lambda _grad_loss, logits, *rest: (
        *_fake_loss(logits, *rest),
        _fake_grad(logits),
    ),
    "softmax_loss_and_grad_": lambda _grad_loss, logits, *rest: _fake_loss(logits, *rest),
    "softmax_loss_accumulate": lambda logits, *_: stats_like(logits, arithmetic_dtype(logits.dtype)),
    "softmax_loss_apply": lambda logits, *_: _fake_grad(logits),
    "softmax_loss_apply_": lambda *_: None,
    "sigmoid_loss": _fake_sigmoid_loss,
    "sigmoid_loss_backward": lambda _grad_loss, logits, *_: _fake_grad(logits),
    "sigmoid_loss_and_grad": lambda _grad_loss, logits, *rest: (
        _fake_sigmoid_loss(logits, *rest),
        _fake_grad(logits),
    ),
    "sigmoid_loss_and_grad_": lambda _grad_loss, logits, *rest: _fake_sigmoid_loss(logits, *rest),
    "hierarchical_loss": _fake_hierarchical_loss,
    "hierarchical_loss_backward": lambda _grad_loss, logits, *_: _fake_grad(logits),
    "hierarchical_loss_backward_": lambda *_: None,
    "hierarchical_loss_and_grad": lambda _grad_loss, logits, *rest: (
        *_fake_hierarchical_loss(logits, *rest),
        _fake_grad(logits),
    ),
    "hierarchical_loss_and_grad_": lambda _grad_loss, logits, *rest: _fake_hierarchical_loss(logits, *rest),
    "two_way_loss": _fake_two_way_loss,
    "two_way_loss_backward": lambda _grad_loss, logits, *_: _fake_grad(logits),
    "two_way_loss_and_grad": lambda _grad_loss, logits, *rest: (*_fake_two_way_loss(logits, *rest), _fake_grad(logits)),
    "two_way_loss_and_grad_": lambda _grad_loss, logits, *rest: _fake_two_way_loss(logits, *rest),
    "scale_grad_": lambda *_: None,
    "mean_denominator": _fake_mean_denominator,
    "mean_loss": lambda loss, _denominator: (loss.new_empty(()), loss.new_empty(())),
}

_library = torch.library.Library("longtail", "DEF")
_kernel_libraries = [torch.library.Library(f"longtail_{name}", "DEF") for name in COMPILED]


def define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Makes ``torch.ops.longtail.<name>``, which nothing batches."""
    _library.define(name + schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"longtail::{name}", fake, lib=_library)
    torch.library.register_vmap(f"longtail::{name}", refuse_vmap, lib=_library)
    return getattr(torch.ops.longtail, name).default


for _name, _schema in SCHEMAS.items():
    for _each in _kernel_libraries:
        _each.define(_name + _schema)
    define(_name, _schema, _dispatcher(_name), _FAKES[_name])

# Of the CPU's library alone, see direct. Losses and their mean; count, rows: divides by the counted rows, at least 1,
# whatever they weigh, or how many elements they have. dense_targets_fit: each is in [0, 1], NaN or ignore_index.
for _schema in (
    f"softmax_mean(Tensor logits, Tensor target, {SOFTMAX}, bool count) -> (Tensor mean, Tensor stats, Tensor divisor)",
    f"sigmoid_mean(Tensor logits, Tensor target, {SIGMOID}, bool rows) -> (Tensor mean, Tensor divisor)",
    f"two_way_mean(Tensor logits, Tensor target, {TWO_WAY}, bool count) -> (Tensor mean, Tensor stats, Tensor divisor)",
    "dense_targets_fit(Tensor target, int? ignore_index) -> bool",
):
    _kernel_libraries[COMPILED.index("cpu")].define(_schema)

cpu.load()


def below_autograd() -> contextlib.AbstractContextManager[Any]:
    """For our Functions, which differentiate: the operators' own formulas take time, and know no torch.func."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return guard


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), int, float, bool))


def _unobserved(args: tuple[Any, ...]) -> bool:
    """Whether nothing but autograd could tell an operator of these arguments from its kernel."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0  # of tangents, which a kernel would drop
    ) and _PLAIN.issuperset(map(type, args))


def _cpu_kernel(name: str, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The kernel of the CPU's library that operator ``name`` comes to, where nobody would know; None elsewhere."""
    if not (args[0].is_cpu and _unobserved(args)) or _too_deep(name, args):
        return None
    kernel = dispatch.kernel(name, args[0].device)
    # None in Python, which would see what the dispatcher resolves for a library: negative bits, zero tensors.
    return kernel if type(kernel) is torch._ops.OpOverload else None


def _entry(name: str) -> Callable[..., Any]:
    """Operator ``name``, or at once its kernel: the way through the dispatcher to Python and back takes time."""
    operator = getattr(torch.ops.longtail, name).default

    def call(*args: Any) -> Any:
        kernel = _cpu_kernel(name, args)
        return operator(*args) if kernel is None else _run(kernel, args)

    return call


def direct(logits: Tensor, *others: Any) -> bool:
    """Whether operators of such arguments are those of the CPU's library, and nothing looks for the public ones."""
    return _cpu_kernel("softmax_loss", (logits, *others)) is not None


def _of_cpu(name: str) -> Callable[..., Any]:
    """An operator of the CPU's library alone, for where :func:`direct` says so."""
    operator = getattr(torch.ops.longtail_cpu, name).default
    return lambda *args: _run(operator, args)


softmax_mean = _of_cpu("softmax_mean")
sigmoid_mean = _of_cpu("sigmoid_mean")
two_way_mean = _of_cpu("two_way_mean")
dense_targets_fit = _of_cpu("dense_targets_fit")

softmax_loss = _entry("softmax_loss")
softmax_loss_backward = _entry("softmax_loss_backward")
softmax_loss_and_grad = _entry("softmax_loss_and_grad")
softmax_loss_and_grad_ = _entry("softmax_loss_and_grad_")
softmax_loss_accumulate = _entry("softmax_loss_accumulate")
softmax_loss_apply = _entry("softmax_loss_apply")
softmax_loss_apply_ = _entry("softmax_loss_apply_")
sigmoid_loss = _entry("sigmoid_loss")
sigmoid_loss_backward = _entry("sigmoid_loss_backward")
sigmoid_loss_and_grad = _entry("sigmoid_loss_and_grad")
sigmoid_loss_and_grad_ = _entry("sigmoid_loss_and_grad_")
hierarchical_loss = _entry("hierarchical_loss")
hierarchical_loss_backward = _entry("hierarchical_loss_backward")
hierarchical_loss_backward_ = _entry("hierarchical_loss_backward_")
hierarchical_loss_and_grad = _entry("hierarchical_loss_and_grad")
hierarchical_loss_and_grad_ = _entry("hierarchical_loss_and_grad_")
two_way_loss = _entry("two_way_loss")
two_way_loss_backward = _entry("two_way_loss_backward")
two_way_loss_and_grad = _entry("two_way_loss_and_grad")
two_way_loss_and_grad_ = _entry("two_way_loss_and_grad_")
scale_grad_ = _entry("scale_grad_")
mean_denominator = _entry("mean_denominator")
mean_loss = _entry("mean_loss")
