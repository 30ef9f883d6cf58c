"""python -m tests.support.fuzz --seeds 3000: what came of them; it fails if anything is wrong."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import reduce
from multiprocessing import get_context
from operator import iadd

from tests.support.fuzz.case import draw
from tests.support.fuzz.compare import FAILURE
from tests.support.fuzz.report import Report, outcomes, quietly, report
from tests.support.fuzz.shrink import shrink

PER_TASK = 25


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.fuzz", description=__doc__)
    parser.add_argument("--seeds", type=int, default=300, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first of them")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, help="one alone")
    parser.add_argument("-v", action="store_true", help="show its program")
    parser.add_argument("--shrink", action="store_true", help="and make that shorter")
    given = parser.parse_args()
    if given.seed is not None:
        return one(given.seed, given.v, given.shrink)
    stop = given.start + given.seeds
    tasks = [range(k, min(k + PER_TASK, stop)) for k in range(given.start, stop, PER_TASK)]
    if given.workers > 1:
        with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
            found = reduce(iadd, pool.map(report, tasks), Report())
    else:
        found = reduce(iadd, map(report, tasks), Report())
    print(found)
    return int(bool(found.failures))


def one(seed: int, verbose: bool, shorter: bool) -> int:
    """What comes of one seed, and its program, perhaps made shorter."""
    with quietly():
        found = outcomes(seed)
        case = shrink(draw(seed)) if shorter else draw(seed)
    if verbose or shorter:
        print(case)
    for name, outcome in found.items():
        print(f"{name:28}{outcome.kind:10}{outcome.words}")
    return int(any(outcome.kind == FAILURE for outcome in found.values()))


if __name__ == "__main__":
    sys.exit(main())
