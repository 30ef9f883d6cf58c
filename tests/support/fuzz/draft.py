"""A model that is being written: its source grows by a statement at a time, each of which is run to
see what shape comes of it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.fuzz.pieces import NAMES


@dataclass(frozen=True)
class Line:
    """`name = code`; `twin` is the same for torch.func, where that cannot take `code`."""

    name: str
    code: str
    twin: str


Step = Callable[["Draft", str], "str | None"]
STEPS: dict[str, dict[str, tuple[Step, float]]] = {}


def step(kinds: str, weight: float = 1.0) -> Callable[[Step], Step]:
    """A step of a model: from a variable of one of these kinds to another one, or None where it
    does not fit.
    """

    def register(run: Step) -> Step:
        for kind in kinds.split():
            STEPS.setdefault(kind, {})[run.__name__] = run, weight
        return run

    return register


class Unfit(Exception):
    """What was drawn makes no model: it is drawn anew."""


class Draft:
    """The source of a model, and the values of its variables on the input that is at hand.

    Kinds of variables: "vec" (N, F), "seq" (N, T, F), "first" (T, N, F), "sig" (N, C, L),
    "img" (N, C, H, W), "vol" (N, C, D, H, W), "tok" (N, T) of whole numbers.

    Args:
        rng: makes all decisions.
        x: the input.
        kind: its kind.
    """

    def __init__(self, rng: random.Random, x: Tensor, kind: str):
        self.rng, self.n = rng, x.shape[1 if kind == "first" else 0]
        self.parts: list[tuple[str, str]] = []
        self.lines: list[Line] = []
        self.used: list[str] = []  # the names of the steps
        self.values: dict[str, Tensor] = {"x": x}
        self.kinds = {"x": kind}
        self.holder = nn.Module()
        self.places_matter = False  # whether a sample's place in the batch does

    # -- decisions ---------------------------------------------------------------------------------

    def flag(self, p: float = 0.5) -> bool:
        return self.rng.random() < p

    def size(self, most: int = 4) -> int:
        """A width: one is as likely as any other."""
        return self.rng.randint(1, most)

    def divisor(self, of: int) -> int:
        return self.rng.choice([k for k in range(1, of + 1) if of % k == 0])

    def pick(self, *of: str) -> str:
        return self.rng.choice(of)

    # -- statements --------------------------------------------------------------------------------

    def part(self, source: str) -> str:
        """A module or a parameter of the model."""
        name = f"a{len(self.parts)}"
        made = self._value(source)
        made = nn.Parameter(made.double()) if isinstance(made, nn.Parameter) else made.double()
        setattr(self.holder, name, made.eval() if isinstance(made, nn.Module) else made)
        self.parts.append((name, source))
        return f"self.{name}"

    def parameter(self, *shape: int) -> str:
        return self.part(f"nn.Parameter(torch.randn({', '.join(map(str, shape))}))")

    def let(self, code: str, kind: str, twin: str = "") -> str:
        """A variable. Errors: `Unfit` where its value is too large, or torch refuses."""
        try:
            value = self._value(twin or code)
        except RuntimeError as error:
            raise Unfit(f"{code}: {error}") from error
        if value.numel() > 100 * self.n or value.numel() == 0 or not bool(value.isfinite().all()):
            raise Unfit(f"{code} has shape {tuple(value.shape)}")
        name = f"v{len(self.lines)}"
        self.lines.append(Line(name, code, twin or code))
        self.values[name], self.kinds[name] = value, kind
        return name

    def shape(self, x: str) -> tuple[int, ...]:
        return tuple(self.values[x].shape)

    def _value(self, code: str) -> Any:
        with torch.no_grad():
            return eval(code, NAMES | self.values | {"self": self.holder})

    # -- what was written --------------------------------------------------------------------------

    def layers(self, fits: Callable[[nn.Module], bool]) -> list[str]:
        """The parts so far that may be used once more."""
        return [
            f"self.{name}"
            for name, _ in self.parts
            if isinstance(m := getattr(self.holder, name), nn.Module) and fits(m)
        ]

    def finish(self, *results: str) -> None:
        """Forget the lines and parts that the results do not need."""
        needed = set(results)
        for line in reversed(self.lines):
            if line.name in needed:
                needed |= set(re.findall(r"\bv\d+", line.code))
        self.lines = [l for l in self.lines if l.name in needed]
        text = " ".join(l.code for l in self.lines)
        for name, source in reversed(self.parts):
            if re.search(rf"\b{name}\b", text):
                text += " " + source
        self.parts = [p for p in self.parts if re.search(rf"\b{p[0]}\b", text)]

    def source(self, result: str, name: str = "Model", twin: bool = False) -> str:
        """The class."""
        made = [f"        self.{part} = {source}" for part, source in self.parts]
        lines = [f"        {l.name} = {l.twin if twin else l.code}" for l in self.lines]
        return "\n".join(
            [
                f"class {name}(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *made,
                "",
                "    def forward(self, x):",
                *lines,
                f"        return {result}",
                "",
            ]
        )

    @property
    def has_twin(self) -> bool:
        return any(l.twin != l.code for l in self.lines)
