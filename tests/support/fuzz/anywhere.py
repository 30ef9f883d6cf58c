"""Steps on vectors and on sequences of them, along the last axis; and on any variable at all."""

from __future__ import annotations

from torch import nn

from tests.support.fuzz.draft import Draft, step

ROWS = "vec seq first"
ALL = "vec seq first sig img vol"
PLACES = {"sig": 1, "img": 2, "vol": 3}


def width(d: Draft, x: str) -> int:
    """How many features, or channels, x has."""
    return d.shape(x)[1 if d.kinds[x] in PLACES else -1]


def axis(d: Draft, x: str) -> int:
    """The axis of its features, or channels."""
    return 1 if d.kinds[x] in PLACES else d.values[x].dim() - 1


def linear_source(d: Draft, i: int, o: int) -> str:
    return f"nn.Linear({i}, {o}, bias={d.flag(0.8)})"


def new_layer(d: Draft, x: str, same: bool = False) -> str:
    """A call of a linear layer or a convolution; `same` keeps the shape."""
    kind, i = d.kinds[x], width(d, x)
    o = i if same else d.size()
    if kind not in PLACES:
        return f"{d.part(linear_source(d, i, o))}({x})"
    k, bias = d.pick("1", "3"), d.flag(0.7)
    padding = {"1": 0, "3": 1}[k]
    return (
        f"{d.part(f'nn.Conv{PLACES[kind]}d({i}, {o}, {k}, padding={padding}, bias={bias})')}({x})"
    )


@step(ROWS, 4)
def linear(d: Draft, x: str) -> str:
    return d.let(new_layer(d, x), d.kinds[x])


@step(ROWS, 0.7)
def odd_linear(d: Draft, x: str) -> str:
    """Layers that no rule takes as they are."""
    i, o = width(d, x), d.size()
    source = d.pick(
        f"Doubled({i}, {o})",
        f"positive(nn.Linear({i}, {o}))",
        f"parametrizations.weight_norm(nn.Linear({i}, {o}))",
        f"parametrizations.orthogonal(nn.Linear({i}, {o}))",
        f"Affine({i})",
        f"nn.Sequential(nn.Linear({i}, {o}), nn.Tanh(), nn.Linear({o}, {i}))",
        "nn.Identity()",
    )
    return d.let(f"{d.part(source)}({x})", d.kinds[x])


@step(ROWS, 1)
def norm(d: Draft, x: str) -> str:
    i = width(d, x)
    affine = d.flag(0.8)
    source = d.pick(
        f"nn.LayerNorm({i}, elementwise_affine={affine})",
        f"nn.LayerNorm({i}, bias={affine})",
        # by default its eps is that of the dtype, and the oracle has another one
        f"nn.RMSNorm({i}, eps=1e-5, elementwise_affine={affine})",
    )
    return d.let(f"{d.part(source)}({x})", d.kinds[x])


@step("vec sig img vol", 1)
def norm_of_channels(d: Draft, x: str) -> str:
    i, kind, affine = width(d, x), d.kinds[x], d.flag(0.8)
    source = d.pick(
        f"settled(nn.BatchNorm{PLACES.get(kind, 1)}d({i}, affine={affine}))",
        f"nn.GroupNorm({d.divisor(i)}, {i}, affine={affine})",
        f"nn.InstanceNorm{PLACES[kind]}d({i}, affine={affine})"
        if kind in PLACES
        else f"settled(nn.BatchNorm1d({i}, momentum=None))",
    )
    return d.let(f"{d.part(source)}({x})", kind)


@step(ALL, 3)
def activation(d: Draft, x: str) -> str:
    source = d.pick(
        "nn.ReLU()",
        "nn.Tanh()",
        "nn.Sigmoid()",
        "nn.GELU()",
        "nn.GELU(approximate='tanh')",
        "nn.SiLU()",
        "nn.ELU(0.7)",
        "nn.SELU()",
        "nn.CELU(0.5)",
        "nn.Softplus(beta=2.0)",
        "nn.LeakyReLU(0.2)",
        "nn.Hardtanh(-0.5, 0.7)",
        "nn.Mish()",
        "nn.Hardswish()",
        "nn.LogSigmoid()",
        "nn.Softsign()",
        "nn.Tanhshrink()",
        "nn.Softshrink(0.1)",
        "nn.Threshold(0.1, -0.2)",
        "nn.PReLU()",
        "nn.Dropout(0.5)",
        "nn.AlphaDropout(0.3)",
        f"nn.Softmin({axis(d, x)})",
        f"nn.Softmax({axis(d, x)})",
        f"nn.PReLU({width(d, x)})" if axis(d, x) == 1 else "nn.ReLU6()",
    )
    return d.let(f"{d.part(source)}({x})", d.kinds[x])


@step(ALL, 2)
def function(d: Draft, x: str) -> str:
    """An operation on each entry or along the features, which is no layer."""
    a = axis(d, x)
    code = d.pick(
        f"torch.tanh({x})",
        f"{x}.sigmoid()",
        f"F.relu({x})",
        f"F.gelu({x})",
        f"F.silu({x})",
        f"{x}.softmax({a})",
        f"{x}.log_softmax({a})",
        f"torch.sin({x}) + 0.1 * {x}",
        f"{x}.clamp(-0.7, 0.8)",
        f"{x}.abs() + 1",
        f"{x}.square()",
        f"{x} / (1 + {x}.square().mean({a}, keepdim=True))",
        f"{x} - {x}.mean({a}, keepdim=True)",
        f"F.normalize({x} + 0.1, dim={a}, eps=0.1)",
        f"{x}.cumsum({a})",
        f"{x}.flip({a})",
        f"{x}.roll(1, {a})",
        f"torch.where({x} > 0, {x}, 0.3 * {x})",
        f"{x}.masked_fill({x} < -0.5, 0.1)",
        f"torch.stack([{x}, {x}.tanh()], 1).mean(1)" if d.kinds[x] != "first" else f"2.0 * {x}",
        f"{x}.movedim({a}, 0).contiguous().movedim(0, {a})",
        f"3.0 * {x}.exp().clamp(max=2.0)",
        f"({x} + 0.2).pow(2)",
        f"{x}.sort({a}).values",
        f"F.dropout({x}, 0.5, training=False)",
    )
    return d.let(code, d.kinds[x])


@step(ALL, 0.7)
def own_function(d: Draft, x: str) -> str:
    code, twin = d.rng.choice(
        [
            (f"Cube.apply({x})", f"{x} ** 3"),
            (f"Scaled.apply(0.5, {x}, 'word')", f"0.5 * {x}"),
            (f"Product.apply({x}, {x}.tanh())", f"{x} * {x}.tanh()"),
        ]
    )
    return d.let(code, d.kinds[x], twin)


@step(ALL, 1)
def in_place(d: Draft, x: str) -> str:
    """What was computed by a layer that does not need its own output is written over."""
    y = d.let(new_layer(d, x), d.kinds[x])
    code = d.pick(
        f"{d.part('nn.ReLU(inplace=True)')}({y})",
        f"{d.part('nn.LeakyReLU(0.1, inplace=True)')}({y})",
        f"F.relu_({y})",
        f"{y}.tanh_()",
        f"{y}.mul_(0.5).add_(0.1)",
        f"{y}.add_({x})" if d.shape(x) == d.shape(y) else f"{y}.sigmoid_()",
    )
    return d.let(code, d.kinds[x])


@step(ALL, 1.5)
def bare_parameter(d: Draft, x: str) -> str:
    i, kind, shape = width(d, x), d.kinds[x], d.shape(x)
    per_channel = d.parameter(i, *(1,) * PLACES.get(kind, 0))
    code = d.pick(
        f"{x} * {per_channel}",
        f"{x} + {per_channel}",
        f"torch.addcmul({x}, {x}, {per_channel})",
        f"({x} * {per_channel}).tanh() + {x}",
    )
    if kind in ("vec", "seq", "img") and d.flag(0.3):
        code = f"{x} * {d.parameter(*shape[1:])}"
    if kind in ROWS.split() and d.flag(0.5):
        return matrix_parameter(d, x)
    return d.let(code, kind)


def matrix_parameter(d: Draft, x: str) -> str:
    """A weight that no layer owns, in a product."""
    i, o, dims = width(d, x), d.size(), {"vec": "n", "seq": "nt", "first": "tn"}[d.kinds[x]]
    w, b = d.parameter(i, o), d.parameter(o)
    code = d.pick(
        f"{x} @ {w}",
        f"torch.einsum('{dims}i,io->{dims}o', {x}, {w})",
        f"F.linear({x}, {w}.t(), {b})",
        f"torch.matmul({x}, {w}) + {b}",
        f"({w}.t() @ {x}.unsqueeze(-1)).squeeze(-1)",
        f"torch.addmm({b}, {x}, {w})" if len(dims) == 1 else f"torch.tensordot({x}, {w}, 1)",
    )
    return d.let(code, d.kinds[x])


@step(ALL, 1)
def again(d: Draft, x: str) -> str | None:
    """A layer that was called before."""
    kind, i = d.kinds[x], width(d, x)

    def fits(m: nn.Module) -> bool:
        if kind in PLACES:
            return isinstance(m, getattr(nn, f"Conv{PLACES[kind]}d")) and m.in_channels == i
        return isinstance(m, (nn.Linear, nn.LayerNorm)) and (
            getattr(m, "in_features", None) == i or getattr(m, "normalized_shape", None) == (i,)
        )

    found = d.layers(fits)
    return d.let(f"{d.rng.choice(found)}({x})", kind) if found else None


@step(ROWS, 0.7)
def tied(d: Draft, x: str) -> str | None:
    """A weight of two layers, or of a layer and a bare product."""
    i = width(d, x)
    same = d.layers(lambda m: type(m) is nn.Linear and m.in_features == i)
    turned = d.layers(lambda m: type(m) is nn.Linear and m.out_features == i)
    if same and d.flag():
        other = d.rng.choice(same)
        o = getattr(d.holder, other.removeprefix("self.")).out_features
        layer = d.part(f"with_weight_of({other}, {linear_source(d, i, o)})")
        return d.let(f"{layer}({x})", d.kinds[x])
    if turned:
        return d.let(f"{x} @ {d.rng.choice(turned)}.weight", d.kinds[x])
    return None


@step(ALL, 1.5)
def residual(d: Draft, x: str) -> str:
    y = new_layer(d, x, same=True)
    code = d.pick(
        f"{x} + {y}",
        f"{x} + torch.tanh({y})",
        f"{x} * torch.sigmoid({y})",
        f"torch.lerp({x}, {y}, 0.3)",
        f"torch.maximum({x}, {y})",
    )
    return d.let(code, d.kinds[x])


@step(ALL, 1.5)
def earlier(d: Draft, x: str) -> str | None:
    """A skip over several steps: with a variable from before, of the same kind."""
    same = [v for v in d.values if d.kinds[v] == d.kinds[x] and v != x]
    equal = [v for v in same if d.shape(v) == d.shape(x)]
    if equal and d.flag():
        v = d.rng.choice(equal)
        return d.let(d.pick(f"{x} + {v}", f"{x} * {v}", f"{x} - 0.5 * {v}.tanh()"), d.kinds[x])
    a = axis(d, x)
    rest = lambda s: s[:a] + s[a + 1 :]
    fitting = [v for v in same if rest(d.shape(v)) == rest(d.shape(x))]
    return d.let(f"torch.cat([{x}, {d.rng.choice(fitting)}], {a})", d.kinds[x]) if fitting else None


@step(ALL, 1)
def parts_of_features(d: Draft, x: str) -> str | None:
    a, i = axis(d, x), width(d, x)
    if i < 2:
        return None
    code = d.pick(
        f"{x}.narrow({a}, 0, {i - 1})",
        f"{x}.chunk(2, {a})[0]",
        f"torch.cat([t.tanh() if k else t for k, t in enumerate({x}.split(1, {a}))], {a})",
        f"{x}.index_select({a}, torch.tensor([1, 0, 1]))",
        f"torch.cat({x}.chunk(2, {a})[::-1], {a})",
        f"F.glu({x}, {a})" if i % 2 == 0 else f"{x}.unbind({a})[0].unsqueeze({a})",
    )
    return d.let(code, d.kinds[x])


@step("vec seq img", 0.6)
def checkpointed(d: Draft, x: str) -> str:
    i, o = width(d, x), d.size()
    layers = {
        "img": f"nn.Sequential(nn.Conv2d({i}, {o}, 1), nn.Tanh(), nn.Conv2d({o}, {i}, 1))",
    }.get(d.kinds[x], f"nn.Sequential(nn.Linear({i}, {o}), nn.Tanh(), nn.Linear({o}, {i}))")
    layer = d.part(layers)
    return d.let(f"checkpoint({layer}, {x}, use_reentrant=False)", d.kinds[x], f"{layer}({x})")


@step("vec seq img", 0.5)
def parts_of_the_batch(d: Draft, x: str) -> str | None:
    """Samples apart, and together again in their order."""
    if d.n < 2:
        return None
    if d.kinds[x] == "img":
        layer = d.part(f"nn.Conv2d({width(d, x)}, {width(d, x)}, 1)")
    else:
        layer = d.part(linear_source(d, width(d, x), width(d, x)))
    d.places_matter = True
    k = d.rng.randint(1, d.n - 1)
    index = sorted(d.rng.sample(range(d.n), k))
    code = d.pick(
        f"torch.cat([{layer}({x}[:{k}]), {layer}({x}[{k}:])])",
        f"torch.cat([{layer}({x}[:{k}]), {x}[{k}:]])",
        f"routed({layer}, {x}, torch.tensor({index}))",
        f"torch.stack([{layer}(t) for t in {x}])",
    )
    return d.let(code, d.kinds[x])
