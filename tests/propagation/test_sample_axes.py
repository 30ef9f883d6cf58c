"""Samples are followed from axis to axis by the names of nodes: right, and without a probe where
models are of the usual kind.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.jacobians.sample_index import SampleAxis, SampleIndex
from nnj.propagation.backward import Sweep
from nnj.propagation.sample_axes import carried

N = 3
# Ways of rearranging (6, 2, 3, 4): an entry of the result is an entry of the operand.
WAYS = {
    "view": lambda t: t.contiguous().view(12, 12),
    "view apart": lambda t: t.view(2, 3, 2, 3, 4),
    "view flat": lambda t: t.view(-1),
    "reshape": lambda t: t.reshape(6, 6, 4),
    "unsqueeze": lambda t: t.unsqueeze(1),
    "squeeze": lambda t: t[:, :1].squeeze(1),
    "transpose": lambda t: t.transpose(0, 2),
    "swapaxes": lambda t: t.swapaxes(1, -1),
    "permute": lambda t: t.permute(2, 0, 3, 1),
    "T": lambda t: t.reshape(12, 12).t(),
    "select": lambda t: t.select(1, 1),
    "select last": lambda t: t[..., -1],
    "unbind": lambda t: t.unbind(1)[1],
    "split": lambda t: t.split(2, 3)[1],
    "chunk": lambda t: t.chunk(2, 1)[0],
    "slice": lambda t: t[:, :, :2],
    "slice of samples": lambda t: t[:3],
    "slice that takes all": lambda t: t.narrow(0, 0, 6).narrow(2, 0, 3),
    "flip": lambda t: t.flip(1),
    "flip samples": lambda t: t.flip(0),
    "stack": lambda t: torch.stack([t, t], 1),
    "cat": lambda t: torch.cat([t, t], 2),
    "cat samples": lambda t: torch.cat([t, t]),
    "expand": lambda t: t[:, :1].expand(6, 5, 3, 4),
    "movedim": lambda t: t.movedim(0, -1),
    "pad": lambda t: nn.functional.pad(t, (1, 1)),
    "clone": lambda t: t.transpose(0, 1).contiguous(),
    "gather": lambda t: t.gather(1, torch.zeros(6, 2, 3, 4, dtype=torch.long)),
}


def ids(shape: tuple[int, ...], along: SampleAxis) -> Tensor:
    of = SampleIndex.by_axis(N, shape, along, torch.device("cpu")).of
    of = torch.arange(shape[0]) // along.run if of is None else of  # plain
    return (
        of.reshape(-1, *[1] * (len(shape) - 1)).expand(shape) if of.dim() == 1 else of.expand(shape)
    )


def walk(y: Tensor, x: Tensor, along: SampleAxis) -> SampleAxis | None:
    """From y to x through all nodes between; every one has one operand, or the same one twice."""
    node, shape = y.grad_fn, tuple(y.shape)
    while node is not x.grad_fn:
        after, number = node.next_functions[0]
        into = tuple(after._input_metadata[number].shape)
        found = carried(node, 0, shape, into, N, along)
        if found is None:
            return None
        node, shape, along = after, into, found
    return along


@pytest.mark.parametrize("way", WAYS)
def test_where_the_samples_are(way):
    known = 0
    x = torch.zeros(6, 2, 3, 4, requires_grad=True).clone()
    y = WAYS[way](x)
    for axis, run in itertools.product(range(y.dim()), (1, 2, 4)):
        if y.shape[axis] % (N * run):
            continue
        along = walk(y, x, SampleAxis(axis, run))
        if along is None:
            continue
        known += 1
        rearranged = WAYS[way](ids(tuple(x.shape), along) + 0)
        there = ids(tuple(y.shape), SampleAxis(axis, run))
        # what is put around belongs to nobody
        inside = slice(1, -1) if way == "pad" else slice(None)
        assert torch.equal(rearranged[..., inside], there[..., inside]), (axis, run, along)
    assert known or way in ("slice of samples", "flip samples", "cat samples"), (
        "nothing is known of it"
    )


MIXING = {
    "sum": lambda t: t.sum(0),
    "softmax": lambda t: t.softmax(0),
    "cumsum": lambda t: t.cumsum(0),
    "max": lambda t: t.max(0)[0],
    "norm": lambda t: t.norm(dim=0),
    "flip": lambda t: t.flip(0),
    "layer norm": lambda t: nn.functional.layer_norm(t, t.shape),
    "matmul": lambda t: torch.randn(6, 6) @ t.reshape(6, -1),
    "mean of all": lambda t: t.mean(),
    "roll": lambda t: t.roll(1, 0),
}


@pytest.mark.parametrize("way", MIXING)
def test_what_mixes_samples_is_not_followed(way):
    x = torch.randn(6, 2, 3, 4, requires_grad=True).clone()
    y = MIXING[way](x)
    if y.dim() and y.shape[0] % N == 0:
        child = 1 if way == "matmul" else 0
        into = tuple(y.grad_fn.next_functions[child][0]._input_metadata[0].shape)
        assert (
            carried(y.grad_fn, child, tuple(y.shape), into, N, SampleAxis(0, y.shape[0] // N))
            is None
        )


class ByHand(nn.Module):
    """Attention as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        p = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        return x + self.out((p @ v).transpose(1, 2).reshape(n, t, 8))


class Pooled(nn.Module):
    def __init__(self, body: nn.Module, axis: int = 1):
        super().__init__()
        self.body, self.head, self.axis = body, nn.Linear(8, 3), axis

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(self.axis))


def encoder(**options) -> nn.Module:
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, **options), 2, enable_nested_tensor=False
    )


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        return x + self.attention(z, z, z)[0]


USUAL = {
    "by hand": lambda: Pooled(nn.Sequential(ByHand(), nn.LayerNorm(8), ByHand())),
    "encoder": lambda: Pooled(encoder(batch_first=True)),
    "norm first": lambda: Pooled(encoder(batch_first=True, norm_first=True)),
    "with weights": lambda: Pooled(nn.Sequential(Attending(), Attending())),
    "every token": lambda: nn.Sequential(
        encoder(batch_first=True), nn.Linear(8, 3), nn.Flatten(), nn.Linear(15, 3)
    ),
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_models_are_not_probed(name, monkeypatch):
    """And what comes out is what comes out with a probe."""

    def collected() -> list[Tensor]:
        torch.manual_seed(0)
        model, loss = nnj.extend(USUAL[name]().double()), nnj.extend(nn.CrossEntropyLoss())
        with nnj.collect("ggn_diag", "batch_grad"):
            loss(model(torch.randn(4, 5, 8).double()), torch.tensor([0, 2, 1, 1])).backward()
        return [t for p in model.parameters() for t in (p.ggn_diag, p.batch_grad)]

    with monkeypatch.context() as patch:
        patch.setattr("nnj.propagation.plan.carried", lambda *args: None)
        probed = collected()

    def refuse(*args):
        raise AssertionError("probed")

    monkeypatch.setattr(Sweep, "_find_sample_indices", refuse)
    for a, b in zip(collected(), probed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
