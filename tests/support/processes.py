"""Several processes that speak over loopback: `together` runs a function in each of them, for a
bounded time, and ends what it has started.

To import torch takes a process seconds. So on Linux one process does nothing but import, and is
forked for each rank of each job: ranks are processes of their own, that have run nothing before.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent.parent
SIZE = 2
PATIENCE = 30  # seconds that others have, when one has failed
FORKS = sys.platform == "linux"


def together(
    job: str, seconds: float = 600, size: int = SIZE, dies: int | None = None
) -> list[Any]:
    """What each process of a group of gloo gives for a job.

    Args:
        job: "module:function", a function of the rank, whose result `torch.save` can write.
        seconds: after which all processes are ended; some after one has failed.
        size: how many there are.
        dies: the rank that is to end with another code than 0, and gives None.

    Errors: AssertionError with the output of a process that failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [(job, rank, size, name, dies is None) for rank in range(size)]
        codes = _origin().run(ranks, seconds) if FORKS else _spawned(ranks, seconds)
        said = [_said(folder, rank).read_text()[-4000:] for rank in range(size)]
        well = [code == 0 or rank == dies for rank, code in enumerate(codes)]
        assert all(well), f"{job} ended with {codes}:\n" + "\n-----\n".join(said)
        return [
            torch.load(folder / f"{rank}.pt", weights_only=False) if code == 0 else None
            for rank, code in enumerate(codes)
        ]


def _said(folder: Path, rank: int) -> Path:
    return folder / f"said{rank}"


def _started(given: list[str], **files: Any) -> subprocess.Popen[str]:
    """A process that runs this file."""
    here = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-W", "ignore", "-m", __name__, *given]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | here, text=True, **files)


def _ended(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


# -- processes that import for themselves ----------------------------------------------------------


def _spawned(ranks: list[tuple[Any, ...]], seconds: float) -> list[int | None]:
    """The codes with which ranks ended, each started anew; None for one that did not in time."""
    started, until = [], time.monotonic() + seconds
    try:
        for work in ranks:
            with open(_said(Path(work[3]), work[1]), "w") as said:
                started.append(_started([json.dumps(work)], stdout=said, stderr=said))
        return [process.wait(max(0.0, until - time.monotonic())) for process in started]
    except subprocess.TimeoutExpired:
        return [process.poll() for process in started]
    finally:
        for process in started:
            _ended(process)


# -- processes that are forked from one ------------------------------------------------------------


class _Origin:
    """The process from which ranks are forked: it lives as long as the tests."""

    def __init__(self) -> None:
        self.process = _started([], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(_ended, self.process)

    def run(self, ranks: list[tuple[Any, ...]], seconds: float) -> list[int | None]:
        """The codes with which ranks ended; None for one that did not in time."""
        into, out = self.process.stdin, self.process.stdout
        assert into is not None and out is not None
        into.write(json.dumps([ranks, seconds]) + "\n")
        into.flush()
        there, _, _ = select.select([out], [], [], seconds + 120)  # it imports first
        answer = out.readline() if there else ""
        if not answer:
            _ended(self.process)
            raise AssertionError(f"the process from which {ranks[0][0]} is forked has ended")
        found: list[int | None] = json.loads(answer)
        return found


_origins: list[_Origin] = []


def _origin() -> _Origin:
    if not _origins or _origins[0].process.poll() is not None:
        _origins[:] = [_Origin()]
    return _origins[0]


def _serve() -> None:
    """Fork ranks for each line that arrives, until there are no more."""
    for line in sys.stdin:
        ranks, seconds = json.loads(line)
        for work in ranks:
            importlib.import_module(work[0].partition(":")[0])
        gc.freeze()  # or each child would copy what it looks at
        children = [_forked(work) for work in ranks]
        until, codes = time.monotonic() + seconds, dict[int, int]()
        while len(codes) < len(children) and time.monotonic() < until and not _is_alone():
            for child in set(children) - codes.keys():
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    if codes[child] and all(whole for *_, whole in ranks):
                        until = min(until, time.monotonic() + PATIENCE)
            time.sleep(0.01)
        for child in set(children) - codes.keys():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        print(json.dumps([codes.get(child) for child in children]), flush=True)


def _is_alone() -> bool:
    """Whether the tests have ended, while ranks run."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def _forked(work: tuple[Any, ...]) -> int:
    """The number of a new process that does the work of a rank."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(_said(Path(work[3]), work[1]), "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        _work(*work)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# -- what one process does -------------------------------------------------------------------------


def _work(job: str, rank: int, size: int, folder: str, whole: bool) -> None:
    torch.set_num_threads(1)
    module, function = job.split(":")
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "store").as_uri(),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=180),
    )
    found = getattr(importlib.import_module(module), function)(rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    if whole:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    _work(*json.loads(sys.argv[1])) if len(sys.argv) > 1 else _serve()
