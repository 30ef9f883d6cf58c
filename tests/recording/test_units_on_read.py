"""Units, here of one tensor each, whose memory is freed while they are sharded."""

import pytest
import torch
from torch.func import jacrev, vmap

from nnj.recording.units_on_read import AT_ONCE, UnitsOnRead


class Units:
    """In the place of `Sharding`."""

    def __init__(self, count):
        self.kept = [torch.randn(4, 4, dtype=torch.float64) for _ in range(count)]
        self.params = [t.clone() for t in self.kept]
        self.whole, self.most, self.log = set(), 0, []
        for p in self.params:
            p.untyped_storage().resize_(0)

    def asleep_params(self):
        return list(enumerate(self.params))

    def open(self, unit):
        assert unit not in self.whole
        self.whole.add(unit)
        self.log.append(unit)
        self.most = max(self.most, len(self.whole))
        self.params[unit].untyped_storage().resize_(self.kept[unit].nbytes)
        self.params[unit].copy_(self.kept[unit])  # as FSDP writes to it

    def close(self, unit):
        self.whole.remove(unit)
        self.params[unit].untyped_storage().resize_(0)


@pytest.fixture
def units():
    return Units(5)


@pytest.fixture
def on_read(units):
    found = UnitsOnRead(units, lambda unit: found.gather(unit, True))
    return found


READS = {
    "product": lambda a, b: a @ b,
    "views": lambda a, b: a.T[1:].reshape(-1)[None] * b[0, 0],
    "list": lambda a, b: torch.cat([a, b]),
    "keyword": lambda a, b: torch.add(input=a, other=b),
    "vmap": lambda a, b: vmap(lambda row: row @ a @ b)(torch.eye(4, dtype=a.dtype)),
    "engine": lambda a, b: jacrev(lambda x: (x @ a).tanh() @ b)(torch.ones(4, dtype=a.dtype)),
    "number": lambda a, b: torch.tensor(a[1, 2].item() + float(b.sum())),
}


@pytest.mark.parametrize("name", READS)
def test_what_reads_units_has_the_numbers_of_whole_ones(name, units, on_read):
    with on_read:
        found = READS[name](units.params[1], units.params[3])
    assert torch.equal(found, READS[name](units.kept[1], units.kept[3]))
    on_read.close_all()
    assert not units.whole


def test_no_more_are_whole_than_fsdp_has_itself(units, on_read):
    with on_read:
        for _ in range(2):
            for p, kept in zip(units.params, units.kept, strict=True):
                assert torch.equal(p * 2, kept * 2)
                assert torch.equal(p + 1, kept + 1)
    assert units.most == AT_ONCE
    assert units.log == [0, 1, 2, 3, 4] * 2  # once for each time that the walk comes by


def test_an_operation_that_reads_many_has_all_of_them(units, on_read):
    with on_read:
        assert torch.equal(torch.stack(units.params), torch.stack(units.kept))
    assert units.most == len(units.params)


def test_a_backward_pass_reads_what_it_has_saved(units, on_read):
    x = torch.ones(4, dtype=torch.float64, requires_grad=True)
    for unit in (0, 1):
        units.open(unit)
    y = ((x @ units.params[0]).sin() @ units.params[1]).sum()
    for unit in (0, 1):
        units.close(unit)
    with on_read:
        (found,) = torch.autograd.grad(y, x)
    y = ((x @ units.kept[0]).sin() @ units.kept[1]).sum()
    assert torch.equal(found, torch.autograd.grad(y, x)[0])


def test_what_does_not_read_makes_nothing_whole(units, on_read):
    with on_read:
        seen = units.params[0].detach().view(16)
        assert not units.log
        assert torch.equal(seen * 1, units.kept[0].view(16))
    assert units.log == [0]


def test_what_another_rank_reads_is_not_kept_and_does_not_take_away_what_this_one_has(
    units, on_read
):
    with on_read:
        units.params[0] * 1
        on_read.gather(3, False)
        assert units.whole == {0}
        on_read.gather(0, False)  # that another one has sharded again
        assert units.whole == {0}
        assert torch.equal(units.params[0] * 1, units.kept[0])
    assert units.log == [0, 3, 0]
