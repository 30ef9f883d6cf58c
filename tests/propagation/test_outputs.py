"""How outputs are read: what is declared first, and what may be meant else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from nnj.graph.builder import Graph
from nnj.jacobians.sample_index import SampleAxis
from nnj.propagation.outputs import Outputs, Trust
from nnj.recording.records import edge_of
from tests.support.cases import Do

D, A, L, V, E = Trust.DECLARED, Trust.ALIKE, Trust.LONG, Trust.DIVIDED, Trust.LAST
# shape of the input, of the output, batch_axis, and (axis, run, trust) of each reading
READ = {
    "vectors": ((3, 4), (3, 5), 0, [(0, 1, D)]),
    "as many classes": ((3, 4), (3, 3), 0, [(0, 1, D), (1, 1, E)]),
    "sequences": ((3, 4, 5), (3, 4, 2), 0, [(0, 1, D)]),
    "as many tokens": ((3, 3, 5), (3, 3, 2), 0, [(0, 1, A), (1, 1, L)]),
    "as many channels": ((3, 2, 5, 5), (3, 3, 5, 5), 0, [(0, 1, L), (1, 1, L)]),
    "rows": ((3, 4, 5), (12, 2), 0, [(0, 4, V), (0, 1, V)]),
    "rows, sequence first": ((4, 3, 5), (12, 2), 1, [(0, 1, V), (0, 4, V)]),
    "sequence first": ((4, 3, 5), (4, 3, 2), 1, [(1, 1, D)]),
    "sequence first, joined": ((4, 3, 5), (3, 2), 1, [(0, 1, L)]),
    "sequence first, as many classes": ((4, 3, 5), (3, 3), 1, [(1, 1, L), (0, 1, L)]),
    "one before": ((3, 4), (1, 3, 2), 0, [(1, 1, L)]),
    "hidden states": ((3, 4, 5), (3, 3, 2), 0, [(0, 1, L), (1, 1, L)]),
    "in the last axis": ((4, 3), (3, 3), 1, [(1, 1, D), (0, 1, L)]),
    "nothing": ((4,), (3,), 0, []),
}


@pytest.mark.parametrize("name", READ)
def test_readings(name):
    given, shape, axis, expected = READ[name]
    model = nnj.extend(Do(lambda s, x: s.w * 1, w=torch.zeros(shape)), batch_axis=axis)
    y = model(torch.zeros(given))
    outputs = Outputs(Graph([edge_of(y)], set(model.parameters()).__contains__, {}))
    found = [reading for family in outputs.readings() for reading in family]
    assert [reading.trust for reading in found] == [trust for _, _, trust in expected]
    for reading, (a, run, _) in zip(found, expected, strict=True):
        (index,) = reading.at.values()
        along = index.along or SampleAxis(0, shape[0] // index.n)
        assert along == SampleAxis(a, run)


def test_several_calls():
    model = nnj.extend(nn.Linear(2, 5))

    def read(*sizes: int) -> list[tuple[int, Trust, bool]]:
        y = torch.cat([model(torch.randn(n, 2)) for n in sizes])
        outputs = Outputs(Graph([edge_of(y)], set(model.parameters()).__contains__, {}))
        return [(r.n, r.trust, bool(r.unsure)) for family in outputs.readings() for r in family]

    assert read(6, 2) == [(8, D, False)] and read(3, 3, 2) == [(8, D, False)]
    assert read(4, 4) == [(8, L, True), (4, L, True)]
