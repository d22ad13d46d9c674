"""``python -m bench SECTION``: compares, times, and writes CSV and pictures; alone it says what sections there are."""

from __future__ import annotations

import importlib
import sys
from typing import Any, NamedTuple

from longtail.experiments.command_line import Parser


class Section(NamedTuple):
    """A section's module, which has ``add_options`` and ``run``, and what it measures."""

    module: str
    what: str


SECTIONS = {
    "all": Section("every", "cpu to gpu of this list, one after another: what make bench runs"),
    "cpu": Section("losses", "softmax losses over (N, C) logits, beside eager PyTorch and torch.compile"),
    "statistics": Section("losses", "log-probability and entropy of each row, with gradients, likewise"),
    "tail": Section("losses", "losses for long tails and trees: vector scaling, IMMAX, Seesaw, hierarchical; likewise"),
    "sigmoid": Section("losses", "sigmoid focal losses, likewise"),
    "multi_label": Section(
        "losses", "losses of several labels a row: sigmoid focal, asymmetric, distribution-balanced"
    ),
    "soft": Section("losses", "cross-entropy with class probabilities, likewise"),
    "images": Section("losses", "a softmax loss over images, (N, C, H, W), likewise"),
    "few": Section("losses", "softmax losses over rows and images of few classes, contiguous and channels-last"),
    "linear": Section("linear", "the fused linear loss beside three bare matrix products and torch's own"),
    "step": Section("step", "a training step of a small language model with a large vocabulary"),
    "parallel": Section("parallel", "vocabulary-parallel cross-entropy on gloo ranks, beside torch's loss_parallel"),
    "overhead": Section("losses", "calls of functions and modules on few logits, beside torch's"),
    "threads": Section("losses", "a softmax loss by one thread to all; fewer rows than threads too"),
    "growth": Section("growth", "time per element of a softmax loss from 10^4 to 2^33 logits"),
    "pages": Section("pages", "what the fresh pages of a gradient cost, and what helps"),
    "gpu": Section("losses", "losses over logits and images on a GPU, beside torch.compile, Liger and QuACK"),
    "memory": Section("losses", "peak memory of the losses of cpu, without times"),
    "goals": Section("judged", "no times: every goal that the rows of bench/results allow to be judged"),
    "plot": Section("plot", "no times: draws the pictures of the rows in bench/results again"),
    "prediction": Section("prediction", "on paper: vocabulary-parallel cross-entropy at 8 to 512 ranks"),
    "kernels": Section("kernels", "the CUDA operators alone, beside those of another build"),
    "smoke": Section("smoke", "no times: all families in every gradient mode on a GPU, compared with the CPU"),
    "gpu-session": Section("gpu_session", "all that needs a GPU: tests, compute-sanitizer, timings"),
}


def make_parser() -> Parser:
    """What takes a section's name; the options after it are left to a parser of the section."""
    parser = Parser(
        prog="bench",
        description="Times longtail against PyTorch, after comparing the results. Writes into bench/results.",
        epilog="python -m bench SECTION --help shows the options of a section.",
    )
    sections = parser.add_subparsers(dest="section", title="sections", metavar="SECTION")
    for name, section in SECTIONS.items():
        sections.add_parser(name, help=section.what, add_help=False)
    return parser


def section_parser(name: str) -> tuple[Parser, Any]:
    """A section's parser and module. Only the chosen module is imported: others could slow down what is timed."""
    section = SECTIONS[name]
    module = importlib.import_module(f".{section.module}", __package__)
    details = (module.__doc__ or "").partition("\n\n")[2]
    parser = Parser(prog=f"bench {name}", description=f"{name}: {section.what}.", epilog=details)
    parser.set_defaults(section=name)
    module.add_options(parser)
    return parser, module


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    if not words:
        parser.print_help()
        return
    section = parser.parse_known_args(words[:1])[0].section
    if section is None:
        parser.error(f"{words[0]} needs a section before it: {', '.join(SECTIONS)}")
    parser, module = section_parser(section)
    module.run(parser.parse_args(words[1:]), parser)


if __name__ == "__main__":
    main()
