"""The case of a seed: a program of a model, its data, its losses, and the code of a user."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.fuzz.draft import Draft, Unfit
from tests.support.fuzz.losses import Term, draw_term
from tests.support.fuzz.pieces import NAMES
from tests.support.fuzz.steps import KINDS, draw_input, draw_model, frozen

ATTEMPTS = 200


@dataclass
class Case:
    """What a seed stands for.

    Args:
        seed: which.
        source: a program that defines `Model`, `Twin` (the same for torch.func), `data()` and
            `run(model, losses, x, *targets)`.
        terms: the losses of `run`.
        n: the number of samples.
        kind: of the input, as in `Draft`.
        batch_axis, output_axis: of the samples, in the input and in each output of the model.
        frozen: parameters that do not require grad.
        dtype: of parameters and data.
        autocast: whether `run` does so under bfloat16 autocast.
        passes: how many backward passes, each on data of its own.
        memory: for nnj.collect.
        batches: the sizes of batches for nnj.fit; empty where the data set cannot be cut.
        signed: whether a loss is not convex, or has a negative factor.
        outputs: how many tensors the model gives.
        one_call: whether the model is called once, and not on parts of the batch.
        used: the names of the steps that it is made of.
    """

    seed: int
    source: str
    terms: list[Term]
    n: int
    kind: str
    output_axis: int = 0
    frozen: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    passes: int = 1
    memory: int = 2**28
    batches: list[int] = field(default_factory=list)
    signed: bool = False
    outputs: int = 1
    one_call: bool = True
    used: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names: dict[str, Any] = NAMES | {"D": self.dtype}
        exec(self.source, self.names)

    @property
    def batch_axis(self) -> int:
        return int(self.kind == "first")

    def model(self, twin: bool = False) -> nn.Module:
        """Always the same parameters, none of them zero or one."""
        torch.manual_seed(self.seed)
        model: nn.Module = self.names["Model"]()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
        model = model.to(self.dtype)
        if twin:
            state, model = model.state_dict(), self.names["Twin"]().double()
            model.load_state_dict(state)
        for name, p in model.named_parameters():
            p.requires_grad_(name not in self.frozen)
        return model.eval()

    def data(self, number: int = 0, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """The input and the targets of a backward pass."""
        torch.manual_seed(1000 + number)
        found: tuple[Tensor, ...] = self.names["data"]()
        return tuple(t.to(dtype) if dtype and t.is_floating_point() else t for t in found)

    def losses(self, dtype: torch.dtype | None = None) -> list[Any]:
        return [self.loss(term.source(), dtype) for term in self.terms]

    def loss(self, source: str, dtype: torch.dtype | None = None) -> Any:
        made = eval(source, self.names)
        return made.to(dtype or self.dtype) if isinstance(made, nn.Module) else made

    def run(self, model: Callable[..., Any], losses: list[Any], data: tuple[Tensor, ...]) -> Tensor:
        """The code of a user."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            value: Tensor = self.names["run"](model, losses, *data)
        return value

    def __str__(self) -> str:
        facts = [f"frozen: {', '.join(self.frozen)}"] if self.frozen else []
        facts += ["bfloat16 autocast"] if self.autocast else []
        facts += [f"{self.passes} passes"] if self.passes > 1 else []
        facts += ["signed"] if self.signed else []
        facts += [f"memory={self.memory}"] if self.memory < 2**28 else []
        facts += [f"fit over batches of {self.batches}"] if self.batches else []
        head = f"# seed {self.seed}: {self.kind}, {self.dtype}, batch_axis={self.batch_axis}"
        return "\n".join([head, *(f"# {fact}" for fact in facts), self.source])


def draw(seed: int) -> Case:
    """The case of a seed: the first attempt of which torch makes something finite."""
    for attempt in range(ATTEMPTS):
        rng = random.Random(f"{seed}.{attempt}")
        torch.manual_seed(seed)
        try:
            return _draw(seed, rng)
        except Unfit:
            continue
    raise RuntimeError(f"no model in {ATTEMPTS} attempts of seed {seed}")


def _draw(seed: int, rng: random.Random) -> Case:
    kind, n = rng.choices(list(KINDS), list(KINDS.values()))[0], rng.randint(1, 7)
    x = draw_input(rng, n, kind)
    try:
        value = eval(x, NAMES | {"D": torch.float64})
        draft, results = draw_model(rng, value, kind)
    except (ValueError, IndexError, AssertionError) as error:  # of torch, about what was drawn
        raise Unfit(str(error)) from error
    several, signed = len(results) > 1, rng.random() < 0.06
    parts = rng.random() < 0.05 and n > 2 and kind != "first" and not several
    cut = rng.choice([k for k in range(1, n) if 2 * k != n]) if parts else 0
    terms = draw_terms(rng, draft, results, signed)
    precision = rng.random()
    case = Case(
        seed,
        source_of(draft, results, x, terms, cut),
        terms,
        n,
        kind,
        output_axis=int(draft.kinds[results[0]] == "first"),
        dtype=torch.float64 if precision < 0.85 else torch.float32,
        autocast=precision > 0.98,
        passes=2 if rng.random() < 0.15 else 1,
        memory=1 if rng.random() < 0.15 else 2**28,
        signed=signed,
        outputs=len(results),
        one_call=not parts,
        used=draft.used,
    )
    case.frozen = frozen(rng, case.model())
    whole = not parts and not several and not draft.places_matter
    if whole and len(terms) == 1 and terms[0].rows and n > 1:
        case.batches = batches_of(case, sizes(rng, n))
    check_plain(case)
    return case


def draw_terms(rng: random.Random, draft: Draft, results: list[str], signed: bool) -> list[Term]:
    """A loss of each output, and perhaps another one of the first."""
    first, n = results[0], draft.n
    make = lambda v, signed, name: draw_term(rng, draft.values[v], draft.kinds[v], n, signed, name)
    terms = [make(first, signed, "z")]
    if len(results) > 1:
        terms.append(make(results[1], False, "h"))
    elif rng.random() < 0.2:
        terms.append(make(first, False, "z"))
    return terms


def sizes(rng: random.Random, n: int) -> list[int]:
    """Batches of uneven sizes."""
    found = []
    while n > 0:
        found.append(rng.randint(1, min(n, 4)))
        n -= found[-1]
    return found


def batches_of(case: Case, sizes: list[int]) -> list[int]:
    """These sizes, or none where torch does not take each batch by itself."""
    model, x = case.model(), case.data()[0]
    try:
        for part in x.split(sizes, case.batch_axis):
            model(part)
    except (RuntimeError, ValueError):
        return []
    return sizes


def check_plain(case: Case) -> None:
    """Errors: `Unfit` unless plain torch makes something finite of it, with a gradient."""
    model, losses = case.model(), case.losses()
    try:
        values = [case.run(model, losses, case.data(k)) for k in range(case.passes)]
        sum(values[1:], values[0]).backward()
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise Unfit(f"torch: {error}") from error
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads or not all(bool(t.isfinite().all()) for t in (*values, *grads)):
        raise Unfit("no gradient, or none that is finite")


def source_of(draft: Draft, results: list[str], x: str, terms: list[Term], cut: int) -> str:
    """The program."""
    result = ", ".join(results)
    twin = draft.source(result, "Twin", True) if draft.has_twin else "Twin = Model\n"
    whole = f"torch.cat([model(x[:{cut}]), model(x[{cut}:])])"
    calls = [
        term.around.replace("{}", f"losses[{k}]({term.output}, y{k}{term.more})")
        for k, term in enumerate(terms)
    ]
    given = ", ".join(f"y{k}" for k in range(len(terms)))
    return "\n".join(
        [
            draft.source(result),
            twin,
            f"def losses():\n    return [{', '.join(t.source() for t in terms)}]\n",
            "def data():",
            f"    return {', '.join([x, *(t.target for t in terms)])}\n",
            f"def run(model, losses, x, {given}):",
            f"    {'z, h' if len(results) > 1 else 'z'} = {whole if cut else 'model(x)'}",
            f"    return {' + '.join(calls)}",
            "",
        ]
    )
