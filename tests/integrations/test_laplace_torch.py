"""laplace-torch with nnj as its backend: against its own backends where these are exact, and
against dense formulas.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import MutableMapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nnj
from tests.support.posteriors import dense_jacobian, small, theta

laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed")

from laplace.curvature import CurvlinopsGGN, GGNInterface  # noqa: E402
from laplace.utils import Kron, LargestMagnitudeSubnetMask  # noqa: E402

from nnj.integrations.laplace_torch import NNJGGN, kron_factors  # noqa: E402

close = torch.testing.assert_close
KIND = {"classes": "classification", "images": "classification", "several outputs": "regression"}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_default_dtype(torch.float32)


def fitted(case, kind: str, backend: type, weights: str, structure: str, **options: Any) -> Any:
    la = laplace.Laplace(
        case.model,
        KIND[kind],
        subset_of_weights=weights,
        hessian_structure=structure,
        backend=backend,
        prior_precision=0.6,
        **options,
    )
    la.fit(DataLoader(TensorDataset(case.x, case.y), 5))
    return la


class ByHand(GGNInterface):
    """laplace-torch's own dense formulas, by the Jacobian of torch.func."""


@pytest.mark.parametrize("structure", ["diag", "full"])
@pytest.mark.parametrize("weights", ["all", "last_layer"])
@pytest.mark.parametrize("kind", KIND)
def test_a_posterior_is_that_of_the_dense_formulas(kind, weights, structure):
    case = small(kind)
    mine = fitted(case, kind, NNJGGN, weights, structure)
    theirs = fitted(case, kind, ByHand, weights, structure)
    close(mine.H, theirs.H)
    close(mine.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    for one, two in zip(_said(mine, case.x), _said(theirs, case.x), strict=True):
        close(one, two)


def _said(la: Any, x: Tensor) -> tuple[Tensor, ...]:
    found = la(x)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("weights", ["all", "last_layer"])
@pytest.mark.parametrize("kind", ["classes", "several outputs"])
def test_kronecker_factors_are_those_of_curvlinops_on_chains(kind, weights):
    case = small(kind)
    mine = fitted(case, kind, NNJGGN, weights, "kron")
    theirs = fitted(case, kind, CurvlinopsGGN, weights, "kron")
    for one, two in zip(mine.H_facs.kfacs, theirs.H_facs.kfacs, strict=True):
        dense = [s if len(f) == 1 else torch.kron(*f) for f in (one, two) for s in f[:1]]
        close(*dense)
    close(mine.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    for one, two in zip(_said(mine, case.x), _said(theirs, case.x), strict=True):
        close(one, two)


def test_kronecker_factors_of_a_convolution():
    """Those of nnj.fit, parameter by parameter; a bias has its exact block."""
    case = small("images")
    backend = NNJGGN(case.model, "classification")
    loss, found = backend.kron(case.x, case.y, len(case.x))
    fit = nnj.fit(case.model, case.loss, [(case.x, case.y)], "kfac", "ggn_block", bias="separate")
    close(loss, torch.tensor(fit.loss_value))
    assert isinstance(found, Kron) and len(found.kfacs) == 4
    weight, bias = fit.matrix("kfac").restricted(["0.weight"]), fit["ggn_block"]["0"][-2:, -2:]
    close(torch.kron(*found.kfacs[0]), weight.dense())
    close(found.kfacs[1][0], bias)


class Block(nn.Module):
    """Tokens through an embedding, attention, a norm and a parameter of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.shift = nn.Embedding(7, 4), nn.Parameter(torch.randn(1, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.words(x) + self.shift
        z = self.norm(z + self.attention(z, z, z, need_weights=False)[0])
        return self.head(z.mean(1))


def test_kronecker_factors_of_other_layers():
    torch.manual_seed(0)
    model, x, y = Block(), torch.randint(7, (6, 5)), torch.randint(3, (6,))
    model.eval()
    fit = nnj.fit(model, nn.CrossEntropyLoss(), [(x, y)], "kfac", bias="separate")
    matrix = fit.matrix("kfac")
    shapes = Kron.init_from_model(model, x.device, torch.float64).kfacs
    for (name, _), zero in zip(model.named_parameters(), shapes, strict=True):
        pair = kron_factors(matrix, name)
        assert [s.shape for s in pair] == [s.shape for s in zero], name
        dense = torch.kron(*pair) if len(pair) == 2 else pair[0]
        close(dense, matrix.restricted([name]).dense())
    la = laplace.Laplace(model, "classification", "all", "kron", backend=NNJGGN)
    la.fit(DataLoader(TensorDataset(x, y), 3))
    close(la(x).sum(1), torch.ones(6))


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(2, 4, 3, groups=2), nn.ConvTranspose2d(2, 4, 3)],
    ids=lambda m: type(m).__name__,
)
def test_what_kron_cannot_hold(layer):
    model = nn.Sequential(copy.deepcopy(layer).double(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randn(5, 2, 4, 4), torch.randint(3, (5,))
    model(x)
    la = laplace.Laplace(model, "classification", "all", "kron", backend=NNJGGN)
    with pytest.raises(nnj.NNJError, match=r"0\.weight: its curvature has no pair"):
        la.fit(DataLoader(TensorDataset(x, y), 5))


def test_frozen_parameters():
    case = small("classes")
    case.model[0].weight.requires_grad_(False)
    for structure in ("diag", "full", "kron"):
        mine = fitted(case, "classes", NNJGGN, "all", structure)
        assert mine.n_params == sum(p.numel() for p in case.model.parameters() if p.requires_grad)
        theirs = fitted(
            case, "classes", ByHand if structure != "kron" else NNJGGN, "all", structure
        )
        for one, two in zip(_said(mine, case.x), _said(theirs, case.x), strict=True):
            close(one, two)


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_a_subnetwork(structure):
    case = small("classes")
    mask = LargestMagnitudeSubnetMask(case.model, n_params_subnet=9).select()
    found = [
        fitted(case, "classes", backend, "subnetwork", structure, subnetwork_indices=mask)
        for backend in (NNJGGN, ByHand)
    ]
    close(found[0].H, found[1].H)
    for one, two in zip(*(_said(la, case.x) for la in found), strict=True):
        close(one, two)


def test_jacobians_and_gradients():
    case = small("classes")
    mine, theirs = NNJGGN(case.model, "classification"), ByHand(case.model, "classification")
    j, f = mine.jacobians(case.x)
    close(j, dense_jacobian(case.model, case.x))
    close(f, case.model(case.x).detach())
    for one, two in zip(
        mine.gradients(case.x, case.y), theirs.gradients(case.x, case.y), strict=True
    ):
        close(one, two)
    regression = small("several outputs")
    both = [b(regression.model, "regression") for b in (NNJGGN, ByHand)]
    for one, two in zip(*(b.gradients(regression.x, regression.y) for b in both), strict=True):
        close(one, two)


def test_backpropagation_through_a_prediction():
    case = small("classes")
    x = case.x[:2].clone().requires_grad_()
    found = []
    for backend in (NNJGGN, ByHand):
        la = fitted(case, "classes", backend, "all", "diag", enable_backprop=True)
        found.append(torch.autograd.grad(la(x, pred_type="glm").square().sum(), x)[0])
    close(*found)


def test_monte_carlo_is_unbiased():
    case = small("classes")
    exact = NNJGGN(case.model, "classification")
    drawn = NNJGGN(case.model, "classification", stochastic=True, num_samples=400)
    torch.manual_seed(0)
    diagonal, truth = drawn.diag(case.x, case.y)[1], exact.diag(case.x, case.y)[1]
    assert not torch.equal(diagonal, truth)
    assert (diagonal.sum() / truth.sum() - 1).abs() < 0.1
    full = drawn.full(case.x, case.y)[1]
    assert (full.trace() / truth.sum() - 1).abs() < 0.2
    pairs = [b.kron(case.x, case.y, 14)[1].kfacs[0] for b in (drawn, exact)]
    ratio = torch.kron(*pairs[0]).trace() / torch.kron(*pairs[1]).trace()
    assert ratio != 1 and (ratio - 1).abs() < 0.1


class Dicts(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.x, self.y = torch.randn(9, 3), torch.randint(3, (9,))

    def __len__(self) -> int:
        return 9

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"values": self.x[i], "labels": self.y[i]}


class OfDicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, data: MutableMapping[str, Tensor]) -> Tensor:
        found: Tensor = self.net(data["values"])
        return found


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
@pytest.mark.parametrize("weights", ["all", "last_layer"])
def test_batches_that_are_dicts(weights, structure):
    torch.manual_seed(0)
    model, data = OfDicts(), Dicts()
    plain = laplace.Laplace(model.net, "classification", weights, structure, backend=NNJGGN)
    plain.fit(DataLoader(TensorDataset(data.x, data.y), 4))
    named = laplace.Laplace(
        model, "classification", weights, structure, backend=NNJGGN, dict_key_x="values"
    )
    named.fit(DataLoader(data, 4))
    close(named.log_marginal_likelihood(), plain.log_marginal_likelihood())
    batch = {"values": data.x, "labels": data.y}
    close(named(batch), plain(data.x))


class Reward(nn.Module):
    """Two answers of (N, 2, 3) to their logits (N, 2), or one of (N, 3) to its reward (N, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).flatten(1)


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_reward_models(structure):
    torch.manual_seed(0)
    model, x, y = Reward(), torch.randn(8, 2, 3), torch.randint(2, (8,))
    la = laplace.Laplace(model, "reward_modeling", "all", structure, backend=NNJGGN)
    la.fit(DataLoader(TensorDataset(x, y), 4))
    mean, variance = la(x[:, 0])
    if structure == "full":
        j = dense_jacobian(model, x)
        p = model(x).detach().softmax(1)
        h = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        precision = torch.einsum("ncp,ncd,ndq->pq", j, h, j) + torch.eye(len(theta(model)))
        one = dense_jacobian(model, x[:, 0])
        close(variance, one @ torch.linalg.inv(precision) @ one.mT)
    close(mean, model(x[:, 0]).detach())


@pytest.mark.parametrize("pairs", [False, True], ids=["classes", "rewards"])
@pytest.mark.parametrize("way", ["nystrom", "variational"])
def test_posteriors_of_functions(way, pairs):
    """ELLA and VaLLA, which take Jacobians from a backend."""
    torch.manual_seed(0)
    if pairs:
        model, x, y = Reward(), torch.randn(8, 2, 3), torch.randint(2, (8,))
        one = x[:, 0]
    else:
        case = small("classes")
        model, x, y = case.model, case.x, case.y
        one = x
    options: dict[str, Any] = {"inducing_locations": one[:5].clone()}
    if way == "nystrom":
        options = {"subsample_size": 6, "n_eigenvalues": 3}
    found = []
    for backend in (NNJGGN, CurvlinopsGGN):
        torch.manual_seed(1)
        la = laplace.Laplace(
            model,
            "reward_modeling" if pairs else "classification",
            "all",
            "gp",
            functional_approximation=way,
            backend=backend,
            **options,
        )
        la.fit(DataLoader(TensorDataset(x, y), 7))
        torch.manual_seed(2)
        found.append(_said(la, one[:4]))
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs)


def test_training_by_the_marginal_likelihood():
    case = small("classes")
    loader = DataLoader(TensorDataset(case.x, case.y), 7)
    la, *_ = laplace.marglik_training(
        case.model, loader, "classification", "kron", backend=NNJGGN, n_epochs=3, n_hypersteps=2
    )
    assert torch.isfinite(la.log_marginal_likelihood())


def test_the_users_model_has_no_hooks_afterwards():
    case = small("classes")
    fitted(case, "classes", NNJGGN, "all", "kron")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())
    assert all(p.grad is None for p in case.model.parameters())


def test_functional_laplace_takes_three_backends_by_name():
    """As the guide says; nothing of laplace-torch is patched."""
    case = small("classes")
    with pytest.raises(AssertionError):
        laplace.Laplace(case.model, "classification", "all", "gp", n_subset=5, backend=NNJGGN)
