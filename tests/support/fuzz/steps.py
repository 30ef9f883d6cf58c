"""Steps strung together: a random model, and the kind of its output."""

from __future__ import annotations

import random

from torch import Tensor, nn

import tests.support.fuzz.images
import tests.support.fuzz.sequences  # noqa: F401
from tests.support.fuzz.anywhere import PLACES, width
from tests.support.fuzz.draft import STEPS, Draft, Unfit

KINDS = {"vec": 4, "seq": 3, "img": 3, "sig": 1.5, "vol": 0.5, "tok": 1.5, "first": 1.5}
MOST = 24  # entries of the output of a sample


def draw_input(rng: random.Random, n: int, kind: str) -> str:
    """The source of an input, in one of the layouts in which data comes; D is its dtype."""
    r = rng.randint
    if kind == "tok":
        return f"torch.randint(5, ({n}, {r(1, 4)}))"
    shapes = {
        "vec": (n, r(1, 5)),
        "seq": (n, r(1, 4), r(1, 4)),
        "first": (r(1, 4), n, r(1, 4)),
        "sig": (n, r(1, 3), r(2, 6)),
        "img": (n, r(1, 2), r(2, 5), r(2, 5)),
        "vol": (n, r(1, 2), r(2, 3), r(2, 3), r(2, 3)),
    }
    shape = shapes[kind]
    layout = rng.random()
    if layout < 0.05 and kind != "first":
        return f"torch.randn{(1, *shape[1:])}, dtype=D).expand({n}, *{shape[1:]})".replace(
            "),", ",", 1
        )
    if layout < 0.1:
        turned = (*shape[:-2], shape[-1], shape[-2])
        return f"torch.randn({turned}, dtype=D).mT"
    if layout < 0.15:
        return f"torch.randn({(*shape[:-1], 2 * shape[-1])}, dtype=D)[..., ::2]"
    if layout < 0.3 and kind == "img":
        return f"torch.randn({shape}, dtype=D).contiguous(memory_format=torch.channels_last)"
    return f"torch.randn({shape}, dtype=D" + (", requires_grad=True)" if layout > 0.95 else ")")


def take(d: Draft, x: str) -> str:
    """One step that fits, or x itself."""
    steps = STEPS[d.kinds[x]]
    for _ in range(5):
        name = d.rng.choices(list(steps), [weight for _, weight in steps.values()])[0]
        before = len(d.lines), dict(d.values), dict(d.kinds)
        try:
            found = steps[name][0](d, x)
        except Unfit:
            found = None
        if found is not None:
            d.used.append(name)
            return found
        del d.lines[before[0] :]
        d.values, d.kinds = before[1], before[2]
    return x


def draw_model(rng: random.Random, x: Tensor, kind: str) -> tuple[Draft, list[str]]:
    """A model and the variables that it returns: mostly one.

    Errors: `Unfit` if it has no parameter, or more outputs than the oracle is to take.
    """
    d = Draft(rng, x, kind)
    found = "x"
    for _ in range(rng.randint(1, 6)):
        found = take(d, found)
    found = finish(d, found)
    results = [found]
    inner = [v for v in d.values if v not in ("x", found) and d.kinds[v] in ("vec", "seq", "img")]
    if inner and kind != "first" and d.flag(0.08):
        results.append(rng.choice(inner))
    d.finish(*results)
    if sum(d.values[v].numel() for v in results) > MOST * d.n:
        raise Unfit("too many outputs")
    if not any(True for _ in d.holder.parameters()):
        raise Unfit("no parameters")
    return d, results


def finish(d: Draft, x: str) -> str:
    """A head, or none."""
    if d.kinds[x] == "tok":
        x = STEPS["tok"]["embedding"][0](d, x) or x
    if d.kinds[x] == "seq" and d.flag():
        x = STEPS["seq"]["from_sequence"][0](d, x) or x
    if d.kinds[x] in PLACES and (d.kinds[x] == "vol" or d.flag(0.6)):
        x = STEPS[d.kinds[x]]["to_vectors"][0](d, x) or x
    c, kind = d.rng.choice([1, 2, 2, 3, 3, 4]), d.kinds[x]
    if d.flag(0.8):
        layer = (
            f"nn.Conv{PLACES[kind]}d({width(d, x)}, {c}, 1)"
            if kind in PLACES
            else f"nn.Linear({width(d, x)}, {c}, bias={d.flag(0.8)})"
        )
        x = d.let(f"{d.part(layer)}({x})", kind)
    if kind == "vec" and width(d, x) == 1 and d.flag():
        return d.let(f"{x}.squeeze(-1)", "one")
    if d.flag(0.05):
        return d.let(f"torch.sigmoid({x})", kind)
    return x


def frozen(rng: random.Random, model: nn.Module) -> list[str]:
    """Parameters that are not to be trained: mostly none."""
    names = [name for name, _ in model.named_parameters()]
    chance = rng.random()
    if chance < 0.8 or len(names) < 2:
        return []
    if chance < 0.9:
        first = names[0].split(".")[0]
        found = [name for name in names if name.split(".")[0] == first]
    else:
        found = rng.sample(names, rng.randint(1, len(names) - 1))
    return found if len(found) < len(names) else []
