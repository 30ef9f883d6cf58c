"""KFAC: exact where it is published to be, and elsewhere what its formula says, of inputs and
gradients of outputs that autograd gives.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj
from nnj.jacobians.sample_index import SampleIndex
from nnj_plugins.quantities.kfac import KFAC

N, CLASSES = 4, 5


def rel(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13 * float(b.abs().max()))


def blocks(model: nn.Module, loss: Any, *batch: Any, **options: Any) -> dict[str, tuple[Any, Any]]:
    """(kfac, ggn_block) of each module."""
    nnj.extend(model)
    *inputs, y = batch
    with nnj.collect("kfac", "ggn_block", **options):
        nnj.extend(loss)(model(*inputs), y).backward()
    named = ((name, m) for name, m in model.named_modules() if getattr(m, "kfac", None) is not None)
    return {name: (m.kfac, m.ggn_block) for name, m in named}


# -- where it is G itself --------------------------------------------------------------------------

LAYERS = {
    "linear": (nn.Linear(4, 5), (3, 4)),
    "linear of sequences": (nn.Linear(4, 5), (3, 6, 4)),
    "linear of four axes": (nn.Linear(4, 5, bias=False), (3, 2, 6, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, groups=2), (3, 4, 7)),
    "same, dilated": (nn.Conv2d(2, 3, 3, padding="same", dilation=2), (3, 2, 6, 7)),
    "stride": (nn.Conv2d(2, 4, (3, 2), stride=2, padding=1), (3, 2, 6, 7)),
    "circular": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (3, 2, 5, 5)),
    "reflect": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect", groups=2), (3, 2, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "conv3d": (nn.Conv3d(2, 4, 2, groups=2), (2, 2, 3, 4, 3)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, output_padding=1), (3, 4, 5)),
    "transposed2d": (nn.ConvTranspose2d(2, 3, 3, dilation=2, padding=1), (3, 2, 4, 4)),
    "transposed3d": (nn.ConvTranspose3d(2, 4, 2, stride=2, groups=2), (2, 2, 3, 2, 2)),
    "one sample": (nn.Linear(4, 5), (1, 4)),
}


@pytest.mark.parametrize("memory", [1, 2**28])
@pytest.mark.parametrize("layer, shape", LAYERS.values(), ids=LAYERS)
def test_a_layer_with_a_square_loss_at_each_place(layer, shape, memory):
    model, x = copy.deepcopy(layer).double(), torch.randn(shape, dtype=torch.double)
    y = torch.randn_like(model(x))
    ((kfac, block),) = blocks(model, nn.MSELoss(reduction="sum"), x, y, memory=memory).values()
    close(kfac.dense(), block)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.MSELoss(reduction="sum")])
def test_deep_linear_nets_with_a_square_loss(loss):
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6, bias=False), nn.Linear(6, 3)).double()
    x, y = torch.randn(N, 4).double(), torch.randn(N, 3).double()
    found = blocks(model, loss, x, y)
    assert len(found) == 3
    for kfac, block in found.values():
        assert isinstance(kfac, nnj.matrices.Kronecker)
        close(kfac.dense(), block)


@pytest.mark.parametrize("pool", [torch.mean, torch.sum])
def test_reduce_with_pooling(pool):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.two(pool(self.one(x), 1))

    model = Pooled().double()
    x, y = torch.randn(N, 7, 4).double(), torch.randn(N, 3).double()
    found = blocks(model, nn.MSELoss(), x, y, approx="reduce")
    for kfac, block in found.values():
        close(kfac.dense(), block)


def test_one_sample_with_one_place_of_any_net_and_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, CLASSES))
    x, y = torch.randn(1, 4).double(), torch.tensor([2])
    found = blocks(model.double(), nn.CrossEntropyLoss(), x, y)
    for kfac, block in found.values():
        close(kfac.dense(), block)


# -- the formula -----------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Tokens to logits, with what a transformer has."""

    def __init__(self, linear: Any = nn.Linear):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.mix = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
        self.twice = linear(6, 6)
        self.head = linear(6, CLASSES)

    def forward(self, t: Tensor) -> Tensor:
        h = self.mix(self.table(t))
        return self.head(torch.tanh(self.twice(h)))


class Dead(nn.CrossEntropyLoss):
    """Of tokens, some of which have no target."""

    def __init__(self) -> None:
        super().__init__(ignore_index=0)


def factors(
    model: nn.Module, layer: str, t: Tensor, y: Tensor, approx: str, places: str
) -> tuple[Tensor, Tensor]:
    """S and A of a linear layer, from a factor of the whole Hessian of the loss."""
    kept: dict[str, Tensor] = {}

    def keep(m: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        kept["u"], kept["out"] = given[0].detach(), out

    handle = model.get_submodule(layer).register_forward_hook(keep)
    z = model(t).flatten(0, 1)
    handle.remove()
    value = lambda z: F.cross_entropy(z, y.flatten(), ignore_index=0)
    h = torch.autograd.functional.hessian(value, z.detach()).reshape(z.numel(), z.numel())
    values, vectors = torch.linalg.eigh(h)
    columns = (vectors * values.clamp(min=0).sqrt()).mT.reshape(-1, *z.shape)
    v = torch.stack(
        [torch.autograd.grad(z, kept["out"], column, retain_graph=True)[0] for column in columns]
    )
    u = torch.cat([kept["u"], torch.ones_like(kept["u"][..., :1])], -1)
    alive = torch.ones(t.shape, dtype=torch.bool)
    if places == "alive":
        alive = (v.abs() > 1e-12).any(-1).any(0)
    u = u * alive[..., None]
    if approx == "expand":
        s, count = torch.einsum("knto,kntp->op", v, v), alive.sum()
    else:
        v, count = v.sum(2), alive.any(1).sum()
        s = torch.einsum("kno,knp->op", v, v)
        u = (u.sum(1) / alive.sum(1).clamp(min=1)[:, None])[:, None]
    return s, torch.einsum("nti,ntj->ij", u, u) / count


@pytest.mark.parametrize("places", ["all", "alive"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_factors_of_tokens(approx, places):
    torch.manual_seed(1)
    model = Tokens().double()
    t, y = torch.randint(9, (N, 5)), torch.randint(1, CLASSES, (N, 5))
    y[0, :3] = y[1] = 0
    plain = copy.deepcopy(model)
    nnj.extend(model)
    loss = nnj.extend(Dead())
    with nnj.collect("kfac", approx=approx, places=places):
        loss(model(t).flatten(0, 1), y.flatten()).backward()
    for layer in ("head", "twice", "mix.linear1", "mix.linear2"):
        kfac = model.get_submodule(layer).kfac
        s, a = factors(plain, layer, t, y, approx, places)
        close(kfac.left[0], s)
        close(kfac.right[0], a)


def test_more_padding_is_the_same_where_dead_places_do_not_count():
    torch.manual_seed(2)
    model = nnj.extend(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double())
    loss = nnj.extend(Dead())
    x, y = torch.randn(N, 5, 4).double(), torch.randint(1, CLASSES, (N, 5))
    more = torch.cat([x, torch.randn(N, 3, 4).double()], 1), F.pad(y, (0, 3))
    found = {}
    for places in ("alive", "all"):
        for i, (inputs, wanted) in enumerate(((x, y), more)):
            with nnj.collect("kfac", places=places):
                loss(model(inputs).flatten(0, 1), wanted.flatten()).backward()
            found[places, i] = model[0].kfac.dense()
    close(found["alive", 1], found["alive", 0])
    close(found["all", 0], found["alive", 0])
    assert rel(found["all", 1], found["all", 0]) > 0.1


# -- scaling, batches, losses ----------------------------------------------------------------------


def small() -> tuple[nn.Module, Any, Tensor, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, CLASSES))
    x, y = torch.randn(9, 4).double(), torch.randint(CLASSES, (9,))
    return nnj.extend(model.double()), nnj.extend(nn.CrossEntropyLoss()), x, y


def joint(model: nn.Module, call: Any, *names: str, **options: Any) -> Tensor:
    with nnj.collect(*names or ("kfac",), **options) as context:
        call()
    return context.matrix(names[0] if names else "kfac").dense()


def test_batches_reductions_and_factors_of_the_loss():
    model, loss, x, y = small()
    whole = joint(model, lambda: loss(model(x), y).backward())
    close(joint(model, lambda: (0.5 * loss(model(x), y)).backward()), whole / 2)
    summed = nnj.extend(nn.CrossEntropyLoss(reduction="sum"))
    close(joint(model, lambda: summed(model(x), y).backward()), 9 * whole)

    def two() -> None:
        for part in (slice(0, 4), slice(4, 9)):
            summed(model(x[part]), y[part]).backward()

    close(joint(model, two), 9 * whole)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    fit = nnj.fit(model, nn.CrossEntropyLoss(), batches, "kfac", scale="mean")
    close(fit.matrix("kfac").dense(), whole)


def test_merged_fits_add_factors_and_counts(tmp_path):
    model, _, x, y = small()
    whole = nnj.fit(model, nn.CrossEntropyLoss(), [(x, y)], "kfac", scale="mean")
    parts = [
        nnj.fit(model, nn.CrossEntropyLoss(), [(x[part], y[part])], "kfac", scale="mean")
        for part in (slice(0, 2), slice(2, 9))
    ]
    parts[0].save(tmp_path / "part.pt")
    merged = nnj.Fit.merge([nnj.Fit.load(tmp_path / "part.pt"), parts[1]])
    close(merged.matrix("kfac").dense(), whole.matrix("kfac").dense())
    assert (merged.samples, merged.total) == (9, 9.0)


def test_gradients_stay_as_they_are():
    model, loss, x, y = small()
    loss(model(x), y).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    joint(model, lambda: loss(model(x), y).backward())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


def test_two_losses_of_the_same_samples_are_one():
    model, loss, x, y = small()

    def apart() -> None:
        z = model(x)
        (loss(z, y) + loss(3 * z, y)).backward()

    both = nnj.extend(lambda z, y: F.cross_entropy(z, y) + F.cross_entropy(3 * z, y))
    close(joint(model, apart), joint(model, lambda: both(model(x), y).backward()))
    with pytest.raises(nnj.NNJError, match=r"^kfac: two losses of the same samples are in one"):
        joint(model, apart, fisher="empirical")


# -- other columns ---------------------------------------------------------------------------------


def test_monte_carlo_within_five_standard_errors():
    model, loss, x, y = small()
    run = lambda: loss(model(x), y).backward()
    exact = joint(model, run)
    draws = torch.stack(
        [
            joint(model, run, fisher="mc", generator=torch.Generator().manual_seed(seed))
            for seed in range(60)
        ]
    )
    error = draws.std(0) / 60**0.5
    assert (draws.mean(0) - exact).abs().le(5 * error + 1e-12).all()
    again = joint(model, run, fisher="mc", generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, draws[0])
    many = [
        joint(model, run, fisher="mc", samples=s, generator=torch.Generator().manual_seed(0))
        for s in (1, 1000)
    ]
    assert rel(many[1], exact) < 0.1 < rel(many[0], exact)


def test_empirical_is_of_the_gradients():
    model, loss, x, y = small()
    kept: dict[str, Tensor] = {}
    handle = model[0].register_forward_hook(lambda m, given, out: kept.update(out=out))
    z = model(x)
    handle.remove()
    (g,) = torch.autograd.grad(F.cross_entropy(z, y), kept["out"])
    found = {}
    for scale in (1.0, 3.0):
        with nnj.collect("kfac", fisher="empirical"):
            (scale * loss(model(x), y)).backward()
        found[scale] = model[0].kfac
    u = torch.cat([x, torch.ones(9, 1).double()], 1)
    close(found[1.0].left[0], g.mT @ g)
    close(found[1.0].right[0], u.mT @ u / 9)
    close(found[3.0].dense(), 9 * found[1.0].dense())
    fit = nnj.fit(model, nn.CrossEntropyLoss(), [(x, y)], "kfac", scale="mean", fisher="empirical")
    close(fit["kfac"]["0"].dense(), found[1.0].dense())


def test_forward_is_of_the_inputs():
    half = nnj.extend(lambda z, y: 0.5 * z.square().sum())
    x = torch.randn(N, 3, 4).double()
    model = nn.Linear(4, 5).double()
    ((kfac, block),) = blocks(model, half, x, None, fisher="forward").values()
    close(kfac.dense(), block)
    model, loss, x, y = small()
    with nnj.collect("kfac", fisher="forward"):
        loss(model(x), y).backward()
    once = model[0].kfac.dense()
    with nnj.collect("kfac", fisher="forward"):
        (7 * loss(model(x), y)).backward()
    close(model[0].kfac.dense(), once)


@pytest.mark.parametrize("limit", [10_000, 3])
@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(4), lambda: nn.GroupNorm(2, 4)])
def test_forward_of_norms_and_lone_biases(make: Any, limit: int):
    """The GGN of half the summed squares of their own output, or its diagonal."""
    half = nnj.extend(lambda z, y: 0.5 * z.square().sum())
    lone = nn.Linear(4, 4)
    lone.weight.requires_grad_(False)
    for m in (make().double(), lone.double()):
        x = torch.randn(N, 4).double()
        nnj.extend(m)
        with nnj.collect("kfac", "ggn_block", fisher="forward", modules=[m]) as context:
            half(m(x), None).backward()
        kfac, block = context.matrix("kfac").dense(), m.ggn_block
        close(kfac, block)
        with nnj.collect("kfac", fisher="forward", block_limit=limit):
            half(m(x), None).backward()
        close(m.kfac.dense(), block if limit > 3 else block.diagonal().diag())


@pytest.mark.parametrize("fisher", ["exact", "empirical", "forward"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_the_same_blocks(dtype: torch.dtype, fisher: str):
    """Joint biases, and norms, as in single precision."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, CLASSES))
    x, y, found = torch.randn(5, 3), torch.arange(5) % CLASSES, []
    for other in (torch.float32, dtype):
        nnj.extend(model.to(other))
        with nnj.collect("kfac", fisher=fisher):
            nnj.extend(nn.CrossEntropyLoss())(model(x.to(other)), y).backward()
        found.append([model[i].kfac for i in (0, 2, 3)])
    for one, half in zip(*found, strict=True):
        assert type(one) is type(half)
        scale = float(one.dense().abs().max())
        torch.testing.assert_close(one.dense(), half.dense().float(), rtol=0, atol=0.05 * scale)


class Twice(nn.Module):
    """Two outputs, of which the second is of one layer more, the first once again or another."""

    def __init__(self, again: bool):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.LayerNorm(3)
        self.third = self.one if again else nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.two(self.one(x))
        return z, self.third(z)


def test_forward_of_two_losses_of_the_same_samples_counts_inputs_once():
    x, y = torch.randn(N, 3).double(), torch.arange(N) % 3
    loss, model = nnj.extend(nn.CrossEntropyLoss()), nnj.extend(Twice(False).double())
    found = []
    for both in (False, True):
        with nnj.collect("kfac", fisher="forward"):
            one, two = model(x)
            (loss(two, y) + (loss(one, y) if both else 0)).backward()
        found.append([m.kfac.dense() for m in (model.one, model.two, model.third)])
    for alone, together in zip(*found, strict=True):
        close(together, alone)
    model = nnj.extend(Twice(True).double())
    match = "^kfac: two losses of the same samples see other inputs of a module"
    with pytest.raises(nnj.NNJError, match=match), nnj.collect("kfac", fisher="forward"):
        one, two = model(x)
        (loss(two, y) + loss(one, y)).backward()


def test_forward_of_scales_along_two_axes_is_refused():
    """J^T J between them is no diagonal."""
    x, u = torch.randn(N, 3, 3).double(), torch.randn(1, N, 3, 3).double()
    scales = [
        nnj.ScaleShift((3,), (3, 3), x, m=lambda: x),
        nnj.ScaleShift((3,), (3, 3), x, last=False),
    ]
    params = [nn.Parameter(torch.randn(3).double()) for _ in scales]
    module = nn.Module()
    module.weight, module.bias = params
    factors = [j.pullback(u, SampleIndex(N)) for j in scales]
    quantity = KFAC(fisher="forward")
    match = "^kfac: two parameters of a module scale its output along other axes"
    with pytest.raises(nnj.NNJError, match=match):
        quantity.add(quantity.start(module, params), factors, params, 1)


# -- what is at which module -----------------------------------------------------------------------


def test_biases_apart_frozen_and_missing():
    model, loss, x, y = small()
    with nnj.collect("kfac", "ggn_block", bias="separate"):
        loss(model(x), y).backward()
    m = model[0]
    close(m.kfac.dense()[24:, 24:], m.ggn_block[24:, 24:])
    assert not m.kfac.dense()[24:, :24].any()
    joint_one = nnj.fit(model, nn.CrossEntropyLoss(), [(x, y)], "kfac")["kfac"]["0"]
    m.bias.requires_grad_(False)
    with nnj.collect("kfac"):
        loss(model(x), y).backward()
    assert m.kfac.right.shape == (1, 4, 4)
    close(m.kfac.dense() * 9, joint_one.block("weight").dense())
    m.bias.requires_grad_(True)
    m.weight.requires_grad_(False)
    with nnj.collect("kfac", "ggn_block"):
        loss(model(x), y).backward()
    assert isinstance(m.kfac, nnj.matrices.Dense)
    close(m.kfac.dense(), m.ggn_block)


def test_norms_have_their_block_or_beyond_a_limit_their_diagonal():
    model, loss, x, y = small()
    with nnj.collect("kfac", "ggn_block", "ggn_diag"):
        loss(model(x), y).backward()
    close(model[2].kfac.dense(), model[2].ggn_block)
    with nnj.collect("kfac", block_limit=11):
        loss(model(x), y).backward()
    assert isinstance(model[2].kfac, nnj.matrices.Diagonal)
    close(model[2].kfac.diagonal(), torch.cat([p.ggn_diag for p in model[2].parameters()]))
    assert isinstance(model[0].kfac, nnj.matrices.Kronecker)


def test_attention_has_a_factor_for_each_projection_and_a_table_a_diagonal():
    torch.manual_seed(4)
    model = nnj.extend(Tokens().double())
    loss = nnj.extend(nn.CrossEntropyLoss())
    t, y = torch.randint(9, (N, 5)), torch.randint(CLASSES, (N * 5,))
    with nnj.collect("kfac", "ggn_diag"):
        loss(model(t).flatten(0, 1), y).backward()
    attention = model.mix.self_attn
    assert [type(part.matrix) for part in attention.kfac.parts] == [nnj.matrices.Kronecker] * 3
    assert [part.matrix.form for part in attention.kfac.parts] == [(1, 6, 7)] * 3
    table = model.table.kfac
    assert table.left.shape == (1, 9) and table.right.shape == (1, 6, 6)
    counts = torch.bincount(t.flatten(), minlength=9).double()
    close(table.left[0], counts / t.numel())
    everywhere = {m for m in model.modules() if list(m.parameters(recurse=False))}
    assert all(m.kfac is not None for m in everywhere)


def test_two_uses_of_a_weight_are_more_places():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            self.first = self.a(x)
            self.second = self.a(torch.tanh(self.first))
            return self.b(self.second)

    torch.manual_seed(5)
    model, loss = nnj.extend(Twice().double()), nnj.extend(nn.CrossEntropyLoss(reduction="sum"))
    x, y = torch.randn(N, 4).double(), torch.randint(CLASSES, (N,))
    with nnj.collect("kfac"):
        loss(model(x), y).backward()
    u = torch.cat([x, torch.tanh(model.first.detach())])
    u = torch.cat([u, torch.ones(2 * N, 1).double()], 1)
    close(model.a.kfac.right[0], u.mT @ u / (2 * N))
    z = model(x)
    h = [torch.autograd.functional.hessian(lambda q, i=i: F.cross_entropy(q, y[i]), z[i].detach())
         for i in range(N)]  # fmt: skip
    s = torch.zeros(4, 4).double()
    for i in range(N):
        for out in (model.first, model.second):
            j = torch.stack(
                [torch.autograd.grad(z[i, c], out, retain_graph=True)[0][i] for c in range(CLASSES)]
            )
            s += j.mT @ h[i] @ j
    close(model.a.kfac.left[0], s)


def test_compiled_as_eager():
    model, loss, x, y = small()
    eager = joint(model, lambda: loss(model(x), y).backward())
    step = nnj.compile(model, loss, "kfac", backend="aot")
    for _ in range(4):
        _, results = step(x, y)
    assert step.reasons == [] and step.replays >= 1
    close(results["kfac"]["0"].dense(), eager[:30, :30])
    close(model[3].kfac.dense(), eager[42:, 42:])


OPTIONS = {
    "approx": r"^approx='x', expected one of 'expand', 'reduce'$",
    "fisher": r"^fisher='x', expected one of 'exact', 'mc', 'empirical', 'forward'$",
    "bias": r"^bias='x', expected one of 'joint', 'separate'$",
    "places": r"^places='x', expected one of 'all', 'alive'$",
}


@pytest.mark.parametrize("option, message", OPTIONS.items())
def test_options_of_another_kind(option, message):
    with pytest.raises(nnj.NNJError, match=message):
        nnj.collect("kfac", **{option: "x"})


@pytest.mark.parametrize("name", ["kfac", "ekfac", "ggn", "ggn_block"])
def test_a_limit_that_is_no_number(name):
    with pytest.raises(nnj.NNJError, match=r"^block_limit='x': the largest P is a number$"):
        nnj.collect(name, block_limit="x")


def test_signed_is_refused():
    with pytest.raises(nnj.NNJError, match=r"^kfac cannot be collected with signed=True"):
        nnj.collect("kfac", signed=True)
