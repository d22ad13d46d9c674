"""The words in pictures: names, terms, and where the rows are from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from . import gpu, suite
from .palette import TextRow, contender
from .report import NAMES

LOSSES = {
    "plain": "cross-entropy without options; its eager is F.cross_entropy",
    "focal": "softmax focal loss, gamma 2",
    "complement": "complement cross-entropy",
    "family": "cross-entropy with class weights, focal and complement terms",
    "everything": "the family with label smoothing, class bias, class margin, scale, softcap, z-loss, sample weights "
    "and ignored rows",
    "statistics": "log-probability of the target and entropy of each row, with the gradients of both",
    "soft": "cross-entropy, targets are class probabilities",
    "vector_scaling": "a temperature and a bias for each class (Kini et al. 2021)",
    "immax": "a temperature of the target's class (Cortes et al. 2025)",
    "seesaw": "mitigation and compensation factors for each pair of classes (Wang et al. 2021)",
    "hierarchical": "a tree of depth 4 over the classes (Bertinetto et al. 2020), numbered along it",
    "hierarchical_shuffled": "the same tree, its classes numbered at random",
    "sigmoid": "sigmoid cross-entropy, targets are class indices",
    "sigmoid_focal": "sigmoid focal loss, targets are class indices",
    "dense_focal": "sigmoid focal loss, a target for each element",
    "multi_label_focal": "sigmoid focal loss, several labels a row",
    "asymmetric": "asymmetric loss (Ridnik et al. 2021), gamma 1 and 4, clip 0.05",
    "distribution_balanced": "distribution-balanced loss (Wu et al. 2020)",
    "zlpr": "ZLPR (Su et al. 2022)",
    "two_way": "two-way loss over the classes of each row (Kobayashi 2023), temperatures 4 and 1",
    "balanced": "cross-entropy with class-balanced weights",
    "dense_sigmoid": "sigmoid cross-entropy, a target for each element",
}
"""What the names of losses in the CSV mean."""

CONTENDERS = {
    "copy": "copy of the logits",
    "eager": "eager",
    "eager module": "eager module",
    "compiled": "torch.compile",
    "longtail backward": "longtail, backward",
    "longtail forward": "longtail, forward",
    "longtail inplace": "longtail, inplace",
    "longtail module": "longtail module",
    "liger": "Liger",
    "quack": "QuACK",
    "timm": "timm",
}
"""Names of those in :data:`palette.COLOURS`."""

_MODES = (
    'longtail: fused; gradient="backward" is the default, "forward" makes the gradient in the forward pass, "inplace" '
    "writes it over the logits"
)
_MODULES = "module: a call of an nn.Module"
_PEERS = "Liger, QuACK: fused losses of other projects"
TERMS = {
    "eager": "eager: PyTorch's own operations, one after another",
    "compiled": "torch.compile: the same operations, compiled",
    **dict.fromkeys(("longtail backward", "longtail forward", "longtail inplace"), _MODES),
    **dict.fromkeys(("eager module", "longtail module"), _MODULES),
    **dict.fromkeys(("liger", "quack"), _PEERS),
    "timm": "timm: its modules, which compute in float32",
    "copy": "copy of the logits: out.copy_(logits), which reads and writes each once",
}
"""What those are."""

PAGES = {
    "fresh": "as a process has them that sets nothing",
    "huge": "with THP_MEM_ALLOC_ENABLE=1",
    "kept": "with freed memory handed out again (MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_)",
}
"""What the pages of a gradient in the section ``pages`` are."""


def loss(name: str) -> str:
    return name.replace("_", " ")


def pages(row: TextRow) -> str:
    """Which pages the gradients of a row got, if its section says so."""
    return row["contender"].partition(", ")[2].removesuffix(" pages")


def name(row: TextRow) -> str:
    """A contender's name: of one function or module of torch its own."""
    key = contender(row)
    own = NAMES.get((row["loss"], key)) if key.startswith("eager") else None
    return own or CONTENDERS[key]


def shape(row: TextRow) -> str:
    """The shape of the logits, of images too, of which a row only has the pixels."""
    if not row["section"].endswith("images"):
        return f"{row['N']} x {row['C']}"
    for images, classes, *sides in (*suite.IMAGES.shapes, *suite.FEW_IMAGES.shapes, *gpu.IMAGES.shapes):
        if (images * sides[0] * sides[1], classes) == (int(row["N"]), int(row["C"])):
            return " x ".join(map(str, (images, classes, *sides)))
    return f"{row['C']} classes, {row['N']} pixels"


def problem(row: TextRow) -> str:
    return f"{shape(row)}, {row['dtype']}"


def commits(rows: Sequence[TextRow]) -> str:
    """The commits of a panel's rows, and their shares if there are several."""
    found = Counter(row["commit"] for row in rows).most_common()
    if len(found) == 1:
        return f"commit {found[0][0]}"
    return "commits " + ", ".join(f"{commit} ({count} of {len(rows)} rows)" for commit, count in found)


def _every(rows: Sequence[TextRow], column: str) -> str:
    return ", ".join(sorted({row[column] for row in rows}))


def machine(rows: Sequence[TextRow]) -> str:
    """The machine of the rows, which is one, what they were measured with and when, which need not be."""
    threads = sorted({int(row["threads"]) for row in rows})
    counted = f"{' to '.join(map(str, threads))} thread{'' if threads == [1] else 's'}"
    processor = f"{rows[0]['cpu']}, {counted}, {rows[0]['isa']}"
    device = processor if rows[0]["device"] == "cpu" else f"{rows[0]['device']} ({processor})"
    days = sorted({row["date"][:10] for row in rows})
    day = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    backend = _every([row for row in rows if row["backend"]], "backend")
    versions = f"torch {_every(rows, 'torch')}; longtail {_every(rows, 'longtail')}, backend {backend}"
    return f"Medians; {device}; {versions}; {day}"


def losses(rows: Sequence[TextRow]) -> list[str]:
    """What the losses of the rows are."""
    return [f"{loss(name)}: {LOSSES[name]}" for name in dict.fromkeys(row["loss"] for row in rows if row["loss"])]


def contenders(rows: Sequence[TextRow]) -> list[str]:
    """What the contenders of the rows are, and the pages they got."""
    used = {contender(row) for row in rows}
    kinds = dict.fromkeys(pages(row) for row in rows if pages(row))
    meanings = dict.fromkeys(meaning for key, meaning in TERMS.items() if key in used)
    return [*meanings, *(f"{kind} pages: {PAGES[kind]}" for kind in kinds)]
