"""y = W[x]: rows of a table, chosen by whole numbers; and sums of such rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import nnj


def check(m: nn.Embedding | nn.EmbeddingBag) -> None:
    """Errors: `NNJError` if .grad is not the gradient; NotImplementedError if the call changes the
    table.
    """
    if m.scale_grad_by_freq:
        raise nnj.NNJError(
            f"{type(m).__name__}: scale_grad_by_freq=True divides the gradient by the count of an "
            "index, so that it is none of the model's function, and samples influence one another. "
            "Set it to False"
        )
    if m.max_norm is not None:
        raise NotImplementedError("max_norm, which changes the table in the call")


def embedding(m: nn.Embedding, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = dW[x], and 0 where x is padding."""
    check(m)
    keep = None if m.padding_idx is None else x != m.padding_idx
    return {"weight": nnj.TableRows(x, m.weight.shape, y, keep=keep)}


class Bag(nnj.Jacobian):
    """y = sum over l of a_l W[x_l], with x and a of (N, L)."""

    def __init__(self, rows: nnj.TableRows, a: Tensor, y: Tensor):
        super().__init__(rows.inputs, y.shape[1:], y)
        self.rows, self.a = rows, a[:, :, None]

    def jvp(self, v: Tensor) -> Tensor:
        return (self.rows.jvp(v) * self.a).sum(-2)

    def vjp(self, u: Tensor) -> Tensor:
        return self.rows.vjp(u[:, :, None] * self.a)

    def factor(self, u: Tensor, sample_index: Any) -> nnj.Factor | None:
        return (
            self.rows.factor(u[:, :, None] * self.a, sample_index)
            if sample_index.of is None
            else super().factor(u, sample_index)
        )


def embedding_bag(m: nn.EmbeddingBag, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = sum over l of dW[x_l], or their mean; padding does not count."""
    check(m)
    if m.mode == "max" or x.dim() != 2:
        raise NotImplementedError("mode='max', or offsets")
    keep = torch.ones_like(x, dtype=torch.bool) if m.padding_idx is None else x != m.padding_idx
    a = keep.to(y.dtype)
    a = a / a.sum(1, keepdim=True).clamp(min=1) if m.mode == "mean" else a
    like = y[:, None].expand(-1, x.shape[1], -1)
    return {"weight": Bag(nnj.TableRows(x, m.weight.shape, like, keep=keep), a, y)}


@nnj.hookimpl
def nnj_register_layers(register: nnj.RegisterLayer) -> None:
    register(nn.Embedding, embedding, uses="x")
    register(nn.EmbeddingBag, embedding_bag, uses="xy")
