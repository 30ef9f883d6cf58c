"""What came of many seeds, as a table: how often each question was answered, why not, and what is
wrong.
"""

from __future__ import annotations

import gc
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from tests.support.fuzz.case import draw
from tests.support.fuzz.check import check
from tests.support.fuzz.compare import EQUAL, FAILURE, REFUSED, Outcome

Outcomes = dict[str, Outcome]


@contextmanager
def quietly() -> Iterator[None]:
    """One thread, no warnings of torch about what is slow. The verification goes through all
    objects of the process at each new structure: those that are there already are put aside.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes(0)  # torch imports half of itself at first use
            gc.collect()
            gc.freeze()
            yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


def outcomes(seed: int) -> Outcomes:
    """What comes of a seed."""
    with torch.random.fork_rng(devices=[]):
        return check(draw(seed))


def reason(words: str) -> str:
    """A refusal without names and numbers."""
    first = re.split(r"(?<=[a-z)'])[.:;] ", re.sub(r"plugin '[^']*' ", "", words))
    text = first[1] if len(first) > 1 and len(first[0]) < 24 else first[0]
    text = re.sub(r"'[^']*'", "*", re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", text))
    return text[:90]


class Report:
    """Counts over seeds."""

    def __init__(self) -> None:
        self.seeds = 0
        self.counts: Counter[tuple[str, str]] = Counter()
        self.reasons: Counter[str] = Counter()
        self.refused: dict[str, list[int]] = {}
        self.failures: list[tuple[int, str, str]] = []

    def add(self, seed: int, found: Outcomes) -> None:
        self.seeds += 1
        for name, outcome in found.items():
            self.counts[name, outcome.kind] += 1
            if outcome.kind == FAILURE:
                self.failures.append((seed, name, outcome.words))
        for why in {reason(o.words) for o in found.values() if o.kind == REFUSED}:
            self.reasons[why] += 1
            self.refused.setdefault(why, []).append(seed)

    def __iadd__(self, other: Report) -> Report:
        self.seeds += other.seeds
        self.counts += other.counts
        self.reasons += other.reasons
        for why, seeds in other.refused.items():
            self.refused.setdefault(why, []).extend(seeds)
        self.failures += other.failures
        return self

    def __str__(self) -> str:
        lines = [f"{'':28}{EQUAL:>10}{REFUSED:>10}{FAILURE:>10}"]
        for name in sorted({name for name, _ in self.counts}):
            row = [self.counts[name, kind] for kind in (EQUAL, REFUSED, FAILURE)]
            lines.append(f"{name:28}" + "".join(f"{n:>10}" for n in row))
        lines.append(f"\nRefused, by seeds of {self.seeds} (the first three of them):")
        for why, n in self.reasons.most_common():
            lines.append(f"{n:>6}  {100 * n / self.seeds:4.1f} %  {why}  {self.refused[why][:3]}")
        lines.append(f"\nFailures: {len({seed for seed, _, _ in self.failures})} seeds")
        lines += [f"{seed:>6}  {name}: {words}" for seed, name, words in sorted(self.failures)]
        return "\n".join(lines)


def report(seeds: Iterable[int]) -> Report:
    """Of some seeds, in this process."""
    found = Report()
    with quietly():
        for seed in seeds:
            found.add(seed, outcomes(seed))
    return found
