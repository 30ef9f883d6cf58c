"""A model at a point with the dense Jacobian of its output, made once: the truth of any loss on
whatever is made of that output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, jacrev

import nnj
from tests.support.cases import do, linear
from tests.support.cases.models import Block
from tests.support.oracle import Dense, close

Run = Callable[..., Any]  # from a model, its input and a function that makes losses, to a scalar


@dataclass
class Model:
    """How a model is made and what it is given.

    Args:
        make: the model.
        x: its input, in float64.
        axis: of the samples in its output.
        batch_axis: that is said to `extend`; None for none.
    """

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    axis: int = 0
    batch_axis: int = 0

    def built(self) -> tuple[nn.Module, Tensor]:
        """Always the same."""
        torch.manual_seed(0)
        model = self.make().double()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
        torch.manual_seed(1)
        return model, self.x()

    @functools.cached_property
    def dense(self) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The output, the Jacobian of its entries in each parameter, and their samples."""
        model, x = self.built()
        rest = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
        params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        run = lambda p: functional_call(model, p | rest, (x,))
        z = run(params).detach()
        j = {
            n: d.detach().reshape(z.numel(), *params[n].shape)
            for n, d in jacrev(run)(params).items()
        }
        samples = torch.arange(z.shape[self.axis] if z.dim() else 1)
        samples = samples.reshape(-1, *[1] * (z.dim() - self.axis - 1)) if z.dim() else samples[0]
        return z, j, samples.expand(z.shape).flatten()

    def truth(self, run: Run) -> Dense:
        """Of a scalar that is made of the output."""
        z, j, samples = self.dense
        _, x = self.built()

        def scalar(flat: Tensor, ext: Any) -> Tensor:
            whole = flat.reshape(z.shape)
            return run(lambda part: _part(whole, x, part), x, ext)

        flat, loss = z.flatten(), lambda flat: scalar(flat, lambda loss: loss)
        # less the curvature of what stands between output and loss
        h = hessian(loss, flat) - hessian(lambda flat: scalar(flat, _linear), flat)
        return Dense(j, h, jacobian(loss, flat), samples, int(samples.max()) + 1)

    def collected(self, run: Run, *quantities: str, **options: Any) -> nn.Module:
        """The model after one backward pass of that scalar."""
        model, x = self.built()
        nnj.extend(model, batch_axis=self.batch_axis)
        with nnj.collect(*quantities, **options):
            run(model, x, nnj.extend).backward()
        return model

    def wrong(self, run: Run, *quantities: str, **options: Any) -> list[str]:
        """What is wrong with quantities, one line each."""
        model, truth, found = self.collected(run, *quantities, **options), self.truth(run), []
        for name, p in model.named_parameters():
            for quantity in quantities if name in truth.jacobian else ():
                if quantity != "ggn_block":
                    what = getattr(truth, quantity.removeprefix("ggn_"))(name)
                    fault = close(getattr(p, quantity), what)
                    found += [f"{quantity} of {name} {fault}"] if fault else []
        for path, m in model.named_modules() if "ggn_block" in quantities else ():
            own = [f"{path}.{n}".strip(".") for n, p in m.named_parameters(recurse=False)]
            own = [n for n in own if n in truth.jacobian]
            fault = close(m.ggn_block, truth.block(own)) if own else ""
            found += [f"ggn_block of {path} {fault}"] if fault else []
        return found


def _linear(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss in the place of which its derivative stands."""

    def linear(*args: Tensor) -> Tensor:
        given = [a for a in args if a.requires_grad]
        grads = torch.autograd.grad(loss(*args), given, retain_graph=True)
        return sum(
            ((g.detach() * a).sum() for g, a in zip(grads, given, strict=True)),
            given[0].new_zeros(()),
        )

    return linear


def _part(z: Tensor, x: Tensor, part: Tensor) -> Tensor:
    """What the model gives for some rows of x."""
    if part is x:
        return z
    same = (x[:, None] == part[None]).flatten(2).all(2)
    return z[same.to(torch.uint8).argmax(0)]


# -- models of vectors and of sequences, and losses ------------------------------------------------


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def classes(*shape: int) -> Tensor:
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(5))


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def entropy(z: Tensor, ext: Any) -> Tensor:
    """Cross entropy with classes in axis 1."""
    return ext(nn.CrossEntropyLoss())(z, classes(len(z), *z.shape[2:]))


def squares(z: Tensor, ext: Any) -> Tensor:
    return ext(nn.MSELoss())(z, numbers(*z.shape))


def in_the_last_axis(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), y.flatten())


def entropy_in_the_last_axis(z: Tensor, ext: Any) -> Tensor:
    return ext(in_the_last_axis)(z, classes(*z.shape[:-1]))


def frozen_first(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = make()
        model.one.requires_grad_(False)
        return model

    return made


def bare(s: Any, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, s.w, s.b)), s.v)


BARE = do(bare, w=lambda: r(5, 4), b=lambda: r(5), v=lambda: r(3, 5))
EACH = do(lambda s, x: s.head(torch.tanh(s.one(x))), one=linear(4, 4), head=linear(4, 3))
MIXED = do(lambda s, x: s.head(s.block(s.one(x))), one=linear(4, 4), block=Block, head=linear(4, 3))
GRU = do(lambda s, x: s.head(s.cell(x)[0]), cell=lambda: nn.GRU(4, 3), head=linear(3, 3))
