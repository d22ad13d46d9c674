"""One wheel beside several torch and Python: ``python tests/matrix.py FOLDER TORCH:INTERPRETER ... -- TEST FILE ...``.

FOLDER holds the wheel; the environments are made there, one at a time, and deleted. What became of each is a row of
the table in FOLDER/table.md.
"""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The interpreter of Triton 3.6, which torch 2.10 brings, fails with numpy 2.4.
PACKAGES = ("hypothesis", "numpy<2.4", "pytest", "pytest-benchmark", "pytest-xdist")
SELECTED = ("-n", "auto", "--no-loadscope-reorder", "-m", "not gpu", "-k", "not emulated")
HEADER = "| torch | Python | passed | failed | skipped | date | commit |\n| --- | --- | --- | --- | --- | --- | --- |\n"


def output(*command: str | Path) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def install(folder: Path, interpreter: str, torch: str, wheel: Path) -> Path:
    """The Python of a new environment with the wheel beside that torch."""
    subprocess.run([interpreter, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    packages = (f"torch=={torch}", str(wheel), *PACKAGES)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *packages], check=True)
    return python


def tested(python: Path, files: list[str]) -> tuple[str, bool]:
    """A row of the table, and whether all tests passed."""
    versions = (
        "import longtail, platform, torch; print(longtail.__file__, torch.__version__, platform.python_version())"
    )
    place, torch, version = output(python, "-c", versions).split()
    if not Path(place).is_relative_to(python.parent.parent):
        raise SystemExit(f"longtail is imported from {place}, expected the wheel's")
    process = subprocess.Popen([python, "-m", "pytest", "-q", *SELECTED, *files], cwd=ROOT, stdout=-1, text=True)
    assert process.stdout is not None
    last = ""
    for last in process.stdout:
        print(last, end="", flush=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    date, commit = datetime.date.today(), output("git", "describe", "--always", "--dirty")
    status = process.wait()
    ended = failed or (f"ended with {status}" if status else 0)  # killed: there are no counts
    row = (torch, version, counts.get("passed", 0), ended, counts.get("skipped", 0), date, commit)
    return "| " + " | ".join(map(str, row)) + " |\n", status == 0


def main() -> None:
    split = sys.argv.index("--")
    folder, pairs, files = Path(sys.argv[1]).resolve(), sys.argv[2:split], sys.argv[split + 1 :]
    (wheel,) = folder.glob("*.whl")
    table, bad = folder / "table.md", []
    table.write_text(HEADER)
    for pair in pairs:
        torch, _, interpreter = pair.partition(":")
        environment = folder / f"torch-{torch}-{Path(interpreter).name}"
        print(f"torch {torch}, {interpreter}", flush=True)
        try:
            row, passed = tested(install(environment, interpreter, torch, wheel), files)
        except (OSError, subprocess.CalledProcessError) as error:  # no such interpreter, no such torch for it
            row, passed = f"| {torch} | {interpreter} | {error} | | | | |\n", False
        finally:
            shutil.rmtree(environment, ignore_errors=True)
        bad += [] if passed else [pair]
        with table.open("a") as file:
            file.write(row)
    print(table.read_text())
    sys.exit(f"not passed: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
