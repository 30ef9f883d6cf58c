"""A Kronecker Laplace posterior over the shards of a data set, and the memory of a sharded model.

    torchrun --nproc-per-node 2 examples/distributed.py

trains a small network on handwritten digits with DistributedDataParallel, fits its curvature with
each rank reading its own digits, and compares all of it with what one process has that reads
everything. `--memory sharded` prints the memory of a step of a wide network that fully_shard
shards, with a `--quantity`, and `--memory one` that of one process (--nproc-per-node 1).
"""

import argparse
import contextlib
import ctypes
import threading

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset, TensorDataset

import nnj
from nnj.distributed.ranks import bytes_sent

MIB = 2**20


def digits():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float64), torch.tensor(y)
    return TensorDataset(x[:1201], y[:1201]), (x[1201:], y[1201:])


def network(width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10)).double()


def trained(model, data, epochs):
    parallel = DistributedDataParallel(model)
    optimizer, loss = torch.optim.Adam(model.parameters(), 1e-2), nn.CrossEntropyLoss()
    for _ in range(epochs):
        for x, y in DataLoader(data, 100, drop_last=True):  # as many steps on all ranks
            optimizer.zero_grad()
            loss(parallel(x), y).backward()
            optimizer.step()
    return parallel


def largest(a, b):
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in b)


def laplace_over_shards(rank, size, epochs):
    data, (x, y) = digits()
    shard = Subset(data, range(rank, len(data), size))
    model, loss = trained(network(), shard, epochs), nn.CrossEntropyLoss()
    before = bytes_sent()
    fit = nnj.fit(model, loss, DataLoader(shard, 100), "kfac", group=dist.group.WORLD)
    sent = bytes_sent() - before
    alone = nnj.fit(model.module, loss, DataLoader(data, 100), "kfac")
    wide, wide_alone = (nnj.laplace(f).predict_proba(x) for f in (fit, alone))
    dense = [{name: m.dense() for name, m in f["kfac"].items()} for f in (fit, alone)]
    accuracy = float((wide.argmax(1) == y).double().mean())
    return [
        f"{len(shard)} of {len(data)} digits here, {sent} bytes sent",
        f"Kronecker factors are those of one process to {largest(*dense):.0e}",
        f"predictions of the posterior to {float((wide - wide_alone).abs().max()):.0e}, "
        f"accuracy {accuracy:.3f}",
    ]


class Allocated(ctypes.Structure):
    """What glibc's mallinfo2 says."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def allocated():
    """The MiB that this process has taken and not given back: what is resident counts holes of the
    heap and what gloo's threads keep, too.
    """
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / MIB
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Allocated
    said = ask()
    return (said.uordblks + said.hblkhd) / MIB


class Peak:
    """The most that is allocated inside of a `with`, looked at every millisecond."""

    def __enter__(self):
        self.most, self._over = allocated(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self):
        while not self._over.wait(1e-3):
            self.most = max(self.most, allocated())

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


def tensors(result):
    """Those of a result: a diagonal, or Kronecker factors; none where another rank has it."""
    if isinstance(result, nnj.matrices.BlockDiagonal):
        return [t for part in result.blocks for t in tensors(part.matrix)]
    if isinstance(result, nnj.matrices.Kronecker):
        return [t for t in (result.left, result.right) if t is not None]
    return [] if result is None else [getattr(result, "_local_tensor", result)]


def memory(rank, size, width, sharded, quantity):
    """What a step, with or without a quantity, takes beyond what was there before, in MiB, and
    what of the quantity is kept.
    """
    torch.manual_seed(0)
    before = allocated()
    layers = [nn.Linear(width, width) for _ in range(8)]
    model, loss = nn.Sequential(*layers, nn.Linear(width, 10)), nnj.extend(nn.CrossEntropyLoss())
    if sharded:
        mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (size,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    del layers
    nnj.extend(model)
    x, y = torch.randn(8, width), torch.randint(10, (8,))
    with Peak() as step:
        with nnj.collect(quantity) if quantity else contextlib.nullcontext():
            loss(model(x), y).backward()
    places = [*model.parameters(), *model.modules()] if quantity else []
    kept = sum(t.nbytes for place in places for t in tensors(getattr(place, quantity, None)))
    return step.most - before, kept / MIB


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--memory", choices=["one", "sharded"])
    parser.add_argument("--quantity", choices=["ggn_diag", "kfac"], default="ggn_diag")
    given = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if given.memory:
        how = given.memory == "sharded"
        alone, _ = memory(rank, size, given.width, how, None)
        most, kept = memory(rank, size, given.width, how, given.quantity)
        said = [
            f"{given.memory}: peak of a step {alone:.0f} MiB, with {given.quantity} {most:.0f} "
            f"MiB, of which {kept:.0f} MiB are kept here"
        ]
    else:
        said = laplace_over_shards(rank, size, given.epochs)
    every = [None] * size
    dist.all_gather_object(every, said)
    if rank == 0:
        for i, lines in enumerate(every):
            print("\n".join(f"rank {i}: {line}" for line in lines))
    dist.barrier()  # gloo aborts where a rank leaves while others still speak
    dist.destroy_process_group()


main()
