"""Random estimates: their mean, their variance, and the generators that they draw from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nnj
from tests.support.cases import CASES
from tests.support.collecting import X, Y, extended, pair
from tests.support.oracle import data_of, run, truth


@pytest.mark.parametrize("name", ["mlp", "called-twice"])
def test_the_mean_and_the_variance_of_ggn_diag_mc(name):
    case = CASES[name]
    model, losses = extended(case)
    value = run(case, model, losses)

    def draws(count: int, samples: int) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        generator = torch.Generator().manual_seed(4)
        for _ in range(count):
            options = {"samples": samples, "generator": generator, "verify": not found}
            with nnj.collect("ggn_diag_mc", **options):
                value.backward(retain_graph=True)
            for n, p in model.named_parameters():
                found.setdefault(n, []).append(p.ggn_diag_mc)
        return {n: torch.stack(t) for n, t in found.items()}

    one, eight = draws(300, 1), draws(150, 8)
    ratios = []
    for n in truth(name).jacobian:
        expected = truth(name).diag(n)
        for found in (one[n], eight[n]):
            error = (found.mean(0) - expected).abs()
            assert bool((error <= 6 * found.std(0) / len(found) ** 0.5 + 1e-12).all()), n
        ratios.append((one[n].var(0).sum(), eight[n].var(0).sum()))
    assert 6 < float(sum(a for a, _ in ratios) / sum(b for _, b in ratios)) < 10.7


def test_a_generator_makes_it_repeatable_and_leaves_the_global_one_alone():
    model, loss = pair()
    found = []
    for seed in (0, 0, 1):
        state = torch.get_rng_state()
        with nnj.collect("ggn_diag_mc", samples=2, generator=torch.Generator().manual_seed(seed)):
            loss(model(X), Y).backward()
        assert torch.equal(state, torch.get_rng_state())
        found.append(model.one.weight.ggn_diag_mc)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_exact_quantities_do_not_draw():
    model, loss = pair(CASES["token-major-mixed"])
    x, y = data_of(CASES["token-major-mixed"])
    state = torch.get_rng_state()
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad"):
        loss(model(x), y).backward()
    assert torch.equal(state, torch.get_rng_state())
