"""O = softmax(s Q K^T + mask) V: u J for many columns u at once, which the fused kernels of torch
cannot do, and (J o J')^T m.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nnj.graph.op_names import ATTENTION
from nnj.graph.traverse import children

# Scores that are in memory at once: what caches of a CPU serve, and enough for a GPU to be busy.
SCORES = 1 << 20
SCORES_ON_GPU = 1 << 26

_SAVED = (
    "_saved_query",
    "_saved_key",
    "_saved_value",
    "_saved_is_causal",
    "_saved_scale",
    "_saved_dropout_p",
)


def fused_attention(node: Any) -> bool:
    """Whether a node is torch's fused attention in a form that `attention_backward` computes."""
    if ATTENTION not in node.name():
        return False
    # of the type: to ask the node unpacks the tensor, which a checkpoint allows once
    kind = type(node)
    if not all(hasattr(kind, name) for name in _SAVED) or node._saved_dropout_p:
        return False
    return not hasattr(kind, "_saved_attn_bias") and len(children(node)) <= 3


def attention_backward(node: Any, g: Tensor) -> list[Tensor | None] | None:
    """Cotangents (K, N, H, T, d) of the output to those of Q, K and V. None where heads are
    grouped.

    With P the softmax and dP = g V^T:  dV = P^T g,  dS = P o (dP - sum(g o O)),  dQ = dS s K,
    dK = dS^T s Q, where sum(g o O) = sum(P o dP). Some heads, queries and columns at a time, since
    what is between, of (K, N, H, T, S), is the largest tensor of a transformer."""
    saved = _Saved(node)
    q, k, v = saved.q, saved.k, saved.v
    if q.shape[:-2] != k.shape[:-2] or k.shape[:-2] != v.shape[:-2]:
        return None
    dq, dk, dv = (_like(t, len(g)) for t in (q, k, v))
    q, k, every = q * saved.scale, k * saved.scale, slice(None)
    for *heads, rows in _groups(q, k):
        at_keys, at_rows = (every, *heads), (*heads, rows)
        p, of_heads = saved.probabilities(at_rows), g[(every, *at_rows)]
        _put(dv, at_keys, _transposed(p, of_heads), rows)
        keys, values, queries = k[at_keys[1:]], v[at_keys[1:]], q[at_rows]
        delta = (of_heads * (p @ values)).sum(-1, keepdim=True)
        fits = max(1, _at_once(q.device) // max(1, p.numel()))
        for a in range(0, len(g), fits):
            part = slice(a, a + fits)
            ds = _scores(p, values, of_heads[part], delta[part])
            dq[(part, *at_rows)] = (
                (ds.flatten(2, 3) @ keys).unflatten(2, ds.shape[2:4]).movedim(2, 0)
            )
            _put(dk, (part, *heads), (ds.mT @ queries[:, :, None]).movedim(2, 0), rows)
    return [dq, dk, dv]


def _put(out: Tensor, at: tuple[slice, ...], v: Tensor, rows: slice) -> None:
    """What comes of some queries, to which that of later ones is added."""
    if rows.start:
        out[at].add_(v)
    else:
        out[at] = v


def _transposed(p: Tensor, g: Tensor) -> Tensor:
    """P^T g of g (K, n, h, T, d); columns are folded into rows, so that P is not copied for each
    of them.
    """
    columns = g.movedim(0, 3).flatten(3)  # (n, h, T, K d)
    found: Tensor = (p.mT @ columns).unflatten(3, (len(g), g.shape[-1])).movedim(3, 0)
    return found


def _scores(p: Tensor, v: Tensor, g: Tensor, delta: Tensor) -> Tensor:
    """dS = P o (g V^T - delta) of g (K, n, h, T, d), as (n, h, K, T, S)."""
    rows = g.movedim(0, 2)
    ds: Tensor = (rows.flatten(2, 3) @ v.mT).unflatten(2, rows.shape[2:4])
    return ds.sub_(delta.movedim(0, 2)).mul_(p[:, :, None])


def _like(t: Tensor, columns: int) -> Tensor:
    """Room for columns of a tensor (N, H, T, d), in the order of its axes in memory: heads come
    mostly from the channels of each token.
    """
    n, h, length, d = t.shape
    if t.stride(1) < t.stride(2):
        return t.new_empty(columns, n, length, h, d).transpose(2, 3)
    return t.new_empty(columns, n, h, length, d)


def _at_once(device: torch.device) -> int:
    """How many scores are in memory at once."""
    return SCORES if device.type == "cpu" else SCORES_ON_GPU


def _groups(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """All heads and queries of (N, H, T) in groups whose scores are so few: of whole samples, of
    one, or some queries of one head.
    """
    (n, h, t), s, at_once = q.shape[:3], k.shape[2], _at_once(q.device)
    fits = max(1, at_once // max(1, t * s))
    samples, heads = max(1, fits // max(1, h)), min(max(1, h), fits)
    rows = max(1, t if t * s <= at_once else at_once // s)
    for a in range(0, n, samples):
        for b in range(0, h, heads):
            for c in range(0, t, rows):
                yield slice(a, a + samples), slice(b, b + heads), slice(c, c + rows)


def score_entries(s: int, device: torch.device) -> int:
    """How many entries `attention_backward` holds beside columns and results, whatever their
    number, for S keys: P, dS, and a copy of either.
    """
    return 3 * max(s, _at_once(device))


class _Saved:
    """What a node has saved, each asked once, which is all that a checkpoint allows."""

    def __init__(self, node: Any):
        saved = (node._saved_query, node._saved_key, node._saved_value)
        self.q, self.k, self.v = (t.detach() for t in saved)
        self.mask: Tensor | None = getattr(node, "_saved_attn_mask", None)
        self.causal, scale = node._saved_is_causal, node._saved_scale
        self.scale: float = 1 / math.sqrt(self.q.shape[-1]) if scale is None else scale

    def probabilities(self, at: tuple[slice, ...] = (slice(None),) * 3) -> Tensor:
        """P of some samples, heads and queries, (n, h, t, S)."""
        scores = (self.q[at] @ self.k[at[:2]].mT).mul_(self.scale)
        if self.mask is not None:
            whole = (*self.q.shape[:-1], self.k.shape[-2])
            mask = self.mask.detach().expand(whole)[at]
            if mask.dtype == torch.bool:
                scores.masked_fill_(~mask, -math.inf)
            else:
                scores = scores + mask
        if self.causal:
            ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
            scores.masked_fill_(~ones.tril(at[2].start or 0), -math.inf)
        p: Tensor = scores.softmax(-1)
        return p.nan_to_num_(0.0)  # a row that is masked as a whole gives zero


def attention_squares(node: Any, m: Tensor, other: Any) -> list[Tensor | None] | None:
    """(J o J')^T m for m of (K, N, H, T, d), with J' at the node `other`. None where heads are
    grouped.

    dO_tc / dV_sc = P_ts,  dO_tc / dQ_td = s sum_s P_ts (V_sc - O_tc) K_sd,  dO_tc / dK_sd = s P_ts
    (V_sc - O_tc) Q_td."""
    here = _Saved(node)
    there = here if other is node else _Saved(other)
    if here.q.shape[:-2] != here.k.shape[:-2]:
        return None
    p, jq, jk = _slopes(here)
    p2, jq2, jk2 = (p, jq, jk) if other is node else _slopes(there)
    dv = (p * p2).mT @ m
    dq = torch.einsum("...tcd,k...tc->k...td", jq * jq2, m)
    weight = torch.einsum("...tsc,k...tc->k...ts", jk * jk2, m)
    return [dq, weight.mT @ (here.q * there.q), dv]


def _slopes(saved: _Saved) -> tuple[Tensor, Tensor, Tensor]:
    """P (N, H, T, S); dO_tc / dQ_td as (N, H, T, c, d); dO_tc / dK_sd without its factor Q_td, as
    (N, H, T, S, c).
    """
    p, v = saved.probabilities(), saved.v
    jk = saved.scale * p.unsqueeze(-1) * (v.unsqueeze(-3) - (p @ v).unsqueeze(-2))
    return p, torch.einsum("...tsc,...sd->...tcd", jk, saved.k), jk
