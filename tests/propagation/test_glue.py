"""From the samples of outputs to those of what the loss is given: what names tell is what is found
by asking, and samples that come together are taken together.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.graph.builder import Graph
from nnj.jacobians.sample_index import SampleIndex
from nnj.propagation.glue import Glue, entries_of, linked
from nnj.propagation.outputs import Outputs
from nnj.recording.records import edge_of

N, T, C = 3, 4, 2
EACH = torch.arange(N).reshape(N, 1, 1).expand(N, T, C)
NAMED = {
    "itself": lambda z: z,
    "rows": lambda z: z.flatten(0, 1),
    "token-major": lambda z: z.transpose(0, 1).flatten(0, 1),
    "class-axis": lambda z: z.permute(0, 2, 1),
    "samples-last": lambda z: z.permute(1, 2, 0),
    "first-token": lambda z: z[:, 0],
    "scaled": lambda z: 2 * z.tanh(),
}
ASKED = {
    "permuted": lambda z: z[[2, 0, 1]],
    "picked": lambda z: z[[0, 1, 2, 2], [3, 0, 0, 1]],
    "joined": lambda z: torch.cat([z, z.flip(0)]),
    "rolled": lambda z: z.roll(1, 0),
}


def glue_of(way) -> tuple[Glue, Outputs, Tensor]:
    model = nnj.extend(nn.Linear(C, C))
    y = way(model(torch.randn(N, T, C)))
    wanted = set(model.parameters())
    outputs = Outputs(Graph([edge_of(y)], wanted.__contains__, {}))
    return Glue(outputs), outputs, y


@pytest.mark.parametrize("name", NAMED | ASKED)
def test_whose_the_entries_are(name, monkeypatch):
    way = (NAMED | ASKED)[name]
    glue, outputs, y = glue_of(way)
    ((reading, *_), *_) = outputs.readings()
    expected = way(EACH) if name != "scaled" else EACH
    asked, group = glue._asked(reading)
    if name in NAMED:
        monkeypatch.setattr(Glue, "_asked", None)
    found, _ = glue.roots(reading)
    assert group is None
    for roots in (found, asked):
        (index,) = roots.values()
        of = entries_of(index, tuple(y.shape), y.device)
        assert torch.equal(of.expand(y.shape), expected)


@pytest.mark.parametrize(
    "way, groups",
    [
        (lambda z: z[:2] - z[[0, 2]], [0, 1, 1]),
        (lambda z: z - z.mean(0), [0, 0, 0]),
        (lambda z: torch.stack([z[0] + z[2], z[1]]), [0, 1, 0]),
    ],
)
def test_samples_that_come_together(way, groups):
    glue, outputs, _ = glue_of(way)
    ((reading, *_), *_) = outputs.readings()
    _, group = glue.roots(reading)
    assert group.tolist() == groups


def test_what_is_linked():
    sets = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 0]]).bool()
    assert linked(sets).tolist() == [0, 0, 1, 0]
    assert entries_of(SampleIndex(2), (4, 3), torch.device("cpu")).flatten().tolist() == [
        0,
        0,
        1,
        1,
    ]
