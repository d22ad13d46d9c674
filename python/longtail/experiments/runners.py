"""What runs with the options of each experiment: the rows of a run, and the module that reports them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ..class_balance import class_counts
from ..files import one_line
from .cifar import METHODS
from .output import Row

Finished: TypeAlias = "tuple[list[Row], Any]"
"""The rows of a run, and the module that reports them."""


def run_digits(arguments: argparse.Namespace) -> Finished:
    from . import digits, digits_report
    from .output import progress_bar

    plan = digits.Plan(**_chosen(arguments, ("seeds", "epochs", "jobs"), {"seeds": 2, "epochs": 2}))
    factors = tuple(dict.fromkeys(arguments.imbalance_factor or ((50.0,) if arguments.quick else ())))
    if factors:
        plan = plan._replace(imbalance_factors=factors)
    digits.check(plan)
    with progress_bar(len(plan.tasks())) as advance:
        rows = digits.summarize(plan, digits.run(plan, advance))
    return rows, digits_report


def run_tokens(arguments: argparse.Namespace) -> Finished:
    from . import tokens, tokens_data, tokens_model, tokens_report
    from .output import progress_bar

    plan = {"steps": 500, "vocabulary": 32768}
    plan |= _chosen(arguments, ("steps", "vocabulary"), {"steps": 4, "vocabulary": 1024})
    steps, folder = plan["steps"], tokens_data.standard_library()
    corpus = tokens_data.load_corpus(plan["vocabulary"], folder, every=20 if arguments.quick else 1)
    models = len(tokens_model.cross_entropies()) + len(
        tokens_model.variants(class_counts(corpus.train, len(corpus.vocabulary)))
    )
    sequences = 32 if arguments.quick else tokens.HELD_OUT_SEQUENCES
    with progress_bar(models * steps) as advance:
        rows = tokens.run(corpus, steps, arguments.seed, advance, sequences)
    return rows, tokens_report


def run_cifar(arguments: argparse.Namespace) -> Finished:
    from . import cifar, cifar_data, cifar_report
    from .output import progress_bar

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    plan = cifar.Plan(arguments.dataset, arguments.imbalance_factor, arguments.epochs, arguments.seed, device)
    images = cifar_data.load_images(arguments.data, plan.dataset)
    if images.incomplete:
        print(one_line(f"note: not the published files: {images.incomplete}"), file=sys.stderr)
    names = list(dict.fromkeys(arguments.loss or METHODS))
    cifar.check(plan, names, images, arguments.output)
    with progress_bar(len(names) * plan.epochs) as advance:
        rows = [cifar.row_of(cifar.train(plan, name, images, arguments.output, advance)) for name in names]
    return rows, cifar_report


def run_texts(arguments: argparse.Namespace) -> Finished:
    """One of the experiments on texts."""
    from .output import progress_bar
    from .texts import report, run

    options = _chosen(arguments, ("seeds", "epochs", "jobs"), {})
    plan = run.make_plan(arguments.experiment, **options, quick=arguments.quick, file=getattr(arguments, "data", None))
    with progress_bar(len(plan.tasks())) as advance:
        rows = run.summarize(plan, run.run(plan, advance))
    return rows, report


def run_growth(arguments: argparse.Namespace) -> Finished:
    from .output import progress_bar
    from .texts import growth, growth_report

    plan = growth.make_plan(**_chosen(arguments, ("seeds", "epochs", "jobs"), {}), quick=arguments.quick)
    with progress_bar(plan.units()) as advance:
        rows = growth.run(plan, advance)
    return rows, growth_report


def _chosen(arguments: argparse.Namespace, names: tuple[str, ...], quick: dict[str, int]) -> dict[str, Any]:
    """The options that were given, and under ``--quick`` the small values of the others."""
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return {**quick, **given} if arguments.quick else given


def report_of(experiment: str) -> Any:
    """The module that reports an experiment; ValueError for an unknown one."""
    from . import cifar_report, digits_report, tokens_report
    from .texts import growth_report, report

    reports = {"digits": digits_report, "tokens": tokens_report, "cifar": cifar_report, **dict.fromkeys(TEXTS, report)}
    reports["growth"] = growth_report
    if experiment not in reports:
        raise ValueError(f"{experiment!r} is no experiment, expected one of {', '.join(reports)}")
    return reports[experiment]


TEXTS = ("icd", "debtags", "places")
"""The experiments on texts."""

RUNNERS: dict[str, Callable[[argparse.Namespace], Finished]] = {
    "digits": run_digits,
    "tokens": run_tokens,
    "cifar": run_cifar,
    **dict.fromkeys(TEXTS, run_texts),
    "growth": run_growth,
}
