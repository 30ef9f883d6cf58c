"""nnj.testing.check_loss: which losses it takes, and how it fails."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnj
from nnj.registry.manager import use
from nnj.testing import check_loss
from tests.support.losses import y, z

pytestmark = pytest.mark.usefixtures("seeded")


def test_functions():
    output, target = z(4, 3)(), y(3, 4)()
    check_loss(F.cross_entropy, output, target)
    check_loss(lambda o, t: F.cross_entropy(2 * o, t), output, target)
    check_loss(functools.partial(F.huber_loss, delta=0.3), output, z(4, 3)())
    with pytest.raises(AssertionError, match="cross_entropy: the value of the reference"):
        check_loss(F.cross_entropy, output, target, reference=lambda loss, o, t: 2 * loss(o, t))
    with pytest.raises(nnj.NNJError, match="cosine_embedding_loss: .*not positive semi-definite"):
        check_loss(F.cosine_embedding_loss, output, z(4, 3)(), torch.ones(4))


def test_a_wrong_rule():
    class Half(nn.MSELoss):
        """Its rule forgets the mean."""

    def rule(m, scale, y, target):
        return nnj.DiagonalHessian(torch.full_like(y, 2.0) * scale)

    class Plugin:
        @nnj.hookimpl
        def nnj_register_losses(self, register):
            register(Half, rule)

    manager = nnj.PluginManager(load=False)
    manager.register(Plugin(), "half")
    former = use(manager)
    try:
        with pytest.raises(AssertionError, match=r"Half\(reduction='mean'\): S S\^T is wrong"):
            check_loss(Half(), z(3, 2)(), z(3, 2)())
        with pytest.raises(
            AssertionError, match=r"Half\(reduction='mean'\): the value of the reference is wrong"
        ):
            check_loss(Half(), z(3, 2)(), z(3, 2)(), reference=lambda loss, y, t: 2 * loss(y, t))
    finally:
        use(former)
