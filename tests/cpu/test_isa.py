"""Promise: every instruction set computes the same, with exp within 2.5 ULP; unknown ones are refused."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from emulation.build import COMPILER, ROOT
from isa import BFLOAT16_ONLY, Scripts, run, supported, with_floats

AGREE = """
import itertools
from batches import ProbabilityBatch, check
PROBABILITIES = ("plain", "class_bias", "smoothing_weight", "linear_of_probabilities", "all_of_probabilities")
for dtype in cases.DTYPES:
    for classes, rows in cases.SIZES.items():
        logits, target = cases.random_case(rows, classes, dtype, seed=classes)
        logits = cases.poison_ignored(logits, target)
        for option_set in ("plain", "mixed") if classes < 10**4 else ("mixed_linear",):
            options = cases.options(option_set, classes, target, dtype)
            wide = cases.to_float64(options)
            up = torch.randn(rows, generator=cases.generator(1), dtype=torch.float64)
            x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
            loss = longtail.cross_entropy(x, target, reduction="none", **options)
            truth = longtail.reference.softmax_loss(y, target, **wide)
            assert_close(loss, truth.detach(), what=f"loss {dtype} C={classes} {option_set}", factor=3)
            grad, = torch.autograd.grad(loss, x, up.to(loss.dtype))
            true_grad, = torch.autograd.grad(truth, y, up)
            assert_close(grad, true_grad, what=f"grad {dtype} C={classes} {option_set}", factor=3)
    for (classes, rows), option_set in itertools.product(((1, 5), (19, 9), (600, 3), (2500, 2)), PROBABILITIES):
        logits, _ = cases.random_case(rows, classes, dtype, ignore=False)
        for target_dtype in {dtype, cases.vector_dtype(dtype)}:
            p = cases.probabilities(rows, classes, target_dtype)
            options = cases.options(option_set, classes, p[:, 0], dtype)
            check(ProbabilityBatch(kernels.CPU["cpu"], (logits, p), options, target_layout="offset"), factor=3)
    logits, target = cases.random_case(6, 2500, dtype)
    options = cases.options("mixed", 2500, target, dtype)
    up = torch.randn(6, generator=cases.generator(1), dtype=torch.float64)
    truth, true_grad = naive.rows_and_grad(logits, target, up, **cases.to_float64(options))
    up = up.to(cases.vector_dtype(dtype))
    _, loss, grad = shard_cases.run_shards(logits, target, up, [1, 1500, 999], options, inplace=False)
    assert_close(loss, truth, what=f"loss of shards {dtype}", factor=4)
    assert_close(grad, true_grad, what=f"grad of shards {dtype}", factor=4)
print("agrees")
"""

SUM = """
# A sum over a whole vocabulary loses at most twice the digits that torch's own loses.
for classes in (32000, 128256):
    logits, target = cases.random_case(4, classes, torch.float32, ignore=False)
    grads = []
    for function, dtype in ((longtail, torch.float32), (F, torch.float64), (F, torch.float32)):
        x = logits.to(dtype).detach().requires_grad_()
        function.cross_entropy(x, target, reduction="sum").backward()
        grads.append(x.grad.double())
    ours, torchs = (((g - grads[1]) / grads[1]).abs().amax().item() for g in (grads[0], grads[2]))
    print(f"C={classes}: largest relative error {ours:.2g}, torch's {torchs:.2g}")
    assert ours <= 2 * torchs + 2e-6, (classes, ours, torchs)
print("sums well")
"""

EXP = """
def statistics(x, classes, **options):
    # One row [target, 0, x, -inf ...] per x, with x and the 0 in columns that change from row to row.
    n = len(x)
    row = torch.arange(n)
    z = torch.full((n, classes), -torch.inf, dtype=x.dtype)
    target = row % classes
    z[row, target] = 1.0
    z[row, (target + 1) % classes] = 0.0
    z[row, (target + 2 + row // classes % (classes - 2)) % classes] = x
    return torch.ops.longtail.softmax_loss(z, target, *cases.operator_options(classes, options))[1]

for dtype, lowest, vanish in ((torch.float32, -87.0, -104.0), (torch.float64, -708.0, -746.0)):
    real = np.float32 if dtype == torch.float32 else np.float64
    dense = -torch.rand(150_000, generator=cases.generator(1), dtype=torch.float64)
    whole = torch.arange(1, 88, dtype=torch.float64).neg()
    dense = torch.cat([dense * -lowest, dense * 1e-3, dense * 3, whole])
    x = dense.to(dtype)
    x = x[(x < 0) & (x >= lowest)]
    for classes in (3, 67):
        m, d, t, _, _ = statistics(x, classes).unbind(1)
        assert torch.equal(m, torch.zeros_like(m))
        exact = np.exp(x.numpy().astype(np.longdouble))
        got = t.numpy().astype(np.longdouble) / x.numpy().astype(np.longdouble)
        ulp = np.spacing(exact.astype(real)).astype(np.longdouble)
        error = float(np.max(np.abs(got - exact) / ulp))
        worst = x[int(np.argmax(np.abs(got - exact) / ulp))].item()
        print(f"{{dtype}} C={{classes}}: {{error:.3f}} ulp at {{worst!r}}")
        assert error <= 2.5, (dtype, classes, error, worst)
        # A sum of its own may drop what does not show beside the 1 of the largest logit.
        total = statistics(x, classes, entropy=False)[:, 1].numpy()
        error = float(np.max(np.abs(total.astype(np.longdouble) - (1 + exact)) / np.spacing(total)))
        assert error <= 1.5, (dtype, classes, error)
        none = torch.tensor([-torch.inf, vanish, vanish * 2, -1e30, torch.finfo(dtype).min], dtype=dtype)
        stats = statistics(none.repeat(40), classes)
        assert torch.equal(stats[:, 1], torch.ones_like(stats[:, 1])), stats[:, 1]
        assert torch.equal(stats[:, 2].abs(), torch.zeros_like(stats[:, 2])), stats[:, 2]
print("exp is accurate")
"""


GUARD = """
from guard_pages import GuardedEnd
end = GuardedEnd()
for dtype in OWN_DTYPES:
    for classes in (*range(1, 40), 63, 64, 65, 100):
        values, target = cases.random_case(3, classes, dtype, ignore=False)
        z = end.hold(values)
        tail = cases.operator_options(classes, cases.options("mixed", classes, target, dtype))
        up = cases.upstreams((3,), cases.vector_dtype(dtype))["random"]
        loss, stats = torch.ops.longtail.softmax_loss(z, target, *tail)
        grad = torch.ops.longtail.softmax_loss_backward(up, z, target, stats, *tail)
        torch.ops.longtail.softmax_loss_and_grad(up, z, target, *tail)
        torch.ops.longtail.softmax_loss_and_grad_(up, z, target, *tail)
        assert_close(z, grad.double(), what=f"{dtype} C={classes}", factor=3)
        z.copy_(values.softmax(1))
        for of in (z, z.clone()):
            for option_set in ("plain", "class_bias", "smoothing_weight", "all_of_probabilities"):
                tail = cases.operator_options(classes, cases.options(option_set, classes, target, dtype))
                loss, stats = torch.ops.longtail.softmax_loss(of, z, *tail)
                torch.ops.longtail.softmax_loss_backward(up, of, z, stats, *tail)
        z.copy_(values)
        terms = torch.rand(3, 3, dtype=cases.vector_dtype(dtype))
        for option_set in ("mixed", "mixed_tail"):
            options = cases.options(option_set, classes, target, dtype)
            tails = shard_cases.accumulate_tail(options, True, terms), shard_cases.apply_tail(options, terms)
            stats = torch.ops.longtail.softmax_loss_accumulate(z, target - 1, *tails[0])
            torch.ops.longtail.softmax_loss_apply_(z, target - 1, stats, *tails[1])
        for option_set in ("vector_scaling", "target_scale", "mitigation", "seesaw", "tail_linear"):
            tail = cases.operator_options(classes, cases.options(option_set, classes, target, dtype))
            z.copy_(values)
            loss, stats = torch.ops.longtail.softmax_loss(z, target, *tail)
            torch.ops.longtail.softmax_loss_backward(up, z, target, stats, *tail)
            torch.ops.longtail.softmax_loss_and_grad_(up, z, target, *tail)
        torch.ops.longtail.scale_grad_(z, up, None, -100)
print("within bounds")
"""

TAIL = """
from batches import SoftmaxBatch, check, random_case
SETS = ("vector_scaling", "target_scale", "mitigation", "seesaw", "mixed_tail", "tail_linear")
SHAPES = ((5, 1), (9, 2), (19, 7), (3, 7, 5), (2, 33, 16), (3, 130), (2, 70, 33), (2, 2500))
# Loops of their own: rows with one of two vectors, and what the options of the sets above leave to others.
PAIRS = ({"class_scale"}, {"target_scale", "class_bias"}, {"class_mitigation", "class_bias"},
         {"class_scale", "target_scale"})
for dtype in OWN_DTYPES:
    for shape in SHAPES:
        case = random_case(shape, dtype)
        every = cases.options("mixed_tail", shape[1], case[1], dtype)
        chosen = [cases.options(name, shape[1], case[1], dtype) for name in SETS]
        chosen += [{name: every[name] for name in pair} for pair in PAIRS if shape[1] > 64]
        chosen += [{"class_scale": every["class_scale"], "label_smoothing": 0.2, "compensation": 0.5}]
        for options in chosen:
            check(SoftmaxBatch(kernels.CPU["cpu"], case, options), factor=3)
        # A target behind everything at -inf, one of no mitigation, and classes without any.
        logits, target = random_case(shape, dtype, ignore=False)
        logits[(0, target[0], 0)[: len(shape)]] = -torch.inf
        own = cases.options("seesaw", shape[1], target, dtype)
        own["class_mitigation"][:: 3] = -torch.inf
        check(SoftmaxBatch(kernels.CPU["cpu"], (logits, target), own), factor=3)
    for shape in ((6, 33), (2, 9, 16), (5, 300), (2, 90, 16), (2, 2500)):
        logits, target = random_case(shape, dtype, ignore=False)
        one = torch.ones(shape[1], dtype=cases.vector_dtype(dtype))
        up = cases.upstreams(target.shape, one.dtype)["random"]
        for neutral in ({"class_scale": one}, {"target_scale": one}, {"class_mitigation": one * 3.5}):
            found = []
            for options in ({}, neutral):
                tail = cases.operator_options(shape[1], options)
                z = logits.clone()
                found.append([*torch.ops.longtail.softmax_loss_and_grad(up, z, target, *tail)])
                found[-1] += [*torch.ops.longtail.softmax_loss_and_grad_(up, z, target, *tail), z]
            for plain, same in zip(*found):
                if dtype == torch.bfloat16:  # whose sums are taken in another order
                    assert_close(same, plain.double(), what=f"{neutral.keys()} {shape}")
                else:
                    assert torch.equal(plain, same), (dtype, shape, neutral.keys())
print("knows the tail")
"""

LIMITS = """
for dtype in OWN_DTYPES:
    for shape in ((0, 2), (0, 9), (0, 67), (0, 1030), (0, 9, 3), (0, 33, 16)):
        limit_cases.check_operators(kernels.CPU['cpu'], shape, dtype, factor=2)
    limit_cases.check_weights_of_positives(dtype)
    for shape in ((12, 33), (2, 7, 300)):
        for name, grad, up, target, expected in cases.scalings(shape, dtype):
            torch.ops.longtail.scale_grad_(grad, up, target, cases.IGNORE)
            assert_close(grad, expected.double(), what=name)
print("right at the limits")
"""

FLAGS = {"baseline": [], "neon": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
FLAGS["avx512"] = [*FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
FLAGS["avx512_bf16"] = [*FLAGS["avx512"], "-mavx512bf16"]


@pytest.mark.parametrize("isa", supported())
def test_results_agree_with_float64_truth(isa: str, scripts: Scripts) -> None:
    report = "print('isa:', longtail.backends()['cpu'].detail)"
    said = scripts.says(isa, AGREE + report, "agrees")
    assert isa in said.split("isa:")[1].lower(), "the forced instruction set is the one reported"


@pytest.mark.parametrize("isa", with_floats())
def test_sums_over_a_vocabulary_keep_their_digits(isa: str, scripts: Scripts) -> None:
    scripts.says(isa, SUM, "sums well")


@pytest.mark.parametrize("isa", supported())
def test_what_classes_and_targets_scale_and_add(isa: str, scripts: Scripts) -> None:
    scripts.says(isa, TAIL, "knows the tail")


@pytest.mark.parametrize("isa", supported())
def test_rows_at_the_limits(isa: str, scripts: Scripts) -> None:
    scripts.says(isa, LIMITS, "right at the limits")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The kernels of an instruction set, compiled to stop where arithmetic is undefined."""
    folder = tmp_path_factory.mktemp("watched")

    @functools.cache
    def compiled(isa: str, *report: str) -> Path:
        name = "baseline" if isa == "neon" else isa
        source, made = ROOT / "csrc" / "cpu" / f"kernels_{name}.cpp", folder / f"{name}{len(report)}.o"
        build([*FLAGS[isa], *report, "-c", source], made)
        return made

    return compiled


# Of what "undefined" stands for: checks of pointers besides take a third longer to compile.
ARITHMETIC = "shift,signed-integer-overflow,integer-divide-by-zero,bounds,pointer-overflow,bool,enum"
STOPS = ("-fsanitize-undefined-trap-on-error", "-fno-exceptions", "-fno-asynchronous-unwind-tables")
REPORTS = ("-fno-sanitize-recover=all",)  # where and what, which takes twice as long to compile


def build(arguments: list[str | Path], made: Path) -> None:
    flags = ["-std=c++17", "-O0", f"-fsanitize={ARITHMETIC}", f"-I{ROOT / 'csrc'}"]
    built = subprocess.run([str(COMPILER), *flags, *arguments, "-o", made], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("isa", supported())
def test_no_arithmetic_is_undefined(isa: str, watched: Callable[..., Path], tmp_path: Path) -> None:
    name = "baseline" if isa == "neon" else isa
    main, program = Path(__file__).with_name("undefined.cpp"), tmp_path / "odd"
    for report in (STOPS, REPORTS):  # the second says what has stopped the first
        objects = [watched(x, *report) for x in ([isa, "avx512"] if isa == BFLOAT16_ONLY else [isa])]
        build([f"-DLONGTAIL_KERNELS=kernels_{name}", *report, main, *objects], program)
        done = subprocess.run([program], capture_output=True, text=True)
        if done.returncode == 0:
            break
    assert report is STOPS, f"exit {done.returncode}: {done.stderr}"
    assert done.stdout == f"{isa} is defined\n"


@pytest.mark.parametrize("isa", with_floats())
def test_exp_accuracy(isa: str, scripts: Scripts) -> None:
    scripts.says(isa, EXP.replace("{{", "{").replace("}}", "}"), "exp is accurate")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
@pytest.mark.parametrize("isa", supported())
def test_nothing_is_read_past_the_last_column(isa: str, scripts: Scripts) -> None:
    scripts.says(isa, GUARD, "within bounds")


def test_the_best_instruction_set_is_the_default() -> None:
    done = run("print('isa:', longtail.backends()['cpu'].detail)")
    assert done.returncode == 0, done.stderr
    assert supported()[-1] in done.stdout.lower()


@pytest.mark.parametrize("isa", ["sse9", "AVX-1024", "neon" if supported() != ["neon"] else "avx2"])
def test_an_unknown_instruction_set_is_refused_by_name(isa: str, scripts: Scripts) -> None:
    body = "longtail.cross_entropy(torch.randn(4, 5), torch.tensor([0, 1, 2, 3]))\nprint('silently ran')"
    done = scripts.run(isa, body)
    assert "silently ran" not in done.stdout
    assert done.returncode == 1, "an exception, not a crash"
    assert f"LONGTAIL_CPU_ISA is {isa!r}" in done.stderr
    assert supported()[0] in done.stderr, "the error names the choices"
