"""Text with a natural Zipf tail: Python's own standard library, cut into words, numbers, punctuation and indents."""

from __future__ import annotations

import collections
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..files import read_whole

UNKNOWN = "<unknown>"
UNKNOWN_ID = 0
HELD_OUT_EVERY = 10
# Tests repeat themselves, and the tables of the encodings are data, not text; installed packages differ by machine.
LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"})

# A line break with the indent after it, a gap of several spaces, a word, a number, a run of one punctuation mark.
_TOKEN = re.compile(r"\n[ \t]*|[^\S\n]{2,}|[^\W\d]\w*|\d+|([^\w\s])\1*|[^\S\n ]")


class Corpus(NamedTuple):
    """Token ids, int64 [N]; id ``UNKNOWN_ID`` is every token that is not in the vocabulary."""

    vocabulary: list[str]  # most frequent first, after UNKNOWN
    train: Tensor
    held_out: Tensor
    train_files: int
    held_out_files: int
    digest: str  # of all the text, names included

    def coverage(self, tokens: Tensor) -> float:
        """Share of the tokens that the vocabulary knows."""
        return (tokens != UNKNOWN_ID).double().mean().item()


def tokenize(text: str) -> list[str]:
    """Tokens of a text. A single space between two tokens is left out; nothing else is.

    >>> tokenize("def f(x):\\n    return x == 10")
    ['def', 'f', '(', 'x', ')', ':', '\\n    ', 'return', 'x', '==', '10']
    """
    return [match.group() for match in _TOKEN.finditer(text)]


def build_vocabulary(tokens: Iterable[str], size: int) -> list[str]:
    """``UNKNOWN`` and the ``size - 1`` most frequent tokens, most frequent first, equal counts in the order of text.

    Raises:
        ValueError: ``size`` leaves no room for a token, or there are fewer different ones.
    """
    if size < 2:
        raise ValueError(f"the vocabulary has {size} entries, expected at least 2: one is for unknown tokens")
    counts = collections.Counter(tokens)
    if len(counts) < size - 1:
        raise ValueError(
            f"the text has {len(counts)} different tokens, expected at least {size - 1} for the vocabulary"
        )
    ordered = sorted(counts, key=lambda token: (-counts[token], token))
    return [UNKNOWN, *ordered[: size - 1]]


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def source_files(folder: Path) -> list[Path]:
    """The Python files under a folder that belong to the corpus, in a fixed order.

    Raises:
        ValueError: there are none (some systems ship the library compiled).
    """
    every = (path for path in folder.rglob("*.py") if not LEFT_OUT & {*path.relative_to(folder).parts})
    found = [path for path in every if path.is_file()]
    if not found:
        raise ValueError(f"no Python sources under {str(folder)!r}, expected those of the standard library")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def load_corpus(vocabulary_size: int, folder: Path, every: int = 1) -> Corpus:
    """Reads, splits and numbers the text; the same folder gives the same corpus.

    Whole files are held out, chosen by a hash of their names: one in ``HELD_OUT_EVERY``. The vocabulary is that of the
    training files alone.

    Args:
        vocabulary_size: entries, ``UNKNOWN`` among them.
        folder: whose files are read, such as :func:`standard_library`.
        every: takes only each so many-th file, for quick runs.

    Raises:
        ValueError: the text or the vocabulary is too small.
        OSError: a file cannot be read.
    """
    texts: dict[bool, list[list[str]]] = {False: [], True: []}
    digest = hashlib.sha256()
    for path in source_files(folder)[::every]:
        name, content = path.relative_to(folder).as_posix().encode(), read_whole(path)
        digest.update(name + b"\0" + content + b"\0")
        tokens = tokenize(content.decode("utf-8", "replace").replace("\r\n", "\n"))
        texts[hashlib.sha256(name).digest()[0] % HELD_OUT_EVERY == 0].append(tokens)
    if not all(texts.values()):
        raise ValueError(f"the files under {str(folder)!r} are too few to hold some out")
    train, held_out = ([token for tokens in texts[part] for token in tokens] for part in (False, True))
    vocabulary = build_vocabulary(train, vocabulary_size)
    return Corpus(
        vocabulary,
        _numbered(train, vocabulary),
        _numbered(held_out, vocabulary),
        len(texts[False]),
        len(texts[True]),
        digest.hexdigest()[:16],
    )


def _numbered(tokens: Sequence[str], vocabulary: Sequence[str]) -> Tensor:
    number = {token: i for i, token in enumerate(vocabulary)}
    return torch.tensor([number.get(token, UNKNOWN_ID) for token in tokens], dtype=torch.int64)
