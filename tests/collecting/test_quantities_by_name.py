"""Under which names the results of quantities stand."""

from __future__ import annotations

import pytest
from torch import nn

import nnj
from nnj.collecting.quantities_by_name import make
from nnj.collecting.quantity import named
from tests.support.fitting import CLASSES, X, mlp
from tests.support.quantities import JointBlock, Squares


def test_names_of_classes_and_instances():
    assert named(Squares()) == "squares" and named(JointBlock()) == "joint_block"
    other = Squares()
    other.name = "other"
    assert list(make((Squares(), "ggn_diag", other, "kfac"), {})) == [
        "squares",
        "ggn_diag",
        "other",
        "kfac",
    ]
    (kfac,) = make(("kfac",), {"fisher": "mc", "samples": 3}).values()
    assert named(kfac) == "kfac" and kfac.draws == 3


def test_an_option_goes_to_every_named_quantity_that_declares_it():
    made = make(("kfac", "ggn_diag_mc", "ggn_block"), {"samples": 5, "block_limit": 7})
    assert made["kfac"].draws == made["ggn_diag_mc"].draws == 5
    assert made["kfac"].block_limit == made["ggn_block"].limit == 7
    with pytest.raises(nnj.NNJError, match=r"^unknown option 'samples' for ggn_diag, squares"):
        make(("ggn_diag", Squares()), {"samples": 5})


def test_two_of_one_name():
    message = r"^two quantities are called 'squares', and results stand under one name\. Set the"
    with pytest.raises(nnj.NNJError, match=message):
        nnj.collect(Squares(), Squares(root=True))
    mine = Squares()
    mine.name = "ggn_diag"
    with pytest.raises(nnj.NNJError, match=r"^two quantities are called 'ggn_diag'"):
        nnj.collect("ggn_diag", mine)
    assert list(make(("ggn_diag", "ggn_diag"), {})) == ["ggn_diag"]


@pytest.mark.parametrize("name", ["grad", "not an identifier", "requires_grad"])
def test_a_name_that_cannot_be(name):
    mine = Squares()
    mine.name = name
    with pytest.raises(nnj.NNJError, match=rf"^results of Squares cannot stand under '{name}'"):
        nnj.collect(mine)


def test_neither_a_name_nor_a_quantity():
    with pytest.raises(nnj.NNJError, match=r"^unknown quantity 3\. Known: "):
        nnj.collect(3)
    with pytest.raises(nnj.NNJError, match=r"Squares'> \(a class: .*, Squares\(\.\.\.\)\)\. Known"):
        nnj.collect(Squares)
    with pytest.raises(
        nnj.NNJError, match=r"\['kfac'\] \(several names are arguments of their own"
    ):
        nnj.collect(["kfac"])


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("diag_ggn", "ggn_diag"),
        ("diag_ggn_exact", "ggn_diag"),
        ("diag_ggn_mc", "ggn_diag_mc"),
        ("grad_batch", "batch_grad"),
        ("KFAC", "kfac"),
    ],
)
def test_names_of_other_tools(theirs, ours):
    with pytest.raises(nnj.NNJError, match=rf"'{theirs}' \(did you mean '{ours}'\?\)\. Known"):
        nnj.collect(theirs)


def test_attributes_of_an_object_go_as_those_of_a_name():
    model, loss = nnj.extend(mlp()), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect(Squares()):
        loss(model(X), CLASSES).backward()
    assert all(hasattr(p, "squares") for p in model.parameters())
    with nnj.collect(Squares()):
        assert not any(hasattr(p, "squares") for p in model.parameters())
        loss(model(X), CLASSES).backward()
