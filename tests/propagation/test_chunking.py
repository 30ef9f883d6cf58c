"""How many columns walk together, and what becomes of the memory that they took."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import nnj
from nnj.collecting import column_pass
from nnj.graph import attention
from nnj.jacobians.outer_product import OuterProduct
from nnj.propagation import allocator
from nnj.propagation.allocator import SET_BY_USERS, SWITCH, give_back, keep_heap
from nnj.propagation.chunking import columns_at_once, even


@pytest.mark.parametrize(
    ("k", "fits", "likes", "size"),
    [(9, 20, 9, 9), (9, 20, 5, 5), (9, 4, 9, 3), (9, 1, 1, 1), (99, 7, 20, 7), (10, 6, 6, 5)],
)
def test_turns_are_about_as_long_as_each_other(k, fits, likes, size):
    assert even(k, fits, likes) == size


def lengths(monkeypatch, model: nn.Module, x: torch.Tensor, memory: int) -> list[int]:
    """The number of columns of each turn."""
    seen: list[int] = []
    take = columns_at_once

    def noting(sweep, memory):
        run = sweep.run
        sweep.run = lambda roots, k, *rest, **options: (
            seen.append(k),
            run(roots, k, *rest, **options),
        )[1]
        return take(sweep, memory)

    with monkeypatch.context() as patch:
        patch.setattr(column_pass, "columns_at_once", noting)
        with nnj.collect("ggn_diag", memory=memory):
            nnj.extend(nn.MSELoss())(nnj.extend(model)(x), x.new_zeros(len(x), 6)).backward()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_says_how_many_columns_walk(monkeypatch, dtype):
    """The largest unit, the first tanh, has 5 * (8 + 8) entries for each column; they are there
    three times.
    """
    model, x = (
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh()).to(dtype),
        torch.randn(5, 4, dtype=dtype),
    )
    column = 5 * (8 + 8) * 3 * dtype.itemsize
    assert lengths(monkeypatch, model, x, 6 * column) == [6]
    assert lengths(monkeypatch, model, x, 6 * column - 1) == [3, 3]
    assert lengths(monkeypatch, model, x, 2 * column) == [2, 2, 2]
    assert lengths(monkeypatch, model, x, 1) == [1] * 6


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 6)

    def forward(self, x):
        q, k, v = (t.unflatten(2, (2, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return torch.tanh(self.head(y.transpose(1, 2).flatten(2).mean(1)))


def test_scores_of_attention_count(monkeypatch):
    """Three times those that are there at once, or of one query, whatever the number of
    columns.
    """
    model, x = Attention(), torch.randn(5, 9, 4)
    column, scores = 5 * 9 * (12 + 12) * 3 * 4, 3 * 4 * 9
    monkeypatch.setattr(attention, "SCORES", 1)
    assert lengths(monkeypatch, model, x, 6 * column + scores) == [6]
    assert lengths(monkeypatch, model, x, 6 * column + scores - 1) == [3, 3]
    monkeypatch.setattr(attention, "SCORES", 100)
    assert lengths(monkeypatch, model, x, 6 * column + 3 * 4 * 100) == [6]
    assert lengths(monkeypatch, model, x, 6 * column + 3 * 4 * 100 - 1) == [3, 3]


@pytest.mark.parametrize(
    ("memory", "layers_that_keep"), [(2**16, 0), (2**17, 1), (2**18, 2), (2**19, 3), (2**28, 0)]
)
def test_kernels_of_all_layers_have_a_share_of_memory(monkeypatch, memory, layers_that_keep):
    """31104 bytes for each convolution, which they keep until the last turn, if there are
    several.
    """
    kept: dict[int, int] = {}
    squares = OuterProduct.squares

    def noting(self, total_columns=None):
        found = squares(self, total_columns)
        if found.later is not None and self.form[2] > 1:
            kept[id(self.patches.make)] = found.later.kernels.nbytes
        return found

    monkeypatch.setattr(OuterProduct, "squares", noting)
    torch.manual_seed(0)
    convolution = lambda: nn.Conv2d(16, 16, 3, padding=1)
    layers = [convolution(), nn.Tanh(), convolution(), nn.Tanh(), convolution(), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 30), nn.Tanh()).double()
    x = torch.randn(3, 16, 3, 3, dtype=torch.float64)
    found = []
    for size in (memory, 2**28):
        with nnj.collect("ggn_diag", memory=size):
            z = nnj.extend(model)(x)
            nnj.extend(nn.MSELoss())(z, torch.zeros_like(z)).backward()
        found.append([p.ggn_diag.clone() for p in model.parameters()])
        if size == memory:
            assert sum(kept.values()) <= memory / 3
            assert len(kept) == layers_that_keep
    torch.testing.assert_close(*found)


class Library:
    """A C library that notes what it is told."""

    def __init__(self, *names: str):
        self.told: list[tuple[int, int]] = []
        if "mallopt" in names:
            self.mallopt = lambda option, value: self.told.append((option, value))


@pytest.fixture
def library(monkeypatch):
    def use(*names: str) -> Library:
        made = Library(*names)
        monkeypatch.setattr(ctypes, "CDLL", lambda name: made)
        monkeypatch.setattr(allocator, "_kept", 0)
        monkeypatch.setattr(sys, "platform", "linux")
        for name in (SWITCH, *SET_BY_USERS):
            monkeypatch.delenv(name, raising=False)
        return made

    return use


def test_freed_memory_is_kept_for_the_next_turn(library):
    made = library("mallopt")
    for memory in (2**20, 2**28, 2**20, 2**28):
        keep_heap(memory)
    assert made.told == [(-3, 2**20), (-1, 2**20), (-3, 2**28), (-1, 2**28)]
    keep_heap(2**40)
    assert made.told[4:] == [(-3, 2**30), (-1, 2**30)]  # the C library takes an int


def test_holes_of_the_heap_are_given_back(library, monkeypatch):
    """As soon as they are more than half of `memory`; nothing is asked where nothing was
    set.
    """
    made, trimmed = library("mallopt"), []
    made.malloc_trim = trimmed.append
    free = iter([1000, 900, 1100, 1150, 1151, 950, 1200, 1201, 1199])
    monkeypatch.setattr(allocator, "_resident_and_free", lambda: next(free))
    monkeypatch.setattr(allocator, "_least", sys.maxsize)
    monkeypatch.setattr(allocator, "PAUSE", 0.0)
    give_back(500)
    assert trimmed == [] and next(free) == 1000
    keep_heap(1000)
    for count in (0, 0, 0, 1, 1, 2):
        give_back(500)  # 900; 1100; 1150; 1151, and then 950; 1200; 1201, and then 1199
        assert len(trimmed) == count
    monkeypatch.setattr(allocator, "PAUSE", 1e9)
    give_back(500)  # looks no more


def test_what_is_resident_and_free():
    before = allocator._resident_and_free()
    if before is None:
        pytest.skip("the C library does not tell")
    kept = torch.ones(1 << 22)
    after = allocator._resident_and_free()
    assert after is not None and abs(after - before) < kept.nbytes / 2


@pytest.mark.parametrize("name", SET_BY_USERS)
def test_what_users_say_of_their_memory_holds(library, monkeypatch, name):
    made = library("mallopt")
    monkeypatch.setenv(name, "131072")
    keep_heap(2**28)
    assert made.told == []


@pytest.mark.parametrize("value, told", [("0", []), ("1", [(-3, 2**28), (-1, 2**28)])])
def test_the_switch(library, monkeypatch, value, told):
    made = library("mallopt")
    monkeypatch.setenv("NNJ_MALLOPT", value)
    keep_heap(2**28)
    assert made.told == told


def test_the_program_that_imports_nnj_keeps_its_allocator():
    """Only columns that are propagated make a setting, and none where it is switched off."""
    code = (
        "import ctypes, torch; told = []; "
        "ctypes.CDLL = lambda name: type('C', (), {'mallopt': lambda self, *a: told.append(a)})(); "
        "import nnj; from nnj.propagation.allocator import keep_heap; "
        "model = nnj.extend(torch.nn.Linear(2, 2)); loss = nnj.extend(torch.nn.MSELoss()); "
        "before = list(told); collected = nnj.collect('ggn_diag'); collected.__enter__(); "
        "loss(model(torch.ones(1, 2)), torch.ones(1, 2)).backward(); print(before, told)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in SET_BY_USERS}
    for value, expected in (("0", "[] []"), ("1", "[] [(-3, 268435456), (-1, 268435456)]")):
        environment[SWITCH] = value
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        assert done.stdout.strip() == (expected if sys.platform == "linux" else "[] []")


def test_a_c_library_without_mallopt(library, monkeypatch):
    library()
    keep_heap(2**28)
    made = library("mallopt")
    monkeypatch.setattr(sys, "platform", "darwin")
    keep_heap(2**28)
    assert made.told == []
