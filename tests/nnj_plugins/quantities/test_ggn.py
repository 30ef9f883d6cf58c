"""The joint block: order, limit, passes, and what does not add up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from tests.support.collecting import X, Y, base, extended, net, pair
from tests.support.fitting import CLASSES, LOADER, mlp
from tests.support.fitting import X as DATA
from tests.support.oracle import Truth, close, run


@pytest.mark.parametrize("memory", [1, 2**28])
def test_of_all_parameters_by_brute_force(memory):
    case = base()
    model, losses = extended(case)
    with nnj.collect("ggn", "ggn_diag", "ggn_block", memory=memory) as context:
        run(case, model, losses).backward()
    names = [name for name, _ in model.named_parameters()]
    assert close(context.ggn, Truth(case).block(names)) == ""
    diag = torch.cat([p.ggn_diag.flatten() for p in model.parameters()])
    assert close(context.ggn.diagonal(), diag) == ""
    assert close(context.matrix("ggn").dense(), context.ggn) == ""


@pytest.mark.parametrize("how", ["in order", "turned", "inner extended first"])
def test_in_the_order_of_the_parameters(how):
    """Whatever the order is in which modules are named, or were extended."""
    torch.manual_seed(0)
    model = net()
    if how == "inner extended first":
        nnj.extend(model[2])
    nnj.extend(model)
    loss = nnj.extend(nn.CrossEntropyLoss())
    modules = [model[0], model[2]] if how == "in order" else [model[2], model[0]]
    given = None if how == "inner extended first" else modules
    with nnj.collect("ggn", "ggn_diag", modules=given) as context:
        loss(model(X), Y).backward()
    diag = torch.cat([p.ggn_diag.flatten() for p in model.parameters()])
    assert close(context.ggn.diagonal(), diag) == ""
    assert close(context.matrix("ggn").diagonal(), diag) == ""


def test_a_tied_parameter_stands_where_the_model_has_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[3].weight = model[0].weight
    nnj.extend(model)
    loss = nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn", "ggn_diag", modules=[model[2], model[3]]) as context:
        loss(model(X), Y).backward()
    order = [model[0].weight, model[2].weight, model[2].bias, model[3].bias]
    diag = torch.cat([p.ggn_diag.flatten() for p in order])
    assert close(context.ggn.diagonal(), diag) == ""
    assert close(context.matrix("ggn").diagonal(), diag) == ""


def test_frozen_ones_are_left_out_and_unreached_ones_are_zero():
    model, loss = pair()
    model.one.bias.requires_grad_(False)
    model.spare = nn.Linear(2, 1).double()
    with nnj.collect("ggn", "ggn_diag") as context:
        loss(model(X), Y).backward()
    zeros = lambda p: torch.zeros_like(p) if p.ggn_diag is None else p.ggn_diag
    trained = [p for p in model.parameters() if p.requires_grad]
    assert close(context.ggn.diagonal(), torch.cat([zeros(p).flatten() for p in trained])) == ""
    assert not bool(context.ggn[-3:].any())


def test_beyond_the_limit():
    model, loss = pair()
    message = (
        r"^the ggn of all 6 parameters would be 39 x 39, which is 0\.0 GiB, and beyond "
        r"block_limit=38\. Use ggn_block, kfac or ggn_diag, restrict collect with "
        r"modules=\[\.\.\.\], raise block_limit, or multiply by it with nnj\.GGN$"
    )
    with pytest.raises(nnj.NNJError, match=message), nnj.collect("ggn", block_limit=38):
        loss(model(X), Y).backward()
    with nnj.collect("ggn", block_limit=39):
        loss(model(X), Y).backward()
    with pytest.raises(nnj.NNJError, match="block_limit='a': the largest P is a number"):
        nnj.collect("ggn", block_limit="a")


@pytest.mark.parametrize("one_pass", [False, True])
def test_models_with_other_parameters_do_not_add_up(one_pass):
    """Of as many entries, whose sum would look right."""
    models, loss = [nnj.extend(net()) for _ in range(2)], nnj.extend(nn.CrossEntropyLoss())
    message = "^what is joint over all parameters is asked of two losses or passes that reach other"
    with pytest.raises(nnj.NNJError, match=message), nnj.collect("ggn"):
        values = [loss(model(X), Y) for model in models]
        for value in [values[0] + values[1]] if one_pass else values:
            value.backward()
    with nnj.collect("ggn", modules=models) as context:
        for model in models:
            loss(model(X), Y).backward()
    size = sum(p.numel() for p in models[0].parameters())
    assert context.ggn.shape == (2 * size, 2 * size)
    assert not bool(context.ggn[:size, size:].any()) and bool(context.ggn[size:, size:].any())


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_of_a_fit_merged_and_from_a_file(scale, tmp_path):
    loss = nn.CrossEntropyLoss()
    whole = nnj.fit(mlp(), loss, [(DATA, CLASSES)], "ggn", "ggn_diag", scale=scale)
    assert close(whole["ggn"].diagonal(), whole.vector("ggn_diag")) == ""
    fits = [nnj.fit(mlp(), loss, [batch], "ggn", "ggn_diag", scale=scale) for batch in LOADER]
    fits[0].save(tmp_path / "fit")
    merged = nnj.Fit.merge([nnj.Fit.load(tmp_path / "fit"), *fits[1:]])
    assert close(merged["ggn"], whole["ggn"]) == ""
    assert close(merged.matrix("ggn").dense(), whole["ggn"]) == ""
