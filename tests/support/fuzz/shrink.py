"""A shorter program of which the same comes: its lines become variables before them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch

from tests.support.fuzz.case import Case
from tests.support.fuzz.check import check
from tests.support.fuzz.compare import EQUAL, FAILURE, Outcome
from tests.support.fuzz.report import reason

LINE = re.compile(r"^        (v\d+) = (.*)$", re.M)
PLAIN = {"passes": 1, "memory": 2**28, "frozen": [], "dtype": torch.float64, "autocast": False}


def shrink(case: Case) -> Case:
    """The shortest program found of which the same comes; the case itself if all of it is right.

    Parts that are no longer called stay, so that the others keep their parameters.
    """
    all_of_it = sorts(check(case))
    if not all_of_it:
        return case
    wanted = min(all_of_it, key=lambda s: (s[1] != FAILURE, s[0] != "ggn_diag", s))
    found = True
    while found:
        found = False
        for shorter in candidates(case):
            if wanted in sorts_of(shorter):
                case, found = shorter, True
                break
    return case


def sorts(outcomes: dict[str, Outcome]) -> set[tuple[str, str, str]]:
    """What is to stay: the questions that are not answered, and why."""
    return {
        (name, o.kind, reason(o.words).split(" of ")[0])
        for name, o in outcomes.items()
        if o.kind != EQUAL
    }


def sorts_of(case: Case) -> set[tuple[str, str, str]]:
    try:
        return {s for s in sorts(check(case)) if s[0] != "oracle"}
    except Exception:  # it is no program any more
        return set()


def candidates(case: Case) -> Iterator[Case]:
    """Programs that are a little simpler."""
    for name, plain in PLAIN.items():
        if getattr(case, name) != plain:
            yield replace(case, **{name: plain})
    earlier = ["x"]
    for name, code in LINE.findall(case.source.split("class Twin")[0]):
        for other in earlier:
            if code != other and (
                code not in earlier or earlier.index(other) < earlier.index(code)
            ):
                source = LINE.sub(
                    lambda m, name=name, other=other: (
                        f"        {name} = {other}" if m[1] == name else m[0]
                    ),
                    case.source,
                )
                yield replace(case, source=source)
        earlier.append(name)
