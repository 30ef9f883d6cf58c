"""Every quantity at random models, losses and ways to call them, against brute force: 15 seeds."""

from __future__ import annotations

import pytest
import torch

from tests.support.fuzz.case import draw
from tests.support.fuzz.compare import EQUAL, FAILURE, REFUSED
from tests.support.fuzz.quantities import check_quantities
from tests.support.fuzz.report import quietly

SEEDS, GROUP = 15, 15


@pytest.mark.parametrize("start", range(0, SEEDS, GROUP))
def test_seeds(start):
    together, some = [], 0
    for seed in range(start, start + GROUP):
        with quietly(), torch.random.fork_rng(devices=[]):
            found = check_quantities(draw(seed))
        assert not {q: o for q, o in found.items() if o.kind == FAILURE}, f"seed {seed}"
        together.append(found["together"].kind)
        some += EQUAL in {o.kind for o in found.values()}
    # many have two losses of the same samples, of which some quantities are refused
    assert set(together) == {EQUAL, REFUSED} and some >= GROUP - 3
