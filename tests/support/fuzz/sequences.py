"""Steps on vectors that become sequences, on sequences, and on tokens."""

from __future__ import annotations

from tests.support.fuzz.anywhere import linear_source, width
from tests.support.fuzz.draft import Draft, step


@step("vec", 1)
def to_sequence(d: Draft, x: str) -> str:
    i = width(d, x)
    t = d.divisor(i)
    code = d.pick(
        f"{x}.reshape(len({x}), {t}, {i // t})",
        f"{x}.unflatten(1, ({t}, {i // t}))",
        f"{x}[:, None].expand(-1, {d.size(3)}, -1)",
        f"{x}.unsqueeze(-1)",
        f"{x}.repeat(1, 2).view(len({x}), 2, {i})",
        f"torch.einsum('ni,t->nti', {x}, {d.parameter(d.size(3))})",
    )
    return d.let(code, "seq")


@step("vec", 0.5)
def products_of_features(d: Draft, x: str) -> str:
    i, o = width(d, x), d.size(3)
    code = d.pick(
        f"{d.part(f'nn.Bilinear({i}, {i}, {o})')}({x}, {x}.tanh())",
        f"torch.einsum('ni,nj->nij', {x}, {x}).flatten(1)",
        f"torch.exp(-({x}[:, None] - {d.parameter(o, i)}).square().sum(-1))",
    )
    return d.let(code, "vec")


@step("tok", 3)
def embedding(d: Draft, x: str) -> str:
    f, t = d.size(), d.shape(x)[1]
    table = d.part(f"nn.Embedding(5, {f}{d.pick('', ', padding_idx=0')})")
    code = d.pick(
        f"{table}({x})",
        f"{table}({x}) + {d.part(f'nn.Embedding({t}, {f})')}(torch.arange({t}))",
        f"{table}({x}) + {d.parameter(1, t, f)}",
        f"F.embedding({x}, {d.parameter(5, f)})",
        f"F.one_hot({x}, 5).to({table}.weight.dtype) @ {d.parameter(5, f)}",
    )
    return d.let(code, "seq")


@step("tok", 0.5)
def bag(d: Draft, x: str) -> str:
    mode = d.pick("sum", "mean")
    return d.let(f"{d.part(f'nn.EmbeddingBag(5, {d.size()}, mode={mode!r})')}({x})", "vec")


@step("seq", 2)
def attention(d: Draft, x: str) -> str:
    e, t = width(d, x), d.shape(x)[1]
    heads = d.divisor(e)
    causal = f", attn_mask=torch.triu(torch.ones({t}, {t}, dtype=torch.bool), 1)"
    padding = f", key_padding_mask=(torch.arange({t}) == {t - 1}).expand(len({x}), {t})"
    masks = d.pick("", causal, padding) if t > 1 else ""
    mha = f"nn.MultiheadAttention({e}, {heads}, bias={d.flag(0.8)}, batch_first=True)"
    encoder = (
        f"nn.TransformerEncoderLayer({e}, {heads}, {d.size(3)}, batch_first=True, "
        f"norm_first={d.flag()}, activation={d.pick('relu', 'gelu')!r})"
    )
    code = d.pick(
        f"{d.part(mha)}({x}, {x}, {x}, need_weights={d.flag()}{masks})[0]",
        f"{d.part(encoder)}({x})",
        by_hand(d, x),
    )
    return d.let(code, "seq")


def by_hand(d: Draft, x: str) -> str:
    """Attention from linear layers: fused, or in matrix products."""
    e, t = width(d, x), d.shape(x)[1]
    q, k, v = (f"{d.part(linear_source(d, e, e))}({x})" for _ in range(3))
    mask = f"torch.ones({t}, {t}, dtype=torch.bool).tril()"
    heads = d.divisor(e)
    split = lambda s: f"{s}.unflatten(2, ({heads}, {e // heads})).transpose(1, 2)"
    return d.pick(
        f"F.scaled_dot_product_attention({q}, {k}, {v}, is_causal={d.flag()})",
        f"F.scaled_dot_product_attention({split(q)}, {split(k)}, {split(v)})"
        ".transpose(1, 2).flatten(2)",
        f"({q} @ {k}.mT / 2).softmax(-1) @ {v}",
        f"({q} @ {k}.mT).masked_fill(~{mask}, -1e4).softmax(-1) @ {v}",
        f"torch.bmm(torch.bmm({q}, {k}.transpose(1, 2)).softmax(-1), {v})",
        f"torch.einsum('nts,nsd->ntd', torch.einsum('ntd,nsd->nts', {q}, {k}).softmax(-1), {v})",
    )


@step("seq first", 1)
def recurrent(d: Draft, x: str) -> str:
    kind, h = d.kinds[x], d.size(3)
    first, both = kind == "seq", d.flag(0.25)
    cls = d.pick("LSTM", "GRU", "RNN")
    options = f"batch_first={first}, bidirectional={both}, num_layers={d.pick('1', '1', '2')}"
    cell = d.part(f"nn.{cls}({width(d, x)}, {h}, {options})")
    hidden = f"{cell}({x})[1]" + ("[0]" if cls == "LSTM" else "")
    if d.flag(0.25):
        return d.let(d.pick(f"{hidden}[-1]", f"{hidden}.transpose(0, 1).flatten(1)"), "vec")
    return d.let(f"{cell}({x})[0]", kind)


@step("first", 1)
def attention_of_sequence_first(d: Draft, x: str) -> str:
    e = width(d, x)
    layer = d.part(f"nn.MultiheadAttention({e}, {d.divisor(e)})")
    return d.let(f"{x} + {layer}({x}, {x}, {x}, need_weights=False)[0]", "first")


@step("first", 1)
def from_sequence_first(d: Draft, x: str) -> str:
    code, kind = d.rng.choice(
        [
            (f"{x}.transpose(0, 1)", "seq"),
            (f"{x}.mean(0)", "vec"),
            (f"{x}[-1]", "vec"),
            (f"{x}.permute(1, 2, 0)", "sig"),
            (f"{x}.sum(0) + {x}[0]", "vec"),
            (f"{x}.permute(1, 0, 2).flatten(1)", "vec"),
        ]
    )
    return d.let(code, kind)


@step("seq", 1.5)
def from_sequence(d: Draft, x: str) -> str:
    code = d.pick(
        f"{x}.mean(1)",
        f"{x}.sum(1)",
        f"{x}.amax(1)",
        f"{x}.max(1).values",
        f"{x}[:, -1]",
        f"{x}[:, 0]",
        f"{x}.flatten(1)",
        f"{x}.reshape(len({x}), -1)",
        f"torch.cat([{x}.mean(1), {x}[:, 0]], 1)",
        f"{x}.logsumexp(1)",
    )
    return d.let(code, "vec")


@step("seq", 1.5)
def along_the_sequence(d: Draft, x: str) -> str:
    _, t, f = d.shape(x)
    code = d.pick(
        f"{x} + {d.parameter(t, f)}",
        f"torch.cat([{d.parameter(1, 1, f)}.expand(len({x}), -1, -1), {x}], 1)",
        f"{x}.masked_fill(torch.arange({t})[None, :, None] == 1, 0.0)",
        f"{x} * (torch.arange({t}) != 1)[:, None]",
        f"{x}.cumsum(1)",
        f"{x}.flip(1)",
        f"{x} - {x}.mean(1, keepdim=True)",
        f"{x}[:, torch.randperm({t}, generator=torch.Generator().manual_seed(0))]",
        f"F.pad({x}, (0, 0, 1, 0))",
        f"{d.parameter(t, t)} @ {x}",
        f"torch.einsum('nti,ts->nsi', {x}, {d.parameter(t, t)})",
        f"({x}.mT @ {x})",
    )
    return d.let(code, "seq")


@step("seq", 1)
def tokens_as_rows(d: Draft, x: str) -> str:
    """Tokens are rows for some layers, in the order of samples or of places."""
    n, (_, t, f) = f"len({x})", d.shape(x)
    layer = d.part(linear_source(d, f, d.size()))
    activated = d.pick("{}", "torch.tanh({})", "{}.relu()")
    rows = activated.format(f"{layer}({x}.reshape(-1, {f}))")
    places = activated.format(f"{layer}({x}.transpose(0, 1).flatten(0, 1))")
    code = d.pick(
        f"{rows}.unflatten(0, ({n}, {t}))",
        f"{rows}.view({n}, {t}, -1)",
        f"{places}.unflatten(0, ({t}, {n})).transpose(0, 1)",
    )
    return d.let(code, "seq")


@step("seq", 0.7)
def recurrent_sequence_first(d: Draft, x: str) -> str:
    cell = d.part(f"nn.{d.pick('LSTM', 'GRU')}({width(d, x)}, {d.size(3)})")
    return d.let(f"{cell}({x}.transpose(0, 1))[0].transpose(0, 1)", "seq")


@step("seq", 0.7)
def sequence_to_signal(d: Draft, x: str) -> str:
    return d.let(d.pick(f"{x}.transpose(1, 2)", f"{x}.permute(0, 2, 1)", f"{x}.mT"), "sig")


@step("vec", 0.3)
def cells(d: Draft, x: str) -> str:
    h = d.size(3)
    code = d.pick(
        f"{d.part(f'nn.GRUCell({width(d, x)}, {h})')}({x})",
        f"{d.part(f'nn.LSTMCell({width(d, x)}, {h})')}({x})[0]",
        f"{d.part(f'nn.RNNCell({width(d, x)}, {h})')}({x})",
    )
    return d.let(code, "vec")
