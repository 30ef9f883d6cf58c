"""How many columns walk together."""

from __future__ import annotations

import math
from typing import Any

from nnj.errors import NNJError
from nnj.graph.attention import fused_attention, score_entries
from nnj.graph.step import Step
from nnj.propagation.allocator import keep_heap
from nnj.propagation.backward import Sweep
from nnj.propagation.plan import device_of

CACHE = 1 << 21  # entries of a tangent that the caches of a CPU still serve while a chunk walks


def checked_memory(memory: Any) -> int:
    """A number of bytes as a whole one. Errors: `NNJError` for what is none."""
    if isinstance(memory, bool) or not isinstance(memory, (int, float)) or not memory >= 0:
        raise NNJError(
            f"memory={memory!r}: the bytes that columns may take are a number, at least 0 (then "
            "they go one by one)"
        )
    return int(min(memory, 1 << 62))


def even(k: int, fits: int, likes: int) -> int:
    """The length of chunks of about `likes` of k columns, `fits` at most, that are all about as
    long.
    """
    return max(1, math.ceil(k / max(math.ceil(k / fits), round(k / likes), 1)))


def columns_at_once(sweep: Sweep, memory: int) -> tuple[int, int]:
    """How many columns may walk together: what `memory` holds; and on a CPU about what its caches
    like.

    Of memory each takes the share of the largest step, with what is formed on the way (3 times). A
    chunk should not be larger than CACHE, lest every step goes through main memory, but much larger
    than the patches that it makes anew."""
    steps = [_entries(sweep, step) for step in sweep.graph.steps]
    root = sweep.graph.roots[0][0]._input_metadata[0]
    size = _itemsize(sweep)
    memory_left = memory - size * max([_fixed(sweep, step) for step in sweep.graph.steps])
    fits = max(1, memory_left // (size * 3 * max([1, *[held for held, _, _ in steps]])))
    if root.device.type != "cpu":
        return fits, fits
    widest, patches = max([1, *[came for _, came, _ in steps]]), sum([made for _, _, made in steps])
    keep_heap(memory)
    return fits, max(1, min(fits, (CACHE + patches) // widest))


def columns_kept(sweep: Sweep, memory: int) -> int:
    """How many columns may walk together if their factors at all parameters stand at once: of
    `memory` they, too, take their share.
    """
    ends = [step for step in sweep.graph.steps if step.params or step.leaf is not None]
    kept = sum(_came(sweep, step) + _formed(sweep, step) for step in ends)
    fits = memory // (_itemsize(sweep) * max(1, kept))
    return max(1, min(fits, columns_at_once(sweep, memory)[0]))


def _fixed(sweep: Sweep, step: Step) -> int:
    """The entries that a step holds whatever the number of columns: the scores of attention."""
    if step.record is not None or step.leaf is not None or not fused_attention(step.node):
        return 0
    keys = next((sweep.shapes[edge][-2] for edge in step.out[1:3] if edge is not None), 1)
    return score_entries(keys, device_of(step.into[0]))


def _entries(sweep: Sweep, step: Step) -> tuple[int, int, int]:
    """Of one column at a step: the entries that are held, and those that came to it; and of its
    patches, for all columns.
    """
    times = sweep.n if step in sweep.by_column else 1
    came = held = _came(sweep, step)
    for edge, route in zip(step.out, sweep.routes[step], strict=True):
        if edge is not None and route is not None:
            held += math.prod(sweep.shapes[edge]) * (sweep.n if route.way == "summed" else times)
    patches = 0
    for slot, _ in step.params if times == 1 else ():
        j = step.slots[slot]
        patches += j.patch_entries if j.places > 1 else 0
    # a convolution works on copies in a layout of its own
    return held * (2 if patches else 1) + _formed(sweep, step), came, patches


def _came(sweep: Sweep, step: Step) -> int:
    """The entries of one column that come to a step."""
    times = sweep.n if step in sweep.by_column else 1
    return sum(math.prod(sweep.shapes[e]) for e in step.into) * times


def _formed(sweep: Sweep, step: Step) -> int:
    """The entries that the factors of one column at a step's parameters have beside the column."""
    if sweep.n > 1 and step in sweep.by_column:  # one sample each, and B is summed over rows
        return sum(p.numel() for _, p in step.params) * sweep.n
    return sum(step.slots[slot].column_entries for slot, _ in step.params) * sweep.n


def _itemsize(sweep: Sweep) -> int:
    """The bytes of an entry: half precision is summed in float32."""
    itemsize: int = sweep.graph.roots[0][0]._input_metadata[0].dtype.itemsize
    return max(4, itemsize)
