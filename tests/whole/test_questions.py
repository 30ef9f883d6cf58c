"""Once a structure is known, a pass asks one question of tensors: whether all is well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj
from tests.support.questions import Questions, Reads

N, C, TOKENS, WORDS = 6, 5, 7, 20


class Tokens(nn.Module):
    """A transformer over tokens, of which 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.words = nn.Embedding(WORDS, 16)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, C)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(self.words(x), src_key_padding_mask=x == 0)
        result: Tensor = self.head(z.mean(1))
        return result


def tokens() -> Tensor:
    """Some words, and padding."""
    x = torch.randint(1, WORDS, (N, TOKENS))
    x[:, 5:] = 0
    return x


MODELS = {
    "MLP": (
        lambda: nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, C)),
        lambda: torch.randn(N, 10),
    ),
    "CNN": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, C)),
        ),
        lambda: torch.randn(N, 1, 14, 14),
    ),
    "transformer": (Tokens, tokens),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(WORDS, 8), nn.Flatten(), nn.Linear(8 * TOKENS, C)),
        tokens,
    ),
    "short table": (
        lambda: nn.Sequential(nn.Embedding(2, 8), nn.Flatten(), nn.Linear(8 * TOKENS, C)),
        lambda: tokens() % 2,
    ),
}
ASKED = [("ggn_diag",), ("batch_grad",), ("ggn_diag", "ggn_diag_mc", "batch_grad")]


def asked(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, *quantities: str) -> list[str]:
    """The questions of one pass."""
    questions = Questions()
    with nnj.collect(*quantities):
        value = loss(model(x), y)
        with questions, Reads(questions):
            value.backward()
    return questions.asked


@pytest.mark.parametrize("quantities", ASKED, ids=" ".join)
@pytest.mark.parametrize("name", MODELS)
def test_one_question_once_a_structure_is_known(name: str, quantities: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    make, data = MODELS[name]
    model, loss = nnj.extend(make()), nnj.extend(nn.CrossEntropyLoss())
    first = asked(model, loss, data(), torch.randint(0, C, (N,)), *quantities)
    assert len(first) > 1, "the test counts nothing"  # verification asks
    again = asked(model, loss, data(), torch.randint(0, C, (N,)), *quantities)
    assert len(again) <= 1, "\n".join(again)


class EachToken(nn.Module):
    """A language model, whose loss is over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(WORDS, 8), nn.LayerNorm(8)
        self.mixed, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, C)

    def forward(self, x: Tensor) -> Tensor:
        z = self.words(x)
        heads = [a.unflatten(2, (2, 4)) for a in self.mixed(self.norm(z)).split(8, -1)]
        mixed = F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in heads))
        result: Tensor = self.head(z + F.gelu(self.out(mixed.transpose(1, 2).flatten(2))))
        return result


@pytest.mark.parametrize(
    "given",
    [lambda z, y: (z.flatten(0, 1), y.flatten()), lambda z, y: (z.transpose(1, 2), y)],
    ids=["flat", "classes first"],
)
def test_a_loss_of_tokens_asks_one_more_how_many_of_them_count(given: Any) -> None:
    """Behind the mixing a sample needs columns for its tokens that are not ignored."""
    torch.manual_seed(0)
    model, loss = nnj.extend(EachToken()), nnj.extend(nn.CrossEntropyLoss())
    for _ in range(3):
        x, y = tokens(), torch.randint(0, C, (N, TOKENS))
        questions = Questions()
        with nnj.collect("ggn_diag"):
            value = loss(*given(model(x), y))
            with questions, Reads(questions):
                value.backward()
    assert len(questions.asked) <= 2, "\n".join(questions.asked)


WRONG = {
    "outputs that are not finite": (lambda x: x * float("inf"), 1.0, "entries that are not finite"),
    "a negative factor": (lambda x: x, -1.0, "negative factor"),
    "a factor that is not finite": (lambda x: x, float("inf"), "factor of the loss is not finite"),
}


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_with_the_one_question(name: str, known: bool) -> None:
    torch.manual_seed(0)
    change, factor, sentence = WRONG[name]
    model, loss = nnj.extend(MODELS["MLP"][0]()), nnj.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(N, 10), torch.randint(0, C, (N,))
    if known:
        asked(model, loss, x, y, "ggn_diag")
    with pytest.raises(nnj.NNJError, match=sentence):
        with nnj.collect("ggn_diag", "ggn_diag_mc"):
            (loss(model(change(x)), y) * factor).backward()


def test_a_structure_met_with_wrong_numbers_is_still_to_be_verified() -> None:
    from nnj.propagation import verification

    torch.manual_seed(0)
    model, loss = nnj.extend(MODELS["MLP"][0]()), nnj.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(N, 10), torch.randint(0, C, (N,))
    with pytest.raises(nnj.NNJError, match="not finite"), nnj.collect("ggn_diag"):
        loss(model(x * float("nan")), y).backward()
    before = verification.runs
    with nnj.collect("ggn_diag"):
        loss(model(x), y).backward()
    assert verification.runs == before + 1


def test_of_two_losses_the_first_to_be_wrong_is_named() -> None:
    torch.manual_seed(0)
    model = nnj.extend(MODELS["MLP"][0]())
    one, other = nnj.extend(nn.CrossEntropyLoss()), nnj.extend(nn.MSELoss())
    x, y = torch.randn(N, 10), torch.randint(0, C, (N,))
    out = model(x)
    with pytest.raises(nnj.NNJError, match="MSELoss.*negative|negative.*MSELoss"):
        with nnj.collect("ggn_diag"):
            (one(out, y) - other(out, torch.zeros_like(out))).backward()


@pytest.mark.parametrize("name", ["embedding", "transformer"])
def test_a_compiled_pass_serves_all_tokens(name: str) -> None:
    torch.manual_seed(0)
    make, data = MODELS[name]
    model, loss = make(), nn.CrossEntropyLoss()
    step = nnj.compile(model, loss, "ggn_diag", backend="aot")
    batches = [(data(), torch.randint(0, C, (N,))) for _ in range(5)]
    for x, y in batches:
        step(x, y)
    assert step.replays == len(batches) - 3 and not step.reasons  # eager, traced, confirmed
    found = [p.ggn_diag.clone() for p in model.parameters()]
    x, y = batches[-1]
    model, loss = nnj.extend(model), nnj.extend(loss)
    with nnj.collect("ggn_diag"):
        loss(model(x), y).backward()
    for p, one in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(one, p.ggn_diag)
