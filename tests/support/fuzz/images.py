"""Steps on signals, images and volumes: (N, C, *places)."""

from __future__ import annotations

from tests.support.fuzz.anywhere import PLACES, new_layer, width
from tests.support.fuzz.draft import Draft, step


@step("sig img vol", 3)
def convolution(d: Draft, x: str) -> str:
    dims, i = PLACES[d.kinds[x]], width(d, x)
    groups = d.divisor(i)
    o = groups * d.size(2)
    least = min(d.shape(x)[2:])
    k = d.rng.randint(1, min(3, least))
    options = [f"groups={groups}", f"bias={d.flag(0.8)}"]
    options += [d.pick("", "stride=2"), d.pick("", f"padding={k // 2}", "padding=1")]
    if d.flag(0.1):
        options[2:] = ["padding='same'"]
    if least > 2:
        options += [d.pick("", "", "dilation=2, padding=2")] if "padding" not in options[-1] else []
    if "padding=1" in options[-1] and least > 1 and dims < 3:
        options += [d.pick("", "padding_mode='circular'", "padding_mode='reflect'")]
    listed = ", ".join(o for o in options if o)
    return d.let(f"{d.part(f'nn.Conv{dims}d({i}, {o}, {k}, {listed})')}({x})", d.kinds[x])


@step("sig img", 0.6)
def transposed_convolution(d: Draft, x: str) -> str:
    dims, i = PLACES[d.kinds[x]], width(d, x)
    options = d.pick("", ", stride=2", ", stride=2, output_padding=1", ", padding=1")
    source = f"nn.ConvTranspose{dims}d({i}, {d.size(2)}, {d.pick('2', '3')}{options})"
    return d.let(f"{d.part(source)}({x})", d.kinds[x])


@step("sig img vol", 1)
def pooling(d: Draft, x: str) -> str | None:
    dims, least = PLACES[d.kinds[x]], min(d.shape(x)[2:])
    if least < 2:
        return None
    source = d.pick(
        f"nn.MaxPool{dims}d(2)",
        f"nn.MaxPool{dims}d(2, stride=1)",
        f"nn.AvgPool{dims}d(2)",
        f"nn.AvgPool{dims}d(2, stride=1, padding=1)",
        f"nn.AdaptiveAvgPool{dims}d(2)",
        f"nn.AdaptiveMaxPool{dims}d(1)",
        f"nn.LPPool{dims}d(2, 2)" if dims < 3 else f"nn.AvgPool{dims}d(2)",
        f"nn.Dropout{dims}d(0.5)",
    )
    return d.let(f"{d.part(source)}({x})", d.kinds[x])


@step("sig img", 0.7)
def other_places(d: Draft, x: str) -> str:
    kind, last = d.kinds[x], d.shape(x)[-1]
    code = d.pick(
        f"F.pad({x}, (1, 0))",
        f"F.interpolate({x}, scale_factor=2)",
        f"{d.part('nn.Upsample(scale_factor=2)')}({x})",
        f"{x}.flip(-1)",
        f"{x}[..., : {max(last - 1, 1)}]",
        f"{x}[..., ::2]",
        f"{x}.cumsum(-1)",
        f"F.interpolate({x}, scale_factor=2, mode='bilinear')" if kind == "img" else f"2 * {x}",
        f"{x}.transpose(2, 3)" if kind == "img" else f"{x}.roll(1, -1)",
        f"{x}.contiguous(memory_format=torch.channels_last)" if kind == "img" else f"{x} + 1",
        f"F.pixel_unshuffle({x}, 2)"
        if kind == "img" and all(s % 2 == 0 for s in d.shape(x)[2:])
        else f"{d.part('nn.ZeroPad1d(1)' if kind == 'sig' else 'nn.ZeroPad2d(1)')}({x})",
    )
    return d.let(code, kind)


@step("sig img vol", 1)
def to_vectors(d: Draft, x: str) -> str:
    axes = tuple(range(2, 2 + PLACES[d.kinds[x]]))
    code = d.pick(
        f"{d.part('nn.Flatten()')}({x})",
        f"{x}.flatten(1)",
        f"{x}.view(len({x}), -1)" if d.values[x].is_contiguous() else f"{x}.flatten(1)",
        f"{x}.mean({axes})",
        f"{x}.amax({axes})",
        f"{d.part(f'nn.AdaptiveAvgPool{len(axes)}d(1)')}({x}).flatten(1)",
        f"torch.flatten({x}, 1)",
    )
    return d.let(code, "vec")


@step("sig", 0.7)
def signal_to_sequence(d: Draft, x: str) -> str:
    return d.let(d.pick(f"{x}.transpose(1, 2)", f"{x}.mT"), "seq")


@step("img", 0.7)
def patches(d: Draft, x: str) -> str:
    """Places become tokens, as in a vision transformer."""
    code = d.pick(
        f"{x}.flatten(2).transpose(1, 2)",
        f"{x}.permute(0, 2, 3, 1).flatten(1, 2)",
        f"F.unfold({x}, 2, stride=2).mT" if min(d.shape(x)[2:]) > 1 else f"{x}.flatten(2).mT",
        f"{x}.mean(2).mT",
    )
    return d.let(code, "seq")


@step("sig img", 0.5)
def gated_channels(d: Draft, x: str) -> str:
    """Squeeze and excitation."""
    i, dims = width(d, x), PLACES[d.kinds[x]]
    mean = f"{x}.mean({tuple(range(2, 2 + dims))})"
    gate = f"torch.sigmoid({d.part(f'nn.Linear({i}, {i})')}({mean}))"
    return d.let(f"{x} * {gate}[(...,) + (None,) * {dims}]", d.kinds[x])


@step("img", 0.4)
def over_places(d: Draft, x: str) -> str:
    """A norm or a linear layer on channels that stand last for it."""
    i = width(d, x)
    part = d.part(d.pick(f"nn.LayerNorm({i})", f"nn.Linear({i}, {i})"))
    return d.let(f"{part}({x}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)", "img")


@step("sig img vol", 0.5)
def dense_block(d: Draft, x: str) -> str:
    return d.let(f"torch.cat([{x}, F.relu({new_layer(d, x)})], 1)", d.kinds[x])
