"""Attention's backward for many columns, a few heads, queries and columns at a time, against
autograd.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nnj.graph import attention
from nnj.graph.attention import attention_backward, fused_attention

pytestmark = pytest.mark.usefixtures("seeded")
N, H, T, S, D, K = 2, 3, 4, 6, 5, 7
r = lambda *shape: torch.randn(*shape, dtype=torch.float64)
WHOLE_ROW = torch.ones(T, S, dtype=torch.bool).index_fill(0, torch.tensor([1]), False)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "mask": {"attn_mask": r(T, S)},
    "mask of each sample": {"attn_mask": torch.rand(N, 1, T, S) > 0.4},
    "a row that is masked": {"attn_mask": WHOLE_ROW},
}


def attend(tokens_first: bool, **form: Any) -> tuple[list[Tensor], Tensor]:
    """Q, K and V, and the output; with the heads behind the tokens in memory, or before them."""
    shapes = [(N, n, H, D) if tokens_first else (N, H, n, D) for n in (T, S, S)]
    inputs = [r(*shape).requires_grad_() for shape in shapes]
    heads = [t.transpose(1, 2) if tokens_first else t for t in inputs]
    return heads, torch.nn.functional.scaled_dot_product_attention(*heads, **form)


@pytest.mark.parametrize("scores", [1 << 20, H * T * S, 2 * T * S, 3 * S, 1])
@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_columns_are_those_of_autograd(
    monkeypatch: Any, form: dict[str, Any], tokens_first: bool, scores: int
) -> None:
    monkeypatch.setattr(attention, "SCORES", scores)
    inputs, y = attend(tokens_first, **form)
    assert y.grad_fn is not None and fused_attention(y.grad_fn)
    g = r(K, *y.shape)
    found = attention_backward(y.grad_fn, g)
    assert found is not None
    for k in range(K):
        true = torch.autograd.grad(y, inputs, g[k], retain_graph=True)
        for mine, theirs in zip(found, true, strict=True):
            assert mine is not None and not mine.requires_grad
            torch.testing.assert_close(mine[k], theirs.nan_to_num())


def test_few_scores_are_there_at_once(monkeypatch: Any) -> None:
    """Not those of all columns, samples and heads."""
    largest = 0
    scores_of = attention._scores

    def noting(*given: Tensor) -> Tensor:
        nonlocal largest
        found = scores_of(*given)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setattr(attention, "_scores", noting)
    for scores in (1, 3 * S, T * S, 2 * T * S, 5 * T * S, 1000):
        monkeypatch.setattr(attention, "SCORES", scores)
        _, y = attend(True)
        largest = 0
        attention_backward(y.grad_fn, r(K, *y.shape))
        assert largest <= max(scores, S)


def test_it_can_be_differentiated_in_the_columns() -> None:
    """Which is how tangents go forward."""
    inputs, y = attend(True)
    g, v = r(1, *y.shape).requires_grad_(), r(1, N, H, T, D)
    found = attention_backward(y.grad_fn, g)
    assert found is not None and found[0] is not None
    (moved,) = torch.autograd.grad(found[0], g, v)
    run = lambda q: torch.nn.functional.scaled_dot_product_attention(q, *inputs[1:])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, true = torch.func.jvp(run, (inputs[0].detach(),), (v[0],))
    torch.testing.assert_close(moved[0], true.detach())
