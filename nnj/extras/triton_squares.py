"""sum over columns (and samples) of (V U^T)^2 on a GPU, in one kernel: no product leaves the
registers, where else B is written, read and squared.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = (
    512  # tiles of the result that keep a GPU busy; samples are divided until there are so many
)
TILE, PLACES = 64, 32  # outputs and inputs of a tile, and the places that it takes at a time


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add_squares(
    v: Any,
    u: Any,
    out: Any,
    columns: Any,
    samples: Any,
    groups: Any,
    outputs: Any,
    inputs: Any,
    places: Any,
    together: Any,
    v_column: Any,
    v_sample: Any,
    v_group: Any,
    v_output: Any,
    v_place: Any,
    u_sample: Any,
    u_group: Any,
    u_input: Any,
    u_place: Any,
    O_TILE: tl.constexpr,
    I_TILE: tl.constexpr,
    L_TILE: tl.constexpr,
) -> None:
    """One tile (O, I) of one group, of some samples one after the other."""
    part, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    o = tl.program_id(1) * O_TILE + tl.arange(0, O_TILE)
    i = tl.program_id(2) * I_TILE + tl.arange(0, I_TILE)
    first = part * together
    # 64 bits: V may have more than 2^31 entries
    v_start = v + tl.cast(group, tl.int64) * v_group + tl.cast(o, tl.int64)[:, None] * v_output
    u_start = u + tl.cast(group, tl.int64) * u_group + tl.cast(i, tl.int64)[None, :] * u_input
    total = tl.full((O_TILE, I_TILE), 0.0, tl.float32)
    for sample in range(first, tl.minimum(first + together, samples)):
        v_of = v_start + tl.cast(sample, tl.int64) * v_sample
        u_of = u_start + tl.cast(sample, tl.int64) * u_sample
        for column in range(columns):
            b = tl.full((O_TILE, I_TILE), 0.0, tl.float32)
            for start in range(0, places, L_TILE):
                place = tl.cast(start + tl.arange(0, L_TILE), tl.int64)
                there = place < places
                left = tl.load(
                    v_of + tl.cast(column, tl.int64) * v_column + place[None, :] * v_place,
                    mask=(o < outputs)[:, None] & there[None, :],
                    other=0.0,
                )
                right = tl.load(
                    u_of + place[:, None] * u_place,
                    mask=there[:, None] & (i < inputs)[None, :],
                    other=0.0,
                )
                b = tl.dot(left, right, b, input_precision="ieee")
            total += b * b
    row = (tl.cast(part, tl.int64) * groups + group) * outputs + o
    tl.store(
        out + row[:, None] * inputs + i[None, :],
        total,
        mask=(o < outputs)[:, None] & (i < inputs)[None, :],
    )


def squares(v: Tensor, u: Tensor, per_sample: bool) -> Tensor:
    """The squares summed over columns and samples (G, O, I), or over the columns of each sample
    (N, G, O, I).

    Args:
        v: V, (K, N, G, O, L), in float32, in whatever order of memory.
        u: U, (N, G, I, L).
    """
    (k, n, g, o, l), i = v.shape, u.shape[2]
    o_tile, i_tile = (max(16, min(TILE, triton.next_power_of_2(size))) for size in (o, i))
    tiles = triton.cdiv(o, o_tile), triton.cdiv(i, i_tile)
    parts = n if per_sample else min(n, triton.cdiv(PROGRAMS, g * tiles[0] * tiles[1]))
    together = triton.cdiv(n, max(1, parts))
    parts = triton.cdiv(n, max(1, together))
    out = torch.zeros(parts, g, o, i, dtype=torch.float32, device=v.device)
    if out.numel() and k:
        sizes = k, n, g, o, i, l, together
        tile = {"O_TILE": o_tile, "I_TILE": i_tile, "L_TILE": PLACES}
        _add_squares[(parts * g, *tiles)](v, u, out, *sizes, *v.stride(), *u.stride(), **tile)
    return out if per_sample else out.sum(0)
