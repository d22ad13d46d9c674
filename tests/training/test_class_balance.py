"""Weights, biases and margins from class counts: published values, limits, invariants, and every error."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longtail import class_balance as cb

CIFAR10_LT_100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
PUBLISHED_WEIGHTS = [0.0506, 0.0769, 0.1211, 0.195, 0.3188, 0.5246, 0.8683, 1.4426, 2.4092, 3.9927]

count_lists = st.lists(st.integers(1, 10**7), min_size=1, max_size=40)
betas = st.one_of(st.sampled_from([0.0, 0.9, 0.99, 0.999, 0.9999, 1.0]), st.floats(0.0, 1.0))
FROM_COUNTS = {
    "effective_number_weight": lambda n, **kw: cb.effective_number_weight(n, 0.999, **kw),
    "inverse_frequency_weight": cb.inverse_frequency_weight,
    "positive_weight": lambda n, **kw: cb.positive_weight(n, 10**9, 0.25, **kw),
    "logit_adjustment": cb.logit_adjustment,
    "ldam_margin": cb.ldam_margin,
    "cdt_scale": lambda n, **kw: cb.cdt_scale(n, 0.3, **kw),
    "immax_scale": cb.immax_scale,
    "seesaw_mitigation": cb.seesaw_mitigation,
    "vector_scaling": lambda n, **kw: cb.vector_scaling(n, 0.2, 0.0, **kw)["class_scale"],
}
ALL = {"effective_number": lambda n, **kw: cb.effective_number(n, 0.999, **kw), **FROM_COUNTS}
WITH_ZERO = ["effective_number_weight", "inverse_frequency_weight", "positive_weight", "ldam_margin"]


@pytest.fixture(params=ALL.values(), ids=ALL.keys())
def function(request):
    return request.param


def test_weights_published_for_cifar10_lt():
    weight = cb.effective_number_weight(CIFAR10_LT_100, 0.9999)
    torch.testing.assert_close(weight, torch.tensor(PUBLISHED_WEIGHTS), atol=5e-5, rtol=0)


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99, 0.9999])
def test_effective_number_against_exact_fractions(beta):
    counts = [1, 2, 3, 10, 57]
    exact = [float((1 - Fraction(beta) ** n) / (1 - Fraction(beta))) for n in counts]
    actual = cb.effective_number(counts, beta, dtype=torch.float64)
    torch.testing.assert_close(actual, torch.tensor(exact, dtype=torch.float64), rtol=1e-13, atol=0)


def test_effective_number_near_one_loses_no_digits():
    beta, n = 1 - 2.0**-50, 1000
    series = n - n * (n - 1) / 2 * 2.0**-50
    actual = cb.effective_number([n], beta, dtype=torch.float64).item()
    assert actual == pytest.approx(series, rel=1e-14)


def test_effective_number_of_an_empty_class_is_zero():
    for beta in (0.0, 0.9, 1.0):
        assert cb.effective_number([0, 1], beta).tolist() == [0.0, 1.0]


def test_beta_zero_weighs_all_classes_equally():
    assert cb.effective_number_weight(CIFAR10_LT_100, 0.0).tolist() == [1.0] * 10


def test_beta_one_is_inverse_frequency():
    torch.testing.assert_close(
        cb.effective_number_weight(CIFAR10_LT_100, 1.0), cb.inverse_frequency_weight(CIFAR10_LT_100)
    )
    nearly = cb.effective_number_weight(CIFAR10_LT_100, 1 - 1e-12, dtype=torch.float64)
    limit = cb.effective_number_weight(CIFAR10_LT_100, 1.0, dtype=torch.float64)
    torch.testing.assert_close(nearly, limit, rtol=1e-8, atol=0)


@given(counts=count_lists, beta=betas)
def test_weights_sum_to_the_number_of_classes_and_favour_rare_ones(counts, beta):
    weight = cb.effective_number_weight(counts, beta, dtype=torch.float64)
    assert weight.sum().item() == pytest.approx(len(counts))
    assert (weight > 0).all()
    by_count = weight[torch.tensor(counts).argsort(stable=True)]
    assert (by_count.diff() <= 1e-12 * by_count[:-1]).all()


@given(counts=count_lists, beta=betas)
def test_effective_number_lies_between_one_and_the_count(counts, beta):
    number = cb.effective_number(counts, beta, dtype=torch.float64)
    assert (number >= 1 - 1e-12).all()
    assert (number <= torch.tensor(counts) * (1 + 1e-12)).all()


@given(counts=count_lists, power=st.floats(0, 40))
def test_inverse_frequency_is_a_power_of_the_count(counts, power):
    weight = cb.inverse_frequency_weight(counts, power, dtype=torch.float64)
    assert weight.sum().item() == pytest.approx(len(counts))
    ratio = [(counts[0] / n) ** power for n in counts]
    torch.testing.assert_close(weight, weight[0] * torch.tensor(ratio, dtype=torch.float64), rtol=1e-9, atol=1e-300)


def test_inverse_square_root():
    assert cb.inverse_frequency_weight([1, 4], 0.5).tolist() == pytest.approx([4 / 3, 2 / 3])


@given(counts=count_lists, tau=st.floats(-3, 3))
def test_logit_adjustment_is_the_scaled_log_prior(counts, tau):
    total = sum(counts)
    expected = torch.tensor([tau * math.log(n / total) for n in counts], dtype=torch.float64)
    actual = cb.logit_adjustment(counts, tau, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@given(counts=count_lists, max_margin=st.floats(0, 10))
def test_ldam_margin_gives_the_rarest_class_the_largest_margin(counts, max_margin):
    margin = cb.ldam_margin(counts, max_margin, dtype=torch.float64)
    rarest = min(counts)
    expected = torch.tensor([max_margin * (rarest / n) ** 0.25 for n in counts], dtype=torch.float64)
    torch.testing.assert_close(margin, expected, rtol=1e-12, atol=0)
    assert margin.max().item() == max_margin


@given(data=st.data(), counts=count_lists)
@pytest.mark.parametrize("name", ALL)
def test_permuting_the_classes_permutes_the_result(name, counts, data):
    order = data.draw(st.permutations(range(len(counts))))
    plain = ALL[name](counts, dtype=torch.float64)
    permuted = ALL[name]([counts[i] for i in order], dtype=torch.float64)
    torch.testing.assert_close(permuted, plain[order], rtol=1e-12, atol=0)


def test_every_way_of_passing_counts_gives_the_same(function):
    expected = function(CIFAR10_LT_100)
    assert expected.dtype == torch.float32
    assert expected.shape == (10,)
    reversed_view = np.array(CIFAR10_LT_100[::-1])[::-1]
    for counts in (
        tuple(CIFAR10_LT_100),
        torch.tensor(CIFAR10_LT_100),
        torch.tensor(CIFAR10_LT_100, dtype=torch.float32, requires_grad=True),
        np.array(CIFAR10_LT_100, dtype=np.uint16),
        reversed_view,
        [np.int64(n) for n in CIFAR10_LT_100],
        [torch.tensor(n) for n in CIFAR10_LT_100],
    ):
        actual = function(counts)
        assert not actual.requires_grad
        assert torch.equal(actual, expected)


def test_result_is_rounded_once_from_float64(function):
    exact = function(CIFAR10_LT_100, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(function(CIFAR10_LT_100, dtype=dtype), exact.to(dtype))


HALF = {"dtype": torch.float16}
DOUBLE = {"dtype": torch.float64}


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: cb.logit_adjustment([1.7e308] * 2, **DOUBLE), [-math.log(2)] * 2),
        (
            lambda: cb.logit_adjustment([1.7e308] * 16 + [5e-324], **DOUBLE)[-1:],
            [math.log(5e-324) - math.log(16) - math.log(1.7e308)],
        ),
        (lambda: cb.effective_number([1e-320] * 16, 1 - 2**-53, **DOUBLE), [1e-320] * 16),
        (lambda: cb.effective_number([1e-10], volume=1e300, **DOUBLE), [1e-10]),
        (lambda: cb.effective_number([1e-100, 1e-300], 0.5, **DOUBLE), [2 * math.log(2) * n for n in (1e-100, 1e-300)]),
        (lambda: cb.effective_number_weight([1e-320], 1 - 2**-53), [1.0]),
        (lambda: cb.effective_number_weight([1e-320] * 2, [1 - 2**-53, 1]), [1.0, 1.0]),
        (lambda: cb.inverse_frequency_weight([1.7e308] * 2), [1.0, 1.0]),
        (lambda: cb.inverse_frequency_weight([2.0**-1074, 2.0**1022], 0.25, **DOUBLE), [2.0, 2.0**-523]),
        (lambda: cb.ldam_margin([2.0**-1074, 2.0**1022], **DOUBLE), [0.5, 2.0**-525]),
        (lambda: cb.logit_adjustment([1, 10**9], **HALF), [-20.71875, 0.0]),
    ],
)
def test_extremes_that_have_an_answer(call, expected):
    actual = call()
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: cb.effective_number([5, 1e308], 1.0),
            r"effective_number of class 1 is 1e\+308, expected .* to 3.4e\+38",
        ),
        (
            lambda: cb.effective_number([7e4], 1.0, **HALF),
            r"class 0 is 7e\+04, expected 6e-08 to 6.6e\+04, which torch.float16",
        ),
        (lambda: cb.effective_number([1e-9], 1.0, **HALF), "effective_number of class 0 is 1e-09, expected"),
        (lambda: cb.effective_number([1000], 1.0, dtype=torch.float8_e4m3fn), r"class 0 is 1e\+03, expected"),
        (
            lambda: cb.effective_number_weight([1, 10**9], 1.0, **HALF),
            "effective_number_weight of class 1 is 2e-09, expected",
        ),
        (lambda: cb.effective_number_weight([1] + [10**9] * 70_000, 1.0, **HALF), r"class 0 is 7e\+04"),
        (lambda: cb.inverse_frequency_weight([0, 1, 10**9], 1.0, "zero", **HALF), "weight of class 2 is 2e-09"),
        (lambda: cb.inverse_frequency_weight([1, 2], 1e308, **DOUBLE), "class 1 is 0, expected 4.9e-324 to .*float64"),
        (
            lambda: cb.logit_adjustment([1, 2], 1e5, **HALF),
            r"logit_adjustment of class 0 is -1.1e\+05, expected at most 6.6e\+04",
        ),
        (lambda: cb.logit_adjustment([1e-300, 1], 1e306, **DOUBLE), "class 0 is -inf, expected at most 1.8e"),
        (lambda: cb.ldam_margin([1, 2], 1e300), r"ldam_margin of class 0 is 1e\+300, expected at most 3.4e\+38"),
        (lambda: cb.class_counts([0], 10**400), "num_classes is an int of 1329 bits, expected at most"),
    ],
)
def test_extremes_that_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
def test_result_is_on_the_device_of_the_counts(function):
    assert function(torch.tensor(CIFAR10_LT_100, device="cuda")).is_cuda


@pytest.mark.parametrize("name", FROM_COUNTS)
def test_empty_class_is_an_error_that_names_the_choices(name):
    with pytest.raises(ValueError, match=r'is 0 for class 1, 3; .*empty="clamp"') as error:
        FROM_COUNTS[name]([5, 0, 2, 0])
    assert ('empty="zero"' in str(error.value)) == (name in WITH_ZERO)


def test_many_empty_classes_make_a_short_message():
    with pytest.raises(ValueError, match=r"class 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.;"):
        cb.effective_number_weight([0] * 500 + [1], 0.9)


@pytest.mark.parametrize("name", WITH_ZERO)
def test_empty_zero_computes_the_others_as_if_alone(name):
    actual = FROM_COUNTS[name]([5, 0, 2, 0], empty="zero")
    alone = FROM_COUNTS[name]([5, 2])
    assert actual[[1, 3]].tolist() == [0.0, 0.0]
    assert torch.equal(actual[[0, 2]], alone)


@pytest.mark.parametrize("name", FROM_COUNTS)
def test_empty_clamp_counts_the_class_as_one(name):
    actual = FROM_COUNTS[name]([5, 0, 2, 0], empty="clamp")
    assert torch.equal(actual, FROM_COUNTS[name]([5, 1, 2, 1]))


@pytest.mark.parametrize("name", FROM_COUNTS)
@pytest.mark.parametrize("empty", ["error", "clamp"])
def test_empty_choice_changes_nothing_without_empty_classes(name, empty):
    assert torch.equal(FROM_COUNTS[name]([5, 2], empty=empty), FROM_COUNTS[name]([5, 2]))


@pytest.mark.parametrize("name", WITH_ZERO)
def test_nothing_but_empty_classes(name):
    with pytest.raises(ValueError, match=r"is 0 for every class"):
        FROM_COUNTS[name]([0, 0], empty="zero")


@pytest.mark.parametrize("name", FROM_COUNTS)
def test_unknown_empty_choice(name):
    with pytest.raises(ValueError, match="empty is 'ignore', expected one of 'error', "):
        FROM_COUNTS[name]([1, 2], empty="ignore")


def test_logit_adjustment_refuses_zero_for_an_empty_class():
    with pytest.raises(ValueError, match=r"empty is 'zero', expected one of 'error', 'clamp'$"):
        cb.logit_adjustment([1, 0], empty="zero")


@pytest.mark.parametrize(
    ("counts", "exception", "message"),
    [
        ([], ValueError, r" has shape \[0\], expected \[C\] with C >= 1"),
        ([[1, 2], [3, 4]], ValueError, r"\[0\] is a list, expected one number per class"),
        (torch.ones(2, 3), ValueError, r" has shape \[2, 3\], expected \[C\]"),
        (torch.tensor(3), ValueError, r" has shape \[\], expected \[C\]"),
        ([3, -1], ValueError, r"\[1\] is -1, expected a finite count >= 0"),
        ([3, math.nan], ValueError, r"\[1\] is nan, expected a finite count"),
        (torch.tensor([math.inf, 1]), ValueError, r"\[0\] is inf, expected a finite count"),
        ([1, -(10**5000)], ValueError, r"\[1\] is -inf, expected a finite count"),
        ([Fraction(10**400), 1], ValueError, r"\[0\] is inf, expected a finite count"),
        ([torch.ones(2), 1], TypeError, r"\[0\] is tensor\(\[1\., 1\.\]\), expected a real number"),
        (torch.ones(2).to_sparse(), TypeError, r" has layout torch\.sparse_coo, expected torch\.strided"),
        ([1, 10**400], ValueError, r"\[1\] is inf, expected a finite count"),
        (7, TypeError, " is a int, expected a tensor, sequence or array"),
        (np.float64(7), TypeError, " is a float64, expected a tensor, sequence or array"),
        ("123", TypeError, " is a str, expected"),
        ({0: 5, 1: 2}, TypeError, " is a dict, expected"),
        (None, TypeError, " is a NoneType, expected"),
        (["5", "2"], TypeError, r"\[0\] is '5', expected a real number"),
        ([5, None], TypeError, r"\[1\] is None, expected a real number"),
        ([2, 1j], TypeError, r"\[1\] is 1j, expected a real number"),
        ([True, False], TypeError, r"\[0\] is True, expected a real number"),
        (np.array([True, False]), TypeError, r"\[0\] is True, expected a real number"),
        (torch.tensor([True]), TypeError, r" has dtype torch\.bool, expected real numbers"),
        (torch.tensor([1j]), TypeError, r" has dtype torch\.complex64, expected real numbers"),
    ],
)
def test_wrong_counts(function, counts, exception, message):
    with pytest.raises(exception, match=f"^samples_per_class{message}"):
        function(counts)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, "float32", None])
def test_wrong_dtype(function, dtype):
    with pytest.raises(TypeError, match=r"dtype is .*, expected a floating-point torch\.dtype"):
        function([1, 2], dtype=dtype)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda value: cb.effective_number([1, 2], value), "beta"),
        (lambda value: cb.effective_number_weight([1, 2], value), "beta"),
        (lambda value: cb.inverse_frequency_weight([1, 2], value), "power"),
        (lambda value: cb.positive_weight([1, 2], 9, value), "power"),
        (lambda value: cb.logit_adjustment([1, 2], value), "tau"),
        (lambda value: cb.ldam_margin([1, 2], value), "max_margin"),
        (lambda value: cb.cdt_scale([1, 2], value), "gamma"),
        (lambda value: cb.vector_scaling([1, 2], value), "gamma"),
        (lambda value: cb.vector_scaling([1, 2], 0.1, value), "tau"),
        (lambda value: cb.immax_scale([1, 2], value), "margin"),
        (lambda value: cb.immax_scale([1, 2], 1.0, value), "power"),
        (lambda value: cb.seesaw_mitigation([1, 2], value), "p"),
    ],
)
def test_wrong_options(call, name):
    for value in (math.nan, math.inf, -math.inf, 10**400, -(10**5000), Fraction(10**400)):
        with pytest.raises(ValueError, match=rf"{name} is (nan|-?inf), expected a finite number"):
            call(value)
    for value in (True,) if name == "beta" else ("1", None, True, [0.5]):  # beta: test_effective_number
        with pytest.raises(TypeError, match=f"{name} is a {type(value).__name__}, expected a number"):
            call(value)
    if name != "tau":
        with pytest.raises(ValueError, match=f"{name} is -0.5, expected a finite number in "):
            call(-0.5)
    if name == "beta":
        with pytest.raises(ValueError, match=r"beta is 1\.5, expected a finite number in "):
            call(1.5)
