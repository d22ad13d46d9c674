"""Runs the emulated kernels on tensors: in this process, or in a program under a sanitizer."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import subprocess
from collections.abc import Iterable
from ctypes import c_bool, c_float, c_int, c_int64, c_void_p
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtail.options import SIGMOID_VECTORS, SOFTMAX_NUMBERS, SOFTMAX_VECTORS

from . import build

STORAGES = (torch.float32, torch.bfloat16, torch.float16)
LOSS, BACKWARD, LOSS_AND_GRAD, ACCUMULATE, APPLY = range(5)
WARP, SHARED, SWEEP = range(3)
EVEN, SKEWED = range(2)
VECTORS, NUMBERS = " ".join(SOFTMAX_VECTORS), " ".join(SOFTMAX_NUMBERS)  # in the order of the C++ fields


def _structure(name: str, fields: str, **others: Any) -> type[ctypes.Structure]:
    """A ctypes structure from "type field field, type field": the order of the C++ structure."""
    types = {"int": c_int, "int64": c_int64, "float": c_float, "bool": c_bool, "pointer": c_void_p, **others}
    members = []
    for group in fields.split(","):
        kind, *names = group.split()
        members += [(field, types[kind]) for field in names]
    return type(name, (ctypes.Structure,), {"_fields_": members})


_LOGITS = (
    "int storage, int64 rows num_classes pixels, pointer logits, int64 logits_stride logits_class_stride,"
    "pointer target, int64 target_stride,"
)
Args = _structure(
    "Args",
    f"{_LOGITS} bool dense, pointer dense_target, int64 dense_stride, bool dense_is_wide,"
    f"pointer {VECTORS}, int64 ignore_index, float {NUMBERS}, bool entropy,"
    "pointer grad_loss, int64 grad_loss_stride, pointer target_terms row_grad loss stats,"
    "int64 stats_stride stats_column_stride,"
    "pointer grad, int64 grad_stride grad_class_stride, pointer weight_sum, float smooth",
)
SigmoidArgs = _structure(
    "SigmoidArgs",
    f"{_LOGITS} pointer dense_target, int64 dense_stride dense_class_stride,"
    f"pointer {' '.join(SIGMOID_VECTORS)} grad_loss,"
    "int64 grad_loss_stride ignore_index, float alpha_positive alpha_negative gamma gamma_negative clip negative_scale"
    " label_smoothing rebalance_alpha rebalance_beta rebalance_mu,"
    "bool same_gamma detach plain dense_is_wide class_weight_by_target ignoring elementwise_loss elementwise_upstream,"
    "pointer loss grad, int64 grad_stride grad_class_stride",
)
HierarchicalArgs = _structure(
    "HierarchicalArgs",
    "int storage, int64 rows num_classes tree_classes pixels, pointer logits, int64 logits_stride logits_class_stride,"
    "pointer target, int64 target_stride ignore_index nodes, int depth,"
    "pointer path node_begin node_end node_weight order position weight class_bias sample_weight grad_loss,"
    "int64 grad_loss_stride, pointer loss stats grad, int64 grad_stride grad_class_stride",
)
TwoWayArgs = _structure(
    "TwoWayArgs",
    f"{_LOGITS} pointer dense_target, int64 dense_stride dense_class_stride,"
    "pointer class_bias sample_weight grad_loss, int64 grad_loss_stride ignore_index,"
    "float positive_temperature negative_temperature, bool dense_is_wide ignoring joint,"
    "pointer loss stats, int64 stats_stride stats_column_stride, pointer grad, int64 grad_stride grad_class_stride",
)
Scaling = _structure(
    "Scaling",
    "int storage, int64 rows num_classes pixels, pointer grad, int64 grad_stride grad_class_stride,"
    "pointer grad_loss, int64 grad_loss_stride, pointer target, int64 target_stride ignore_index",
)
Denominator = _structure(
    "Denominator",
    "int64 rows num_classes, pointer target, int64 target_stride ignore_index, pointer weight, int weight_size,"
    "pointer result",
)
Mean = _structure(
    "Mean",
    "int64 rows, pointer loss, int64 loss_stride, int loss_size denominator_type, pointer denominator mean divisor",
)
PlanFields = _structure("PlanFields", "int regime, bool vector, int threads lanes cluster batch shared")
Problem = _structure(
    "Problem", "int pass_ element_size, int64 rows num_classes, bool aligned alike extras images dense by_target"
)
Device = _structure("Device", "int capability processors shared_per_block shared_per_processor")
Request = _structure(
    "Request",
    "args args, sigmoid sigmoid, scaling scaling, denominator denominator, mean mean,"
    "hierarchical hierarchical, two_way two_way, int kind processors, plan plan, int pass_ order, int64 most_blocks",
    args=Args,
    sigmoid=SigmoidArgs,
    scaling=Scaling,
    denominator=Denominator,
    mean=Mean,
    hierarchical=HierarchicalArgs,
    two_way=TwoWayArgs,
    plan=PlanFields,
)
KINDS = (Args, SigmoidArgs, Scaling, Denominator, Mean, HierarchicalArgs, TwoWayArgs)
STRUCTURES = (*KINDS, PlanFields, Problem, Device, Request)
SOFTMAX, SIGMOID, SCALING, DENOMINATOR, MEAN, HIERARCHICAL, TWO_WAY = range(7)
POINTERS = {name for kind in KINDS for name, type_ in kind._fields_ if type_ is c_void_p}


@dataclass(frozen=True)
class Plan:
    """csrc/cuda/plan.h's Plan."""

    regime: int
    vector: bool
    threads: int
    lanes: int = 0
    cluster: int = 1
    batch: int = 1
    shared: int = field(default=0, compare=False)


NO_PLAN = Plan(WARP, False, 0)


@dataclass(frozen=True)
class Launch:
    """One launch: the fields of one of KINDS; tensors for their pointers."""

    fields: dict[str, Any]
    pass_: int = LOSS
    plan: Plan = NO_PLAN
    processors: int = 0
    kind: int = SOFTMAX
    order: int = EVEN
    most_blocks: int = 0  # at once, 0 for the whole grid; whole clusters

    def otherwise(self) -> Launch:
        """The same in another order and by as few blocks as can be: to the same bits."""
        return replace(self, order=SKEWED, most_blocks=self.plan.cluster)

    def tensors(self) -> list[Tensor]:
        return [x for name, x in self.fields.items() if name in POINTERS and x is not None]


def scaling(grad: Tensor, factor: Tensor, processors: int, target: Tensor | None = None) -> Launch:
    """grad [N, C] times factor [N], or [N, C, P] times [N * P], in place, on a device of so many multiprocessors."""
    fields = {"storage": STORAGES.index(grad.dtype), "rows": len(factor), "num_classes": grad.shape[1]}
    fields |= {"pixels": grad.shape[2]} if grad.dim() == 3 else {}
    fields |= {"grad": grad, "grad_stride": grad.stride(0), "grad_class_stride": grad.stride(1)}
    fields |= {"grad_loss": factor, "grad_loss_stride": factor.stride(0)}
    if target is not None:
        fields |= {"target": target, "target_stride": target.stride(0), "ignore_index": -100}
    return Launch(fields, processors=processors, kind=SCALING)


def mean_denominator(plan: Plan, target: Tensor, weight: Tensor | None, num_classes: int, result: Tensor) -> Launch:
    """The number of targets that are not -100, or the sum of their weights, into result."""
    fields = {"rows": len(target), "num_classes": num_classes, "target": target, "target_stride": target.stride(0)}
    fields |= {"ignore_index": -100, "weight": weight, "result": result}
    fields |= {"weight_size": 0 if weight is None else weight.element_size()}
    return Launch(fields, plan=plan, kind=DENOMINATOR)


def mean_loss(plan: Plan, loss: Tensor, denominator: Tensor, mean: Tensor, divisor: Tensor) -> Launch:
    """The sum of the losses over the denominator into mean, and what a gradient is divided by into divisor."""
    fields = {"rows": len(loss), "loss": loss, "loss_stride": loss.stride(0), "loss_size": loss.element_size()}
    fields |= {"denominator_type": (torch.int64, torch.float32, torch.float64).index(denominator.dtype)}
    fields |= {"denominator": denominator, "mean": mean, "divisor": divisor}
    return Launch(fields, plan=plan, kind=MEAN)


def _plan_fields(plan: Plan) -> Any:
    return PlanFields(*astuple(plan))


def _request(launch: Launch, address: Any) -> Any:
    """The C++ request; address: of a tensor."""
    values = {k: address(v) if isinstance(v, Tensor) else v for k, v in launch.fields.items()}
    structures = [kind(**values) if i == launch.kind else kind() for i, kind in enumerate(KINDS)]
    rest = _plan_fields(launch.plan), launch.pass_, launch.order, launch.most_blocks
    return Request(*structures, launch.kind, launch.processors, *rest)


class LaunchFailed(Exception):
    """What the emulation, or the sanitizer, has to say."""


@functools.cache
def library() -> ctypes.CDLL:
    """Built without sanitizers but for alignment; its structures are as here."""
    loaded = ctypes.CDLL(str(build.linked("plain")))
    loaded.size_of.restype = loaded.bytes_of_plan.restype = c_int64
    loaded.run_request.restype = ctypes.c_char_p
    for i, structure in enumerate(STRUCTURES):
        assert loaded.size_of(i) == ctypes.sizeof(structure), f"{structure.__name__} differs from the C++ structure"
    return loaded


def run(launches: Iterable[Launch]) -> None:
    """In this process, on the tensors' own memory."""
    for one in launches:
        failure = library().run_request(ctypes.byref(_request(one, Tensor.data_ptr)))
        if failure:
            raise LaunchFailed(failure.decode())


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def run_apart(program: Path, launches: Iterable[Launch], folder: Path, **environment: str) -> list[str]:
    """In a program of its own, on copies with nothing around them; returns the barriers that were met.

    A sanitizer's first report raises LaunchFailed.
    """
    launches = list(launches)
    tensors: dict[int, Tensor] = {}
    for one in launches:
        for tensor in one.tensors():
            if _extent(tensor) >= _extent(tensors.get(tensor.data_ptr(), tensor)):
                tensors[tensor.data_ptr()] = tensor
    numbers = {address: i + 1 for i, address in enumerate(tensors)}
    content = [struct.pack("q", len(tensors))]
    for address, tensor in tensors.items():
        content += [struct.pack("qq", address % 16, _extent(tensor)), ctypes.string_at(address, _extent(tensor))]
    content.append(struct.pack("q", len(launches)))
    content += [bytes(_request(one, lambda tensor: numbers[tensor.data_ptr()])) for one in launches]
    requests, results = folder / "requests", folder / "results"
    requests.write_bytes(b"".join(content))
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1 second_deadlock_stack=0"}
    done = subprocess.run(
        [str(program), str(requests), str(results)],
        env={**os.environ, **options, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise LaunchFailed(done.stderr)
    at, written = 0, results.read_bytes()
    for address, tensor in tensors.items():
        ctypes.memmove(address, written[at : at + _extent(tensor)], _extent(tensor))
        at += _extent(tensor)
    return done.stdout.split()


def plan_of(problem: Any, device: Any, family: str = "") -> Plan:
    """The plan that csrc/cuda/plan.h chooses; family: "", "sigmoid_", "sigmoid_pixels_" or "hierarchical_"."""
    fields = PlanFields()
    choose = getattr(library(), f"choose_{family}plan")
    choose(ctypes.byref(problem), ctypes.byref(device), ctypes.byref(fields))
    return Plan(*(getattr(fields, name) for name, _ in PlanFields._fields_))


def mean_plan_of(rows: int, device: Any) -> Plan:
    fields = PlanFields()
    library().choose_mean_plan(c_int64(rows), ctypes.byref(device), ctypes.byref(fields))
    return Plan(*(getattr(fields, name) for name, _ in PlanFields._fields_))


def shared_bytes(plan: Plan, problem: Any) -> int:
    return int(library().bytes_of_plan(ctypes.byref(_plan_fields(plan)), ctypes.byref(problem)))


def describe(launch: Launch) -> Any:
    """The problem that a launch is: problem_of of csrc/cuda/softmax_loss.cuh or sigmoid_loss.cuh."""
    problem, request = Problem(), _request(launch, Tensor.data_ptr)
    if launch.kind == SOFTMAX:
        library().describe(ctypes.byref(request.args), launch.pass_, ctypes.byref(problem))
    elif launch.kind == HIERARCHICAL:
        library().describe_hierarchical(ctypes.byref(request.hierarchical), launch.pass_, ctypes.byref(problem))
    elif launch.kind == TWO_WAY:
        library().describe_two_way(ctypes.byref(request.two_way), launch.pass_, ctypes.byref(problem))
    else:
        library().describe_sigmoid(ctypes.byref(request.sigmoid), launch.pass_, ctypes.byref(problem))
    return problem


def poisoned(shape: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(tuple(shape), torch.nan, dtype=dtype)


def planned(launch: Launch, device: Any) -> Launch:
    """With the plan that the operators would choose on the device."""
    families = {SOFTMAX: "", SIGMOID: "sigmoid_", HIERARCHICAL: "hierarchical_", TWO_WAY: "sigmoid_"}
    family = "sigmoid_pixels_" if launch.fields.get("pixels") else families[launch.kind]
    return replace(launch, plan=plan_of(describe(launch), device, family))
