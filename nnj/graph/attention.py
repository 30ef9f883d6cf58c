"""O = softmax(s Q K^T + mask) V: u J for many columns u at once, which the fused kernels of torch
cannot do, and (J o J')^T m.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nnj.graph.op_names import ATTENTION
from nnj.graph.traverse import children

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

    With P the softmax and dP = g V^T:  dV = P^T g,  dS = P o (dP - sum(P o dP)),  dQ = s dS K,
    dK = s dS^T Q."""
    q, k, v = node._saved_query, node._saved_key, node._saved_value
    if q.shape[:-2] != k.shape[:-2] or k.shape[:-2] != v.shape[:-2]:
        return None
    p, scale = _probabilities(node, q, k)
    columns, t, s = g.shape[0], p.shape[-2], p.shape[-1]
    # (N, H, K, T, d): columns are folded into rows, so that nothing is copied for each of them
    g = g.movedim(0, -3)
    dv = (p.mT @ g.transpose(-3, -2).flatten(-2)).unflatten(-1, (columns, -1)).movedim(-2, 0)
    dp = (g.flatten(-3, -2) @ v.mT).unflatten(-2, (columns, t))
    p = p.unsqueeze(-3)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dq = (ds.flatten(-3, -2) @ k).unflatten(-2, (columns, t)).movedim(-3, 0)
    dk = (ds.mT.flatten(-3, -2) @ q).unflatten(-2, (columns, s)).movedim(-3, 0)
    return [dq, dk, dv]


def _probabilities(node: Any, q: Tensor, k: Tensor) -> tuple[Tensor, float]:
    """P of (N, H, T, S), and the scale s."""
    scale = node._saved_scale
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q @ k.mT) * scale
    mask = getattr(node, "_saved_attn_mask", None)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if node._saved_is_causal:
        below = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~below, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0), scale  # a row that is masked as a whole gives zero


def attention_squares(node: Any, m: Tensor, other: Any) -> list[Tensor | None] | None:
    """(J o J')^T m for m of (K, N, H, T, d), with J' at the node `other`. None where heads are
    grouped.

    dO_tc / dV_sc = P_ts,  dO_tc / dQ_td = s sum_s P_ts (V_sc - O_tc) K_sd,  dO_tc / dK_sd = s P_ts
    (V_sc - O_tc) Q_td."""
    if node._saved_query.shape[:-2] != node._saved_key.shape[:-2]:
        return None
    p, jq, jk = _slopes(node)
    p2, jq2, jk2 = (p, jq, jk) if other is node else _slopes(other)
    dv = (p * p2).mT @ m
    dq = torch.einsum("...tcd,k...tc->k...td", jq * jq2, m)
    weight = torch.einsum("...tsc,k...tc->k...ts", jk * jk2, m)
    return [dq, weight.mT @ (node._saved_query * other._saved_query), dv]


def _slopes(node: Any) -> tuple[Tensor, Tensor, Tensor]:
    """P (N, H, T, S); dO_tc / dQ_td as (N, H, T, c, d); dO_tc / dK_sd without its factor Q_td, as
    (N, H, T, S, c).
    """
    p, scale = _probabilities(node, node._saved_query, node._saved_key)
    v = node._saved_value
    jk = scale * p.unsqueeze(-1) * (v.unsqueeze(-3) - (p @ v).unsqueeze(-2))
    return p, torch.einsum("...tsc,...sd->...tcd", jk, node._saved_key), jk
