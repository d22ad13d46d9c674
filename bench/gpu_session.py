"""All that a GPU machine is needed for.

Alone: every step, without limits. For a GPU machine without a network, for a short time: --prepare gathers what the
steps need into a folder, on any machine with nvcc; there ``sh run.sh --first --out FOLDER`` in that folder takes 400
seconds at most, and ``--second``, after what the first showed was mended, 250. A step that fails or is cut off ends no
run. The results are at most 8 files; the table of the steps, printed last, is one of them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch

from longtail.experiments.command_line import Parser

from . import gpu_prepare
from .gpu_steps import LIMITS, RUNS, TABLE, Step, rehearsal

ROOT = Path(__file__).resolve().parent.parent
GRACE = 8.0
"""Seconds from asking a step to end, so that it says how far it came, to ending it."""

LEAST = 5.0
"""Seconds without which no step is begun."""

LARGEST = 1 << 20
"""Bytes of a step's output that are kept: its end."""

TAIL = 10
"""Lines of it that are shown where the step fails."""


class Done(NamedTuple):
    """What became of a step: ``status`` is None if it was left out, 124 if it was cut off."""

    step: Step
    status: int | None
    seconds: float
    result: str


class Running(NamedTuple):
    """A step's process, which leads a process group of its own."""

    step: Step
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float
    deadline: float


def command_of(step: Step, out: Path, rehearse: bool) -> tuple[list[str], str]:
    """A step's command as it is run here; without one, why."""
    words = rehearsal(step) if rehearse else step.words
    if words is None:
        return [], "left out: only the GPU machine can tell"
    if step.needs and not (ROOT / step.needs).exists():
        return [], f"left out: no {step.needs}"
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    known = {"python": sys.executable}
    for tool in {"compute-sanitizer", "ncu", "nvidia-smi"}.intersection(words):
        found = shutil.which(tool) or shutil.which(f"{home}/bin/{tool}")
        if found is None:
            return [], f"left out: {tool} is not on the PATH nor in {home}/bin"
        known[tool] = found
    site = os.environ.get("LONGTAIL_SITE", "")
    return [known.get(word, word).replace("{out}", str(out)).replace("{site}", site) for word in words], ""


def _start(step: Step, command: list[str], seconds: float, rehearse: bool) -> Running:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    if rehearse:
        environment.pop("LONGTAIL_BACKEND", None)
    began = time.monotonic()
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the step is done
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return Running(step, process, log, began, began + seconds)


def _end(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _watch(running: Sequence[Running]) -> dict[str, tuple[int, float]]:
    """Exit status and seconds of each; after its deadline a step is interrupted, killed, left; its status is 124."""
    ended: dict[str, tuple[int, float]] = {}
    interrupted: set[str] = set()
    while len(ended) < len(running):
        for step, process, _, began, deadline in running:
            late = time.monotonic() - deadline
            if step.name in ended:
                continue
            status = process.poll()
            if status is not None:
                ended[step.name] = 124 if step.name in interrupted else status, time.monotonic() - began
                _end(process, signal.SIGKILL)  # what it may have left behind
            elif late > 2 * GRACE:  # a driver that hangs keeps what was killed: the other steps do not wait for it
                ended[step.name] = 124, time.monotonic() - began
            elif late > GRACE:
                _end(process, signal.SIGKILL)
            elif late > 0 and step.name not in interrupted:
                interrupted.add(step.name)
                _end(process, signal.SIGINT)
        time.sleep(0.05)
    return ended


def _keep(running: Running, out: Path, status: int, seconds: float) -> str:
    """Adds what a step printed to its file, and shows the end of a failure; returns its last line."""
    running.log.seek(max(0, running.log.seek(0, os.SEEK_END) - LARGEST))
    text = running.log.read().decode("utf-8", "replace")
    running.log.close()
    with (out / running.step.file).open("a", encoding="utf-8") as file:
        words = subprocess.list2cmdline([str(word) for word in running.process.args])  # type: ignore[union-attr]
        file.write(f"=== {running.step.name}: {words}\n{text.rstrip()}\n")
        file.write(f"=== {running.step.name}: exit status {status} after {seconds:.0f} s\n\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    print("\n".join([*(lines[-TAIL:] if status else ()), f"{running.step.name}: exit status {status}"]), flush=True)
    return lines[-1] if lines else ""


def run_together(steps: Sequence[Step], out: Path, left: float, rehearse: bool) -> list[Done]:
    """Runs steps side by side, each within its seconds and those that are ``left``."""
    done: list[Done] = []
    running: list[Running] = []
    for step in steps:
        command, reason = command_of(step, out, rehearse)
        if command and left - GRACE < LEAST:
            reason = "left out: no time left"
        if reason:
            done.append(Done(step, None, 0.0, reason))
        else:
            running.append(_start(step, command, min(step.seconds, left - GRACE), rehearse))
    try:
        ended = _watch(running)
    except BaseException:  # such as Ctrl-C, which reaches no other process group
        for one in running:
            _end(one.process, signal.SIGKILL)
        raise
    for one in running:
        status, seconds = ended[one.step.name]
        done.append(Done(one.step, status, seconds, _keep(one, out, status, seconds)))
    return done


def run_steps(
    steps: Sequence[Step], out: Path, *, limit: float | None, began: float, rehearse: bool = False
) -> list[Done]:
    """Runs the steps one after another, those of a group side by side, within ``limit`` seconds of ``began``."""
    out.mkdir(parents=True, exist_ok=True)
    for name in {step.file for step in steps}:
        (out / name).unlink(missing_ok=True)
    done = []
    for _, group in itertools.groupby(enumerate(steps), lambda x: x[1].group or x[0]):
        left = float("inf") if limit is None else began + limit - time.time()
        done += run_together([step for _, step in group], out, left, rehearse)
    return done


def table(done: Sequence[Done], installed: float | None = None) -> str:
    """Step, exit status, seconds, result: one line each."""
    lines = [("step", "status", "seconds", "result")]
    if installed is not None:
        lines.append(("install", "0", f"{installed:.0f}", ""))
    for step, status, seconds, result in done:
        lines.append((step.name, "" if status is None else str(status), f"{seconds:.0f}", result[:100]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = "{:<{}}  {:>{}}  {:>{}}  {}"
    return "\n".join(cells.format(a, widths[0], b, widths[1], c, widths[2], d).rstrip() for a, b, c, d in lines) + "\n"


def add_options(parser: Parser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--prepare", type=Path, metavar="FOLDER", help="gather what a GPU machine without a network needs"
    )
    what.add_argument("--first", action="store_true", help="smoke, tests, times, ncu")
    what.add_argument("--second", action="store_true", help="what failed, compute-sanitizer, compiled, large, QuACK")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "gpu-session", metavar="FOLDER", help="the results"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="only what a machine without a GPU can tell of the steps"
    )
    parser.add_argument("--began", type=float, metavar="SECONDS", help="the time at which run.sh began to install")
    preparing = parser.add_argument_group("for --prepare")
    preparing.add_argument("--no-quack", action="store_true", help="leave QuACK out, which is most of the folder")
    preparing.add_argument("--old", type=Path, metavar="WHEEL", help="whose kernels are timed beside the new ones")
    preparing.add_argument("--failed", type=Path, metavar="FILE", help="tests.txt of the first run, to run what failed")


def run(arguments: argparse.Namespace, parser: Parser) -> None:
    if arguments.prepare is not None:
        try:
            gpu_prepare.prepare(arguments.prepare, arguments.old, arguments.failed, quack=not arguments.no_quack)
        except gpu_prepare.CannotPrepare as error:
            parser.exit(1, f"{parser.prog}: {error}\n")
        return
    if not torch.cuda.is_available() and not arguments.rehearse:
        parser.exit(1, f"{parser.prog}: no CUDA device\n")
    name = "first" if arguments.first else "second" if arguments.second else "all"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without the steps
    now = time.time()
    installed = None if arguments.began is None else now - arguments.began
    limit = None if arguments.rehearse else LIMITS[name]
    out = arguments.out.resolve()
    done = run_steps(RUNS[name], out, limit=limit, began=now - (installed or 0.0), rehearse=arguments.rehearse)
    text = table(done, installed)
    (out / TABLE).write_text(text, encoding="utf-8")
    print(text, end="", flush=True)
    parser.exit(1 if any(status for _, status, *_ in done) else 0)
