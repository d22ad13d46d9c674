"""Promise: every code block of README and docs runs as it stands, and prints what its page says."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from documents import PAGES, ROOT, blocks, name_of
from longtail.__main__ import make_parser
from ranks import free_port

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
WITH_CODE = [page for page in PAGES if any(b.language == "python" and not b.ranks for b in blocks(page))]
FOR_RANKS = [(page, block) for page in PAGES for block in blocks(page) if block.ranks]
RUN_ALL = """
import os, runpy, sys
for port, path in zip(sys.argv[1::2], sys.argv[2::2]):
    os.environ["MASTER_PORT"] = port
    runpy.run_path(path, run_name="__main__")
"""
COMMANDS = [line for page in PAGES for b in blocks(page) if b.language == "sh" for line in b.text.splitlines()]


def check_printed(stated: str, printed: str) -> None:
    """Words are the same; the rounding of a processor may move numbers a little."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", stated).split()
    got, want = ([float(x) for x in NUMBER.findall(text)] for text in (printed, stated))
    assert got == pytest.approx(want, rel=0.05, abs=0.03)


def run_page(page: Path) -> dict[str, Any]:
    """Runs the blocks of a page one after the other in one namespace; what it ends with."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page):
        if block.language == "python" and not block.ranks:
            code = ast.increment_lineno(ast.parse(block.text), block.line - 1)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, str(page), "exec"), names)
            printed = out.getvalue()
        elif block.language == "text" and printed:
            check_printed(block.text, printed)
            printed = ""
    return names


@pytest.mark.parametrize("page", WITH_CODE, ids=map(name_of, WITH_CODE))
def test_every_block_runs_and_prints_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for data this small, beside other tests
    try:
        run_page(page)
    finally:
        torch.set_num_threads(threads)


def test_every_block_for_ranks_runs(tmp_path: Path) -> None:
    """One after the other in the same two processes, which take the time to start; each with a store of its own."""
    (tmp_path / "run_all").write_text(RUN_ALL)
    arguments = []
    for page, block in FOR_RANKS:
        assert block.ranks == 2
        script = tmp_path / f"{page.stem}_{block.line}.py"
        script.write_text(block.text)
        arguments += [str(free_port()), str(script)]
    started = []
    for rank in "01":
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}  # as of torchrun
        environment = {**os.environ, **world, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(tmp_path / "run_all"), *arguments]
        started.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)


@pytest.mark.parametrize("page", PAGES, ids=map(name_of, PAGES))
def test_blocks_are_of_a_kind_that_is_tested(page: Path) -> None:
    fences = re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(blocks(page)), "a fence that is none of a block"
    assert not re.search("^%", page.read_text(encoding="utf-8"), re.MULTILINE), "Sphinx takes the line for a comment"
    for block in blocks(page):
        assert block.language in ("python", "sh", "text") or block.language.startswith("{"), f"line {block.line}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one(command: str) -> None:
    words = shlex.split(command, comments=True)
    while words and "=" in words[0]:
        words.pop(0)  # environment variables
    if words[:3] == ["python", "-m", "longtail"]:
        words = ["longtail", *words[3:]]
    if words[0] == "make":
        assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in words[1:] if "=" not in target)
    elif words[0] == "longtail":
        options = [str(ROOT) if word == "FOLDER" else word for word in words[1:]]
        make_parser().parse_args(options)
    elif words[:2] == ["pip", "install"]:
        pyproject = (ROOT / "pyproject.toml").read_text()
        for extra in re.findall(r"\.\[([\w,-]+)\]", command):
            assert all(f"\n{name} = [" in pyproject for name in extra.split(","))
        assert "[" not in command.replace('".[', ""), "zsh reads unquoted brackets as a pattern"
    elif words[:3] == ["python", "-m", "bench"]:
        pass  # every text's are parsed in test_bench_commands.py
    elif words[0] in ("python", "torchrun"):
        (script,) = (word for word in words if word.endswith(".py"))
        assert (ROOT / script).is_file()
    else:
        pytest.fail(f"what is {words[0]!r}?")


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).is_file()] == []
