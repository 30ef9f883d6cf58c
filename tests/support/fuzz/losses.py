"""What is made of the output z of a model: something between it and the loss, the loss, and what it
enters the scalar with.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.support.fuzz.pieces import NAMES


@dataclass(frozen=True)
class Term:
    """One loss of the scalar.

    Args:
        loss: its source, with {reduction} in place of its reduction where it has one.
        reduction: that reduction; "" for a function of a user.
        output: what it is given, in terms of z.
        target: the source of the target.
        around: what is made of its value, {} being the call.
        whole: "sum" or "mean", for a loss of a user: what it does with the rows of its input.
        rows: how many rows of the target a sample has, one behind the other; 0 if rows are not in
            the order of the samples.
        more: further arguments.
    """

    loss: str
    reduction: str
    output: str
    target: str
    around: str
    whole: str
    rows: int
    more: str = ""

    def source(self, reduction: str = "") -> str:
        return self.loss.format(reduction=repr(reduction or self.reduction))


def literal(t: Tensor) -> str:
    return f"torch.tensor({t.tolist()})"


# -- between the output and the loss ---------------------------------------------------------------


def of_rows(rng: random.Random, n: int) -> list[str]:
    """Along axis 0, of n rows: some of them, in another order, or more than once."""
    order = list(range(n))
    rng.shuffle(order)
    some = sorted(rng.sample(range(n), rng.randint(1, n)))
    repeated = sorted(rng.choices(range(n), k=n + rng.randint(0, 2)))
    mask = torch.zeros(n, dtype=torch.bool).index_fill(0, torch.tensor(some), True)
    shuffled = [*repeated]
    rng.shuffle(shuffled)
    return [
        f"z[torch.tensor({order})]",
        f"z[{literal(mask)}]",
        f"z[torch.tensor({repeated})]",
        f"z[torch.tensor({shuffled})]",
        f"z.index_select(0, torch.tensor({some}))",
        "torch.cat([z, z.flip(0)])",
        "torch.cat([z, 2 * z])",
        "z.flip(0)",
        "z.roll(1, 0)",
        "z.repeat_interleave(2, 0)",
        *(["z[1:]", "z[::2]", f"z[: {n - 1}]", "torch.cat([z[1:], z[:1]])"] if n > 1 else []),
    ]


def within(z: Tensor, kind: str) -> list[tuple[str, int]]:
    """What leaves samples in their order, and how many rows each has then."""
    c = z.shape[-1] if z.dim() > 1 else 1
    if kind == "one":
        return [("z", 1), ("z.unsqueeze(-1)", 1)]
    if kind == "vec":
        found = [("z", 1)] * 4 + [("z[:, :, None]", 1), ("(2 * z + 1)", 1), ("z.flip(1)", 1)]
        if c % 2 == 0:
            found += [(f"z.reshape(-1, {c // 2})", 2), (f"z.view(len(z), 2, {c // 2}).mT", 1)]
        return found
    if kind == "seq":
        t = z.shape[1]
        found = [("z.flatten(0, 1)", t)] * 2 + [(f"z.reshape(-1, {c})", t), ("z[:, -1]", 1)]
        found += [("z.transpose(1, 2)", 1), ("z.mean(1)", 1), ("z", 1), ("z.flatten(1)", 1)]
        return found + ([(f"z[:, :-1].reshape(-1, {c})", t - 1)] if t > 1 else [])
    if kind == "first":
        return [("z[-1]", 1), ("z.permute(1, 2, 0)", 1), ("z.transpose(0, 1).flatten(0, 1)", 0)]
    places = z.dim() - 2
    last = {1: "z.transpose(1, 2).flatten(0, 1)", 2: "z.permute(0, 2, 3, 1).flatten(0, 2)"}
    size = z[0, 0].numel()
    return [("z", 1), ("z", 1), (last[places], size), ("z.flatten(2).mean(2)", 1)]


def across(rng: random.Random, z: Tensor, kind: str, n: int) -> list[str]:
    """What puts rows into another order."""
    if kind == "first":
        return ["z.flatten(0, 1)", f"z.reshape(-1, {z.shape[-1]})", "z.transpose(0, 1)", "z[0]"]
    found = of_rows(rng, n)
    if kind == "seq":
        mask = torch.rand(z.shape[:2]) < 0.6
        mask[rng.randrange(n), rng.randrange(z.shape[1])] = True
        found += ["z.transpose(0, 1).flatten(0, 1)", "z.permute(1, 2, 0)"]
        found += [f"z[{literal(mask)}]"] * 2
    return found


def of_entries_alone(z: Tensor, kind: str) -> list[str]:
    """What puts samples where a loss over rows would have them influence one another."""
    found = ["z[None]"]
    if kind in ("vec", "seq", "first"):
        found += ["z.transpose(0, 1)", "z.transpose(0, 1).contiguous()"]
    return found + (["z", "z.mT"] if kind == "first" else [])


def draw_glue(rng: random.Random, z: Tensor, kind: str, n: int) -> tuple[str, int, bool]:
    """The source of what the loss is given, the rows that each sample has in it, or 0, and whether
    axis 0 has rows of their own.
    """
    chance = rng.random()
    if chance < 0.7:
        return *rng.choice(within(z, kind)), True
    if chance < 0.95:
        return rng.choice(across(rng, z, kind, n)), 0, True
    return rng.choice(of_entries_alone(z, kind)), 0, False


# -- losses ----------------------------------------------------------------------------------------


def of_classes(rng: random.Random, z: Tensor) -> tuple[str, str, str]:
    """A loss over classes in axis 1 of z; what is made of z; the target."""
    r, c, *places = z.shape
    shape = (r, *places)
    weight = f", weight={literal(torch.linspace(0.3, 1.9, c))}" if rng.random() < 0.3 else ""
    of_shares = f"nn.CrossEntropyLoss(reduction={{reduction}}{weight}"
    ints = f"torch.randint({c}, {shape})"
    if rng.random() < 0.25:
        ignore = rng.choice([-100, 0])
        ints = f"{ints}.masked_fill(torch.rand({shape}) < 0.3, {ignore})"
        if c == 1 and ignore == 0:
            ints = f"torch.randint({c}, {shape})"
        weight += f", ignore_index={ignore}" if ignore == 0 and c > 1 else ""
    smooth = ", label_smoothing=0.2" if rng.random() < 0.2 else ""
    shares = f"torch.randn({tuple(z.shape)}, dtype=D).softmax(1)"
    log_target = rng.random() < 0.3
    of_logs = f"{shares}.log()" if log_target else shares
    return rng.choice(
        [
            (f"nn.CrossEntropyLoss(reduction={{reduction}}{weight}{smooth})", "{}", ints),
            (f"nn.CrossEntropyLoss(reduction={{reduction}}{weight}{smooth})", "{}", ints),
            (f"{of_shares}{smooth})", "{}", shares),
            (f"nn.NLLLoss(reduction={{reduction}}{weight})", "F.log_softmax({}, 1)", ints),
            (
                f"nn.KLDivLoss(reduction={{reduction}}, log_target={log_target})",
                "{}.log_softmax(1)",
                of_logs,
            ),
        ]
    )


def of_entries(rng: random.Random, z: Tensor, rows: bool) -> tuple[str, str, str]:
    """A loss over the entries of z, or over its rows; what is made of z; the target."""
    shape = tuple(z.shape)
    real, bits = f"torch.randn({shape}, dtype=D)", f"torch.randint(2, {shape}).to(D)"
    spread = f"3 * {real}"
    per_class = literal(torch.linspace(0.4, 1.6, shape[-1]) if len(shape) > 1 else torch.ones(1))
    options = [
        ("nn.MSELoss(reduction={reduction})", "{}", real),
        ("nn.MSELoss(reduction={reduction})", "{}", real),
        ("nn.HuberLoss(reduction={reduction}, delta=0.8)", "{}", spread),
        ("nn.SmoothL1Loss(reduction={reduction}, beta=1.3)", "{}", spread),
        ("nn.BCEWithLogitsLoss(reduction={reduction})", "{}", bits),
        (f"nn.BCEWithLogitsLoss(reduction={{reduction}}, pos_weight={per_class})", "{}", bits),
        (f"nn.BCEWithLogitsLoss(reduction={{reduction}}, weight={per_class})", "{}", bits),
        ("nn.PoissonNLLLoss(reduction={reduction})", "{}", f"torch.randint(4, {shape}).to(D)"),
        ("nn.GaussianNLLLoss(reduction={reduction})", "{}", real),
        ("nn.SoftMarginLoss(reduction={reduction})", "{}", f"2 * {bits} - 1"),
        ("nn.L1Loss(reduction={reduction})", "{}", spread),
        ("quartic", "{}", real),
        ("log_cosh", "{}", real),
    ]
    if len(shape) > 1 and rows:
        options += [("of_differences", "{}", real), ("soft_max", "{}", real)]
    return rng.choice(options)


def draw_term(
    rng: random.Random, z: Tensor, kind: str, n: int, signed: bool = False, name: str = "z"
) -> Term:
    """A loss of the output z of a model; `signed`: it need not be convex, nor its factor positive.

    Args:
        name: what z is called.
    """
    if name != "z":
        term = draw_term(rng, z, kind, n, signed)
        return replace(term, output=re.sub(r"\bz\b", name, term.output))
    glue, rows, apart = draw_glue(rng, z, kind, n)
    given = eval(glue, NAMES | {"z": z})
    probable = bool(((given > 0) & (given < 1)).all()) and rng.random() < 0.2
    if apart and given.dim() > 1 and rng.random() < 0.55:
        loss, made, target = of_classes(rng, given)
    elif probable:
        bits = f"torch.randint(2, {tuple(given.shape)}).to(D)"
        loss, made, target = "nn.BCELoss(reduction={reduction})", "{}", bits
    else:
        loss, made, target = of_entries(rng, given, apart)
    around = rng.choice(["{}"] * 6 + ["0.5 * {}", "{} / 3", "2.5 * {}", "({} + {}) / 4"])
    if signed and rng.random() < 0.6:
        loss, made, target = "wavy", "{}", f"torch.randn({tuple(given.shape)}, dtype=D)"
    elif signed:
        around = "-0.7 * {}"
    if "reduction" not in loss:
        whole = "mean" if loss == "log_cosh" else "sum"
        return Term(loss, "", made.format(glue), target, around, whole, rows)
    reduction = rng.choice(["mean", "mean", "sum", "none"])
    if loss.startswith("nn.KLDivLoss") and rng.random() < 0.5:
        reduction = "batchmean"
    if reduction == "none":
        around = around.replace("{}", rng.choice(["{}.sum()", "{}.mean()", "(0.3 * {}).sum()"]))
    gaussian = loss.startswith("nn.Gaussian")
    more = f", torch.full({tuple(given.shape)}, 0.7, dtype=D)" if gaussian else ""
    rows = 0 if gaussian else rows
    return Term(loss, reduction, made.format(glue), target, around, "", rows, more)
