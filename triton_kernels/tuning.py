"""Block sizes, warps and rows per program: the only place with numbers.

All of them are reasoned from the hardware and the compiler's register report; none is measured yet.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from longtail.options import SoftmaxOptions

WARP = 32
# Elements of a block per thread. 16 are two 16-byte loads of bfloat16 or four of float32 in flight; 32 take some 80
# registers in a sweep for the loss, which halves the warps per multiprocessor, and 150 in a tile.
PER_THREAD = 16
# Longest row held in registers. One of 8192 takes 16 warps of 80 registers: a single program per multiprocessor, with
# nothing to overlap its barriers with.
TILE_CLASSES = 4096
# Shortest rows whose body and edges are read apart: the edges are as much work as 8 or 16 classes.
EDGE_CLASSES = 64
# A tile of rows so short that each lies in one warp: enough warps that programs are not too small to be launched.
TILE_WARPS = 4
# Rows that a thread has a part of: it repeats the row's own arithmetic, some 100 instructions, with all of the row's
# threads.
ROWS_PER_THREAD = 2
# Narrower tiles would leave threads of a warp without work for most of C = 1 ... 15 as well.
SMALLEST_BLOCK = 16
# A sweep that does not come back to its row: small programs waste the least in the last block (3 % at C = 32000),
# and many of them share a multiprocessor, which hides their reductions at the end.
SWEEP_WARPS = 4
# Loss and gradient in one launch read the row twice: the fewer rows in flight, the more of each is still in the cache.
# Threads per multiprocessor at the 64 registers that such a sweep takes; a program of 32 warps gets no more.
THREADS = 1024
# With heavy options 16 elements per thread spill there, and take up to 240 registers in the sigmoid family.
HEAVY_PER_THREAD = 8
# Warps of a program of the sigmoid family, whose elements need nothing from each other: as SWEEP_WARPS.
ELEMENT_WARPS = 4
# Neighbouring pixels of a class that a program reads, as one warp does at once.
PIXEL_BYTES = WARP * 16
# Most classes that a pixel's tile holds: 19 and 21 of the usual segmentation data sets pad to 32.
TILE_PIXEL_CLASSES = 64
TILE_PIXEL_WARPS = 8
# Pixels of a lane, each with sums and coefficients of its own: 8 (16 bytes of bfloat16) take up to 240 registers.
PIXELS_PER_LANE = 4
# Neighbouring pixels of a class that one warp reads.
PIXEL_RUN = WARP * PIXELS_PER_LANE
# Classes that a lane takes at once in a sweep over images: each change of the maximum costs an exp per lane.
PIXEL_STEPS = 4
# Fewest neighbouring pixels that a program reads: 64 bytes of bfloat16, one access of HBM.
LEAST_PIXELS = 32
# As THREADS, at the 128 registers of a sweep over images.
PIXEL_THREADS = 512
# Share of the L2 cache for the logits of rows in flight; the rest is for the gradient on its way out.
CACHE_SHARE = 0.5
# Cache per multiprocessor where the driver does not say: an A100's, the smallest of the data-centre GPUs.
CACHE_PER_PROCESSOR = 40 * 2**20 // 108


# Most rows that one program counts, or adds the losses of, 64 KB or 32 KB of them at once. A multiprocessor takes some
# 100 GB/s: another launch costs less than its time for more rows.
MEAN_ROWS = 2**16
MEAN_BLOCK = 8192
MEAN_WARPS = 16
# Rows of each program where there are several.
MEAN_SHARE = 2**14


class Tile(NamedTuple):
    """Launch of a kernel over whole rows: ``rows`` of them, ``block`` classes wide, ``vec`` elements per access.

    ``edges``: rows begin or end within 16 bytes.
    """

    rows: int
    block: int
    warps: int
    vec: int
    edges: bool


class Sweep(NamedTuple):
    """Launch of a kernel over one row in blocks; ``edges``: rows begin or end within 16 bytes."""

    block: int
    lanes: int
    warps: int
    vec: int
    edges: bool


class ElementRows(NamedTuple):
    """Launch over ``rows`` rows in blocks; ``lanes`` sums of ``run`` neighbours are kept apart until the end."""

    rows: int
    block: int
    lanes: int
    run: int
    warps: int
    vec: int
    edges: bool


class Pixels(NamedTuple):
    """Launch over ``pixels`` pixels, ``classes`` at a time, of which ``groups`` are summed apart until the end."""

    pixels: int
    classes: int
    groups: int
    warps: int
    vec: int


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _whole_rows(classes: int, vec: int, per_thread: int = PER_THREAD) -> tuple[int, int, int]:
    """Rows per program, their width and the warps, where a row lies in registers."""
    block = max(_power_of_two(classes), SMALLEST_BLOCK)
    if block > WARP * per_thread:
        return 1, block, block // (WARP * per_thread)
    threads = min(block // vec, WARP)  # of one row
    warps = TILE_WARPS if block // vec <= WARP else 1
    rows_per_thread = max(1, min(per_thread * threads // block, ROWS_PER_THREAD))
    return rows_per_thread * (WARP // threads) * warps, block, warps


def _vector(itemsize: int, strides: tuple[int, ...], aligned: bool) -> int:
    """Elements in 16 bytes where rows of all matrices begin at the same place within 16 bytes, else 1."""
    vec = 16 // itemsize
    return 1 if not aligned or any((n - strides[0]) % vec for n in strides) else vec


def tile(classes: int, itemsize: int, strides: tuple[int, ...], aligned: bool) -> Tile:
    """For rows of up to TILE_CLASSES. ``aligned``: every pointer is a multiple of 16 bytes."""
    vec = _vector(itemsize, strides, aligned)
    edges = any(n % vec for n in (classes, strides[0]))
    if edges and classes < EDGE_CLASSES:
        vec, edges = 1, False
    return Tile(*_whole_rows(classes, vec), vec, edges)


def whole_tile(classes: int, itemsize: int, strides: tuple[int, ...], aligned: bool) -> Tile:
    """As tile(), for kernels that know no edges."""
    vec = 16 // itemsize
    if not aligned or any(n % vec for n in (classes, *strides)):
        vec = 1
    return Tile(*_whole_rows(classes, vec), vec, False)


def is_heavy(o: SoftmaxOptions) -> bool:
    """Whether options take registers per element."""
    vectors = (o.class_bias, o.class_scale, o.class_mitigation)
    return any(x is not None for x in vectors) or any((o.label_smoothing, o.softcap, o.compensation))


def sweep(
    classes: int,
    itemsize: int,
    strides: tuple[int, ...],
    aligned: bool,
    twice: bool,
    heavy: bool,
    cache: int,
) -> Sweep:
    """For longer rows.

    ``strides``: of the logits and, if it is written, the gradient; ``twice``: the row is read twice, the second time
    from ``cache`` bytes per multiprocessor as far as possible; ``heavy``: as is_heavy().
    """
    warps, per_thread = SWEEP_WARPS, PER_THREAD
    if twice:
        warps, per_thread = 8, HEAVY_PER_THREAD if heavy else PER_THREAD
        while warps * WARP < THREADS and THREADS // (WARP * warps) * classes * itemsize > CACHE_SHARE * cache:
            warps *= 2
    return _sweep_by(warps, per_thread, classes, itemsize, strides, aligned)


def dense_sweep(classes: int, itemsize: int, strides: tuple[int, ...], aligned: bool) -> Sweep:
    """As sweep(), of rows with a target per class: half as many elements at once, which are as many bytes."""
    return _sweep_by(SWEEP_WARPS, HEAVY_PER_THREAD, classes, itemsize, strides, aligned)


def hierarchical(
    classes: int, itemsize: int, strides: tuple[int, ...], aligned: bool, twice: bool, heavy: bool, cache: int
) -> Sweep:
    """As sweep(), of rows of any length with a program each: short ones have fewer warps."""
    if classes > WARP * SWEEP_WARPS * PER_THREAD:
        return sweep(classes, itemsize, strides, aligned, twice, heavy, cache)
    warps = max(1, _power_of_two(classes) // (WARP * PER_THREAD))
    found = _sweep_by(warps, HEAVY_PER_THREAD, classes, itemsize, strides, aligned)
    return found._replace(vec=1, edges=False) if found.edges and classes < EDGE_CLASSES else found


def _sweep_by(
    warps: int, per_thread: int, classes: int, itemsize: int, strides: tuple[int, ...], aligned: bool
) -> Sweep:
    vec = _vector(itemsize, strides, aligned)
    return Sweep(
        block=WARP * warps * per_thread,
        lanes=WARP * warps,
        warps=warps,
        vec=vec,
        edges=any(n % vec for n in (classes, strides[0])),
    )


def _elements(heavy: bool) -> int:
    return WARP * ELEMENT_WARPS * (HEAVY_PER_THREAD if heavy else PER_THREAD)


def element_rows(classes: int, itemsize: int, strides: tuple[int, ...], aligned: bool, heavy: bool) -> ElementRows:
    """For rows of the sigmoid family.

    ``strides``: of every matrix, the logits' first. ``heavy``: with a gradient, dense targets or general options.
    """
    vec = _vector(itemsize, strides, aligned)
    edges = any(n % vec for n in (classes, strides[0]))
    longest = _elements(heavy)
    if classes > longest:
        return ElementRows(1, longest, WARP * ELEMENT_WARPS, vec, ELEMENT_WARPS, vec, edges)
    rows, block, warps = _whole_rows(classes, vec, longest // (WARP * ELEMENT_WARPS))
    return ElementRows(rows, block, rows, block, warps, vec, edges)


def pixel_vector(itemsize: int, pixels: int, strides: tuple[int, ...], aligned: bool) -> int:
    """Elements in 16 bytes where images allow such accesses, else 1. ``strides``: of images and classes."""
    vec = 16 // itemsize
    return 1 if not aligned or any(n % vec for n in (pixels, *strides)) else vec


def element_pixels(
    classes: int, pixels: int, itemsize: int, strides: tuple[int, ...], aligned: bool, heavy: bool
) -> Pixels:
    """For images of the sigmoid family, and for the multiplication of images by a factor."""
    vec, elements = pixel_vector(itemsize, pixels, strides, aligned), _elements(heavy)
    block = min(_power_of_two(classes), elements * itemsize // PIXEL_BYTES)
    groups = max(1, WARP * ELEMENT_WARPS * vec * block // elements)
    return Pixels(elements // block, block, min(groups, block), ELEMENT_WARPS, vec)


def pixel_tile(classes: int, vec: int) -> Pixels:
    """For images of up to TILE_PIXEL_CLASSES classes: each lane has PIXELS_PER_LANE pixels of up to four classes."""
    block = _power_of_two(classes)
    elements = WARP * PER_THREAD
    pixels = min(max(PIXEL_RUN, TILE_WARPS * elements // block), TILE_WARPS * PIXEL_RUN)
    pixels = min(pixels, TILE_PIXEL_WARPS * elements // block)
    return Pixels(pixels, block, 1, max(TILE_WARPS, block * pixels // elements), min(vec, PIXELS_PER_LANE))


def pixel_sweep(classes: int, itemsize: int, vec: int, twice: bool, heavy: bool, cache: int) -> Pixels:
    """For images of more classes; ``twice``, ``heavy`` and ``cache`` as sweep()."""
    vec, warps, pixels = min(vec, PIXELS_PER_LANE), SWEEP_WARPS, PIXEL_RUN
    if twice:
        while warps * WARP < PIXEL_THREADS and _in_flight(warps, pixels, classes, itemsize) > CACHE_SHARE * cache:
            warps *= 2
        while pixels > LEAST_PIXELS and _in_flight(warps, pixels, classes, itemsize) > CACHE_SHARE * cache:
            pixels //= 2
    groups = max(1, WARP * warps * vec // pixels)
    steps = PIXEL_STEPS // 2 if heavy or classes < 4 * groups * PIXEL_STEPS else PIXEL_STEPS
    return Pixels(pixels, groups * steps, groups, warps, vec)


def two_way_pixels(classes: int, itemsize: int, vec: int, twice: bool, dense: bool, cache: int) -> Pixels:
    """As pixel_sweep(), of two sides: those of dense targets take twice the registers of a pixel."""
    return pixel_sweep(classes, itemsize, min(vec, PIXELS_PER_LANE // 2) if dense else vec, twice, True, cache)


def _in_flight(warps: int, pixels: int, classes: int, itemsize: int) -> int:
    """Bytes of the logits that the programs of a multiprocessor work on."""
    return PIXEL_THREADS // (WARP * warps) * pixels * classes * itemsize


def scaling(classes: int, itemsize: int, stride: int, aligned: bool) -> Tile:
    """For the multiplication of rows by a factor: as short rows, longer ones in a loop."""
    return whole_tile(min(classes, TILE_CLASSES), itemsize, (classes, stride), aligned)


def row_share(rows: int) -> int:
    """Rows that a program counts."""
    return MEAN_ROWS if rows <= MEAN_ROWS else MEAN_SHARE


@functools.lru_cache
def cache_per_processor(device: torch.device) -> int:
    """Bytes of L2 cache per multiprocessor: the arch as far as these numbers depend on it."""
    if device.type != "cuda":
        return CACHE_PER_PROCESSOR
    properties = torch.cuda.get_device_properties(device)
    cache = getattr(properties, "L2_cache_size", 0)
    return cache // properties.multi_processor_count or CACHE_PER_PROCESSOR
