"""Predictions, draws and files of a posterior, against dense formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nnj
from tests.support.posteriors import KINDS, STRUCTURES, dense_jacobian, small, theta

BLOCKS = [name for name in STRUCTURES if name != "ggn_diag"]
close = torch.testing.assert_close


def gaussian_scale(kind: str, noise: float) -> float:
    return 1 / (2 * noise) if kind in ("regression", "several outputs") else 1.0


def dense_covariance(case, matrix: Tensor, x: Tensor, prior: float) -> Tensor:
    j = dense_jacobian(case.model, x)
    inverse = torch.linalg.inv(matrix + prior * torch.eye(len(matrix), dtype=matrix.dtype))
    return j @ inverse @ j.mT


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_moments_of_predictions(kind, structure):
    case, noise = small(kind), 0.3 if kind == "regression" else 1.0
    fit = nnj.fit(case.model, case.loss, case.batches, structure)
    post = nnj.laplace(fit, prior=0.7, noise=noise)
    matrix = fit.matrix(structure).dense() * gaussian_scale(kind, noise)
    expected = dense_covariance(case, matrix, case.x, 0.7)
    mean, covariance = post.predict(case.x)
    close(mean, case.model(case.x).detach())
    close(covariance, expected)
    close(post.predict_variance(case.x), expected.diagonal(dim1=1, dim2=2))
    j = dense_jacobian(case.model, case.x)
    inverse = torch.linalg.inv(matrix + 0.7 * torch.eye(len(matrix), dtype=torch.float64))
    between = torch.einsum("ncp,pq,mdq->ncmd", j[:3], inverse, j[3:5])
    close(post.covariance(case.x[:3], case.x[3:5]), between)
    close(post.matrix().dense(), matrix)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_curvature_is_that_of_the_summed_loss(structure):
    """Whatever scale a fit has."""
    for kind in ("classes", "several outputs"):
        case = small(kind)
        mean = nnj.fit(case.model, case.loss, case.batches, structure, scale="mean")
        whole = nnj.fit(case.model, case.loss, case.batches, structure, scale="sum")
        one, two = nnj.laplace(mean), nnj.laplace(whole)
        close(one.matrix().dense(), two.matrix().dense())
        close(one.log_marginal_likelihood(), two.log_marginal_likelihood())


def test_an_empirical_fisher_grows_with_the_square_of_the_loss():
    case = small("several outputs")
    options = {"fisher": "empirical"}
    mean = nnj.fit(case.model, case.loss, case.batches, "kfac", scale="mean", **options)
    post = nnj.laplace(mean, noise=0.2)
    whole = nnj.fit(case.model, case.loss, case.batches, "kfac", **options)
    close(post.matrix().dense(), whole.matrix("kfac").dense() / 0.4**2)


def test_the_dense_curvature_of_torch():
    """`ggn` of a cross entropy from the Jacobian of torch.func, with no part of nnj's."""
    case = small("classes")
    j = dense_jacobian(case.model, case.x)
    p = case.model(case.x).detach().softmax(1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    ggn = torch.einsum("ncp,ncd,ndq->pq", j, h, j)
    post = nnj.laplace(case.model, case.loss, case.batches, "ggn", prior=2.0)
    close(post.matrix().dense(), ggn)
    w = theta(case.model)
    size = len(w)
    value = nn.functional.cross_entropy(case.model(case.x), case.y, reduction="sum").detach()
    expected = -value - w @ w - torch.linalg.slogdet(ggn + 2 * torch.eye(size).double())[1] / 2
    close(post.log_marginal_likelihood(), expected + size * math.log(2.0) / 2)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_draws_of_the_parameters(structure):
    case = small("classes")
    post = nnj.laplace(case.model, case.loss, case.batches, structure, prior=1.5)
    draws = post.sample(4000, torch.Generator().manual_seed(0)) - theta(case.model)
    covariance = torch.linalg.inv(
        post.matrix().dense() + 1.5 * torch.eye(len(post.mean), dtype=torch.float64)
    )
    root = torch.linalg.cholesky(torch.linalg.inv(covariance))
    white = draws @ root  # of covariance I, whose mean square over draws is 1 +- 1 / sqrt(2000)
    assert ((white.square().mean(0) - 1).abs() < 5 * (2 / 4000) ** 0.5).all()
    again = post.sample(2, torch.Generator().manual_seed(0)) - theta(case.model)
    assert torch.equal(again, post.sample(2, torch.Generator().manual_seed(0)) - theta(case.model))


@pytest.mark.parametrize("kind", ["classes", "tokens", "regression"])
def test_outputs_under_draws(kind):
    case = small(kind)
    post = nnj.laplace(case.model, case.loss, case.batches, "ggn_block", prior=3.0)
    seeded = lambda: torch.Generator().manual_seed(1)
    draws = post.sample(3, seeded())
    found = post.sample_predict(case.x, 3, generator=seeded())
    lines = post.sample_predict(case.x, 3, linearized=True, generator=seeded())
    j = dense_jacobian(case.model, case.x)
    mean = case.model(case.x).detach()
    for draw, output, line in zip(draws, found, lines, strict=True):
        other = small(kind).model
        nn.utils.vector_to_parameters(draw, other.parameters())
        close(output, other(case.x).detach())
        close(line, mean + (j @ (draw - post.mean)).reshape(mean.shape))
    chunked = post.sample_predict(case.x, 3, generator=seeded(), batch_size=4)
    close(chunked, found)


# -- parts of a model ------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_last_layer(structure):
    case = small("images")
    last = case.model[-1]
    post = nnj.laplace(case.model, case.loss, case.batches, structure, modules=[last], prior=0.5)
    assert post.names == ["4.weight", "4.bias"]
    j = dense_jacobian(case.model, case.x)[:, :, -len(post.mean) :]
    inverse = torch.linalg.inv(
        post.matrix().dense() + 0.5 * torch.eye(len(post.mean), dtype=torch.float64)
    )
    close(post.predict(case.x).covariance, j @ inverse @ j.mT)
    assert post.sample_predict(case.x, 2).shape == (2, 8, 3)


def test_shared_weights_and_frozen_ones():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.two.weight = self.one.weight
            self.head.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.two(self.one(x).tanh()).tanh())

    torch.manual_seed(0)
    model, x, y = Shared().double(), torch.randn(6, 4).double(), torch.randint(3, (6,))
    post = nnj.laplace(model, nn.CrossEntropyLoss(), [(x, y)], "ggn", prior=0.5)
    assert post.names == ["one.weight", "one.bias", "two.bias", "head.weight"]
    at = nnj.linearize(model, x)
    j = at.jacobian()
    inverse = torch.linalg.inv(post.matrix().dense() + 0.5 * torch.eye(j.shape[2]).double())
    close(post.predict(x).covariance, j @ inverse @ j.mT)
    moved = post.sample_predict(x, 1, generator=torch.Generator().manual_seed(0))[0]
    draw = post.sample(1, torch.Generator().manual_seed(0))[0]
    with torch.no_grad():
        for p, t in zip(
            [p for p in model.parameters() if p.requires_grad],
            draw.split([16, 4, 4, 12]),
            strict=True,
        ):
            p.copy_(t.reshape(p.shape))
        close(moved, model(x))


def test_many_classes_on_the_last_layer_in_bounded_memory():
    """A dense Jacobian of 8 samples would have 8 x 3100 x 400,000 entries, 38 GiB."""
    for structure, classes in (("ggn_diag", 3100), ("kfac", 600)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 128), nn.Tanh(), nn.Linear(128, classes))
        x, y = torch.randn(32, 20), torch.randint(classes, (32,))
        post = nnj.laplace(
            model, nn.CrossEntropyLoss(), [(x, y)], structure, modules=[model[2]], prior=1.0
        )
        variance = post.predict_variance(DataLoader(TensorDataset(x, y), 8))
        assert variance.shape == (32, classes)
        h = model[1](model[0](x)).detach()
        inverse = post.weight_covariance()
        if structure == "ggn_diag":
            w, b = inverse.diagonal().split([3100 * 128, 3100])
            close(variance, h.square() @ w.reshape(3100, 128).mT + b)
        probabilities = post.predict_proba(x[:4])
        close(probabilities.sum(1), torch.ones(4))


# -- what is asked, and how ------------------------------------------------------------------------


def test_inputs_of_every_kind_give_the_same():
    case = small("classes")
    post = nnj.laplace(case.model, case.loss, case.batches, "kfac")
    mean, covariance = post.predict(case.x)
    loaders = [
        DataLoader(TensorDataset(case.x, case.y), 5),
        DataLoader(TensorDataset(case.x), 5),
        [case.x[:3], case.x[3:]],
        ((x, y) for x, y in case.batches),
    ]
    for x, options in [
        ((case.x,), {}),
        (case.x, {"batch_size": 4}),
        *((one, {}) for one in loaders),
    ]:
        found = post.predict(x, **options)
        close(found.mean, mean)
        close(found.covariance, covariance)


class SequenceFirst(nn.Module):
    """(T, N, 3) to (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.rnn(x)[0][-1])
        return found


class TokensAsRows(nn.Module):
    """(N, T, 3) to (N T, 3): every token is a row of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(x.reshape(-1, 3))
        return found


def test_samples_along_another_axis():
    torch.manual_seed(0)
    for model, x, rows in (
        (nnj.extend(SequenceFirst(), batch_axis=1), torch.randn(5, 6, 3), 6),
        (TokensAsRows(), torch.randn(4, 5, 3), 20),
    ):
        model, x, y = model.double(), x.double(), torch.randint(3, (rows,))
        post = nnj.laplace(model, nn.CrossEntropyLoss(), [(x, y)], "ggn", prior=0.7)
        params = {name: p.detach() for name, p in model.named_parameters()}
        at = lambda p, model=model, x=x: torch.func.functional_call(model, p, (x,))
        whole = torch.func.jacrev(at)(params)
        j = torch.cat([t.flatten(2) for t in whole.values()], 2)
        p = model(x).detach().softmax(1)
        h = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        precision = torch.einsum("ncp,ncd,ndq->pq", j, h, j) + 0.7 * torch.eye(j.shape[2])
        close(post.predict(x).covariance, j @ torch.linalg.inv(precision) @ j.mT)


def test_half_precision_is_refused():
    model = nn.Linear(3, 3).bfloat16()
    data = [(torch.randn(4, 3).bfloat16(), torch.randint(3, (4,)))]
    with pytest.raises(nnj.NNJError, match=r"weight, bias: .* Fit the model in single precision"):
        nnj.laplace(model, nn.CrossEntropyLoss(), data, "ggn_diag")


def test_batches_that_are_dicts():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3)

        def forward(self, values: Tensor, shift: Tensor) -> Tensor:
            return self.one(values + shift).tanh()

    torch.manual_seed(0)
    model, n = Named().double(), 6
    batch = {"values": torch.randn(n, 3).double(), "shift": torch.randn(n, 3).double()}
    labelled = {**batch, "labels": torch.randint(3, (n,))}
    post = nnj.laplace(model, nn.CrossEntropyLoss(), [labelled], "ggn", prior=0.2)
    expected = post.predict(batch)
    close(post.predict([labelled]).covariance, expected.covariance)
    close(post.predict(batch, batch_size=2).covariance, expected.covariance)
    close(post.sample_predict(batch, 1).shape, (1, n, 3))
    assert post.tune_heldout([labelled], [0.1, 10.0]).keys() == {0.1, 10.0}


def test_forward_and_target_are_those_of_the_fit():
    case = small("classes")
    batches = [{"image": case.x, "digit": case.y}]
    how = {
        "forward": lambda model, batch: model(batch["image"]),
        "target": lambda batch: batch["digit"],
    }
    fit = nnj.fit(case.model, case.loss, batches, "kfac", **how)
    post = nnj.laplace(fit)
    close(post.predict(batches).mean, case.model(case.x).detach())
    close(
        post.predict({"image": case.x}).covariance,
        nnj.laplace(case.model, case.loss, case.batches, "kfac").predict(case.x).covariance,
    )
    assert post.tune_heldout(batches)[1.0] > 0
    assert post.sample_predict(batches[0], 2).shape == (2, 14, 3)


def test_the_model_is_left_as_it_was():
    case = small("images")
    case.model.insert(1, nn.Dropout(0.5))
    case.model.train()
    post = nnj.laplace(case.model, case.loss, case.batches, "kfac")
    before = theta(case.model).clone()
    state = torch.get_rng_state()
    with torch.no_grad():
        one = post.predict(case.x).mean
    close(one, post.predict(case.x).mean)  # eval mode: no mask
    post.predict_proba(case.x)
    assert torch.equal(torch.get_rng_state(), state)
    post.sample_predict(case.x, 2)
    assert case.model.training and torch.equal(theta(case.model), before)
    assert all(p.grad is None for p in case.model.parameters())


def test_two_posteriors_in_one_process():
    one, two = small("classes"), small("regression")
    first = nnj.laplace(one.model, one.loss, one.batches, "kfac")
    before = first.predict(one.x).covariance
    second = nnj.laplace(two.model, two.loss, two.batches, "ggn_diag", prior=4.0)
    second.predict(two.x)
    close(first.predict(one.x).covariance, before)
    assert (first.prior, second.prior) == (1.0, 4.0)


def test_a_prior_for_each_module():
    case = small("classes")
    prior = {"0": 0.5, "2": 3.0}
    post = nnj.laplace(case.model, case.loss, case.batches, "kfac", prior=prior)
    matrix = post.matrix().dense()
    spread = torch.cat([torch.full((16,), 0.5), torch.full((15,), 3.0)]).double()
    j = dense_jacobian(case.model, case.x)
    inverse = torch.linalg.inv(matrix + torch.diag(spread))
    close(post.predict(case.x).covariance, j @ inverse @ j.mT)
    post.prior = 0.5
    close(post.predict(case.x).covariance, dense_covariance(case, matrix, case.x, 0.5))


def test_a_mean_of_the_prior():
    case = small("classes")
    fit = nnj.fit(case.model, case.loss, case.batches, "kfac")
    mu = torch.linspace(-1, 1, 31).double()
    found = [
        nnj.laplace(fit, prior=0.4, prior_mean=m).log_marginal_likelihood() for m in (0.0, mu, 0.5)
    ]
    w = theta(case.model)
    for value, m in zip(found[1:], (mu, 0.5), strict=True):
        close(value - found[0], 0.2 * (w @ w - (w - m) @ (w - m)))


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_files(structure, tmp_path):
    case = small("regression")
    post = nnj.laplace(case.model, case.loss, case.batches, structure, prior={"": 0.3}, noise=0.5)
    path = tmp_path / "posterior.pt"
    post.save(path)
    torch.load(path, weights_only=True)
    other = small("regression").model
    with torch.no_grad():
        other[0].weight.add_(1)
    with pytest.raises(nnj.NNJError, match="Load its state dict first"):
        nnj.Laplace.load(path, other)
    other.load_state_dict(case.model.state_dict())
    again = nnj.Laplace.load(path, other)
    close(again.predict(case.x), post.predict(case.x))
    close(again.log_marginal_likelihood(), post.log_marginal_likelihood())
    assert (again.prior, again.noise, again.likelihood) == ({"": 0.3}, 0.5, "gaussian")
    with pytest.raises(nnj.NNJError, match="of another model"):
        nnj.Laplace.load(path, nn.Linear(2, 2))
    path.write_text("hello")
    with pytest.raises(nnj.NNJError, match="holds no nnj.Laplace"):
        nnj.Laplace.load(path, other)


# -- refusals --------------------------------------------------------------------------------------


def test_a_model_that_was_trained_on():
    case = small("classes")
    fit = nnj.fit(case.model, case.loss, case.batches, "kfac")
    post = nnj.laplace(fit)
    before = post.predict(case.x).mean
    state = {k: v.clone() for k, v in case.model.state_dict().items()}
    with torch.no_grad():
        case.model[0].weight.add_(0.1)
    for ask in (lambda: post.predict(case.x), lambda: post.sample_predict(case.x, 1)):
        with pytest.raises(nnj.NNJError, match="other parameters than those"):
            ask()
    with pytest.raises(nnj.NNJError, match="changed since the fit"):
        nnj.laplace(fit)
    case.model.load_state_dict(state)
    close(post.predict(case.x).mean, before)
    case.model.load_state_dict(state, assign=True)  # other tensors with the same numbers
    close(post.predict(case.x).mean, before)
    case.model[0].bias.requires_grad_(False)
    with pytest.raises(nnj.NNJError, match=r"require grad than at the fit \(0.bias\)"):
        post.predict(case.x)


REFUSED = {
    "expected a number of samples": (lambda p, x: p.predict(x, batch_size=0), "batch_size=0"),
    "a loader with a batch size": (lambda p, x: p.predict([x], batch_size=2), "Leave it out"),
    "no batches": (lambda p, x: p.predict([]), "no batches"),
    "nothing": (lambda p, x: p.predict(3), "x is int"),
    "a link": (lambda p, x: p.predict_proba(x, "logit"), "link='logit'"),
    "no draws": (lambda p, x: p.predict_proba(x, "mc", samples=0), "at least one draw"),
    "a negative prior": (lambda p, x: setattr(p, "prior", -1.0), "not negative"),
    "a prior of a stranger": (lambda p, x: setattr(p, "prior", {"head": 1.0}), "name of no module"),
    "noise of classes": (lambda p, x: setattr(p, "noise", 2.0), "has none"),
    "an improper prior": (lambda p, x: p.log_marginal_likelihood(0.0), "is no distribution"),
    "a loader of covariances": (lambda p, x: p.covariance([x]), "tensors, tuples or dicts"),
    "no priors": (lambda p, x: p.tune_heldout([], []), "nothing to choose"),
    "no targets": (lambda p, x: p.tune_heldout([]), "gave no targets"),
}


@pytest.mark.parametrize("ask, sentence", REFUSED.values(), ids=REFUSED)
def test_refusals(ask, sentence):
    case = small("classes")
    post = nnj.laplace(case.model, case.loss, case.batches, "ggn_diag")
    with pytest.raises(nnj.NNJError, match=sentence):
        ask(post, case.x)
