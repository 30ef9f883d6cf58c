"""Several processes that speak over loopback: `together` runs a function in each of them, for a
bounded time, and ends what it has started.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent.parent
SIZE = 2


def together(
    job: str, seconds: float = 600, size: int = SIZE, dies: int | None = None
) -> list[Any]:
    """What each process of a group of gloo gives for a job.

    Args:
        job: "module:function", a function of the rank, whose result `torch.save` can write.
        seconds: after which all processes are ended.
        size: how many there are.
        dies: the rank that is to end with another code than 0, and gives None.

    Errors: AssertionError with the output of a process that failed.
    """
    here = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = []
        try:
            for rank in range(size):
                with open(folder / f"said{rank}", "w") as said:
                    what = [job, str(rank), str(size), name, *([] if dies is None else ["dies"])]
                    command = [sys.executable, "-W", "ignore", "-m", __name__, *what]
                    started.append(
                        subprocess.Popen(
                            command, cwd=ROOT, env=os.environ | here, stdout=said, stderr=said
                        )
                    )
            codes = [process.wait(seconds) for process in started]
        except subprocess.TimeoutExpired:
            codes = [process.poll() for process in started]
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        said = [(folder / f"said{rank}").read_text()[-4000:] for rank in range(size)]
        well = [code == 0 or rank == dies for rank, code in enumerate(codes)]
        assert all(well), f"{job} ended with {codes}:\n" + "\n-----\n".join(said)
        return [
            torch.load(folder / f"{rank}.pt", weights_only=False) if code == 0 else None
            for rank, code in enumerate(codes)
        ]


def _work(job: str, rank: int, size: int, folder: Path, whole: bool) -> None:
    """What one process does."""
    torch.set_num_threads(1)
    module, function = job.split(":")
    dist.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=180),
    )
    found = getattr(importlib.import_module(module), function)(rank)
    torch.save(found, folder / f"{rank}.pt")
    if whole:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    _work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), len(sys.argv) == 5)
