"""Files of the commands: read whole or not at all, written whole or not at all, and named where something is wrong."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

MAX_BYTES = 2**30
"""Of a file that is read; those of the experiments are far smaller."""


def one_line(text: object, most: int = 2000) -> str:
    """A text that may come from a file, as one line that a terminal shows: nothing in it moves the cursor."""
    line = " ".join(part.strip() for part in str(text).splitlines())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[: most + 1])
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def brief(value: object) -> str:
    """A value that comes from a file: a number or a short text as it is, of anything else the type."""
    if isinstance(value, int) and value.bit_length() > 100:
        return "an integer of more than 100 bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, (str, bytes)):
        return one_line(repr(value[:100]), 100)
    return f"a {type(value).__name__}"


def read_whole(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: it is a folder or a device, or longer than ``MAX_BYTES``.
        OSError: it cannot be read.
    """
    try:
        if not path.is_file():
            raise ValueError(f"{str(path)!r} is not a file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"{str(path)!r} has {size} bytes, expected at most {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise OSError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Writes beside the place, then moves it there: whoever is stopped leaves the old file or the new one.

    Raises:
        OSError: it cannot be written.
    """
    place, partial = _places(path)
    try:
        partial.unlink(missing_ok=True)  # of a process that was killed; a link there is not followed
        with partial.open("xb") as file:
            file.write(content)
        os.replace(partial, place)
    except OSError as error:
        raise OSError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # nothing to take away where all went well
            partial.unlink()


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Writes a CSV with a line of column names. Raises as :func:`write_whole`."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, file.getvalue().encode())


def check_writable(path: Path) -> None:
    """Raises ValueError where :func:`write_whole` would fail for another reason than a full disk."""
    place, partial = _places(path)
    if not os.path.isdir(place.parent):
        raise ValueError(f"the folder {str(path.parent)!r} does not exist")
    for taken in (place, partial):
        try:
            there, folder = taken.exists(), taken.is_dir()
        except OSError as error:  # such as a name that is too long
            raise ValueError(f"{str(path)!r} cannot be written to: {error.strerror or error}") from error
        if folder:
            raise ValueError(f"{str(path.with_name(taken.name))!r} is a folder, expected a place for a file")
        if there and not taken.is_file():  # a device would be replaced by a file
            raise ValueError(f"{str(path)!r} is not a file")
    # Moving a file to a place asks its folder alone: one that is protected would be gone.
    if not os.access(place.parent, os.W_OK | os.X_OK) or (place.exists() and not os.access(place, os.W_OK)):
        raise ValueError(f"{str(path)!r} cannot be written to")


def check_folder(path: Path) -> None:
    """Raises ValueError where :func:`make_folder` would fail for another reason than a full disk."""
    nearest = next(above for above in (path, *path.parents) if above == above.parent or os.path.lexists(above))
    if not os.path.isdir(nearest):
        raise ValueError(f"{str(nearest)!r} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"the folder {str(nearest)!r} cannot be written to")


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, unless it is there.

    Raises:
        OSError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"the folder {str(path)!r} cannot be made: {error.strerror or error}") from error


def _places(path: Path) -> tuple[Path, Path]:
    """Where a file is, or what it links to, and where it is written before."""
    place = Path(os.path.realpath(path))
    return place, place.with_name(f"{place.name}.partial")
