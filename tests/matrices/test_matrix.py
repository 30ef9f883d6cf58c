"""What a subclass must define, and what every matrix refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnj import NNJError
from nnj.jacobians.factor import DenseFactor
from nnj.matrices import Dense, Diagonal, Matrix

EYE = Dense({"a": (2,), "b": ()}, torch.eye(3))


def test_a_subclass_without_its_product() -> None:
    with pytest.raises(TypeError, match="Nothing must define matmul"):
        type("Nothing", (Matrix,), {})


@pytest.mark.parametrize("v", [torch.ones(4), torch.ones(()), torch.ones(3, 1, 1)])
def test_vectors_of_another_length(v: Any) -> None:
    for ask in (EYE.__matmul__, EYE.solve):
        with pytest.raises(NNJError, match=r"is no vector of this matrix"):
            ask(v)


@pytest.mark.parametrize("m", [EYE, Diagonal({"a": (3,)}, torch.ones(3))])
def test_what_is_no_vector_of_its_dtype(m: Any) -> None:
    for ask in (m.__matmul__, m.solve):
        with pytest.raises(NNJError, match=r"^list is no vector.*parameters_to_vector does$"):
            ask([torch.ones(3)])
        with pytest.raises(NNJError, match=r"^a vector is torch.float64 on cpu, and the matrix to"):
            ask(torch.ones(3).double())


@pytest.mark.parametrize("c", [-1, float("nan"), True, "2"])
def test_numbers_that_make_it_indefinite(c: Any) -> None:
    with pytest.raises(NNJError, match="is not positive semi-definite. Multiply"):
        EYE * c


def test_matrices_over_other_parameters() -> None:
    for shapes in ({"a": (2,), "c": ()}, {"b": (), "a": (2,)}, {"a": (3,)}):
        with pytest.raises(NNJError, match="have no sum"):
            EYE + Diagonal(shapes, torch.ones(3))
    with pytest.raises(NNJError, match="factors at a"):
        EYE.contract({"a": DenseFactor(torch.ones(1, 1, 3))})


def test_entries_that_are_no_curvature() -> None:
    with pytest.raises(NNJError, match="is symmetric, and this one is not"):
        Dense({"a": (2,)}, torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    with pytest.raises(NNJError, match="a matrix over 3 entries"):
        Dense({"a": (3,)}, torch.eye(2))
    with pytest.raises(NNJError, match="entries of torch.int64"):
        Diagonal({"a": (2,)}, torch.ones(2).long())
    with pytest.raises(NNJError, match="1 of 2 entries are below zero"):
        Diagonal({"a": (2,)}, torch.tensor([1.0, -1.0]))


def test_half_precision_is_decomposed_in_single() -> None:
    m = Dense({"a": (2,)}, torch.tensor([[2.0, 1], [1, 2]]).bfloat16())
    assert m.solve(torch.ones(2).bfloat16()).dtype == torch.bfloat16
    assert m.sample(4, 1.0, torch.Generator().manual_seed(0)).shape == (4, 2)
    torch.testing.assert_close(m.logdet().float(), torch.tensor(3.0).log(), rtol=1e-2, atol=0)


def test_samples_are_the_same_with_the_same_generator() -> None:
    drawn = [EYE.sample(5, 1.0, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*drawn) and not torch.equal(drawn[0][0], drawn[0][1])
