"""The states of quantities that are given themselves: over chunks, passes, batches, files and
compiled passes, at parameters, modules and the context.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nnj
from tests.support.fitting import CLASSES, LOADER, N, X, mlp
from tests.support.quantities import JointBlock, LargestGradient, Squares


def given() -> tuple[nn.Module, nn.Module]:
    return nnj.extend(mlp().eval()), nnj.extend(nn.CrossEntropyLoss(reduction="sum"))


@pytest.mark.parametrize("memory", [1, 2**28])
def test_a_joint_block(memory):
    model, loss = given()
    with nnj.collect(JointBlock(), "ggn_block", "ggn_diag", memory=memory) as context:
        for part in (slice(0, 3), slice(3, N)):
            loss(model(X[part]), CLASSES[part]).backward()
            inside = context.joint_block
    assert torch.equal(context.joint_block, inside)
    p = sum(q.numel() for q in model.parameters())
    assert context.joint_block.shape == (p, p)
    diagonal = torch.cat([q.ggn_diag.flatten() for q in model.parameters()])
    torch.testing.assert_close(context.joint_block.diagonal(), diagonal)
    first = model[0].ggn_block
    torch.testing.assert_close(context.joint_block[: len(first), : len(first)], first)
    torch.testing.assert_close(context.joint_block, _dense_ggn(model))
    assert torch.equal(context.matrix("joint_block").dense(), context.joint_block)


def _dense_ggn(model: nn.Module) -> Tensor:
    params = dict(model.named_parameters())
    f = lambda params, x: torch.func.functional_call(model, params, (x[None],))[0]
    plain = {name: p.detach() for name, p in params.items()}
    j = torch.func.vmap(torch.func.jacrev(f), (None, 0))(plain, X)
    j = torch.cat([t.flatten(2) for t in j.values()], 2)
    prob = torch.softmax(model(X).detach(), 1)
    h = torch.diag_embed(prob) - prob[:, :, None] * prob[:, None]
    return torch.einsum("ncp,ncd,ndq->pq", j, h, j)


def test_results_are_finished_once_all_passes_are_added():
    model, loss = given()
    with nnj.collect(Squares(root=True), "ggn_diag"):
        for part in (slice(0, 3), slice(3, N)):
            loss(model(X[part]), CLASSES[part]).backward()
    for p in model.parameters():
        torch.testing.assert_close(p.squares, p.ggn_diag.sqrt())


def test_a_merge_of_its_own():
    model, loss = given()
    with nnj.collect(LargestGradient(), "batch_grad") as context:
        for part in (slice(0, 3), slice(3, N)):
            loss(model(X[part]), CLASSES[part]).backward()
    largest = [p.batch_grad.abs().max() for p in model.parameters()]
    assert [p.largest_gradient for p in model.parameters()] == largest
    assert context.largest_of_all == max(largest) and context.entries == 4
    with pytest.raises(AttributeError, match=r"has no 'x'\. It has largest_of_all, entries$"):
        _ = context.x


def test_fits_merge_and_go_through_files(tmp_path):
    asked = (Squares(root=True), JointBlock(), LargestGradient(), "ggn_diag", "batch_grad")
    loss = nn.CrossEntropyLoss()
    for scale in ("sum", "mean"):
        whole = nnj.fit(mlp(), loss, LOADER, *asked, scale=scale)
        parts = [nnj.fit(mlp(), loss, [batch], *asked, scale=scale) for batch in LOADER]
        for i, part in enumerate(parts):
            part.save(tmp_path / f"{i}.pt")
        parts = [nnj.Fit.load(tmp_path / f"{i}.pt") for i in range(len(parts))]
        for merged in (nnj.Fit.merge(parts), nnj.Fit.merge([whole])):
            assert list(merged) == list(whole) and merged.samples == N
            assert merged.total == whole.total and repr(merged) == repr(whole)
            for name in ("squares", "largest_gradient", "ggn_diag", "batch_grad"):
                torch.testing.assert_close(merged[name], whole[name])
            torch.testing.assert_close(merged.context, whole.context)
            for name in ("squares", "joint_block", "ggn_diag"):
                torch.testing.assert_close(merged.matrix(name).dense(), whole.matrix(name).dense())


def test_fits_that_do_not_belong_together():
    loss = nn.CrossEntropyLoss()
    one = nnj.fit(mlp(), loss, LOADER, "ggn_diag")
    others = {
        "parameters": nnj.fit(mlp()[:1], loss, [(X, CLASSES)], "ggn_diag"),
        "losses": nnj.fit(mlp(), nn.MultiMarginLoss(), LOADER, "ggn_block"),
        "scales": nnj.fit(mlp(), loss, LOADER, "ggn_diag", scale="mean"),
        "quantities": nnj.fit(mlp(), loss, LOADER, "ggn_diag", "ggn_block"),
    }
    for what, other in others.items():
        with pytest.raises(nnj.NNJError, match=rf"^fits with other {what} are not of parts of one"):
            nnj.Fit.merge([one, other])
    with pytest.raises(nnj.NNJError, match=r"^Fit.merge takes a list of at least one nnj.Fit$"):
        nnj.Fit.merge([])
    with pytest.raises(nnj.NNJError, match=r"^Fit.merge takes nnj.Fits, not dict$"):
        nnj.Fit.merge([one, {}])


def test_compiled_as_eager():
    model, loss = given()
    asked = (JointBlock(), LargestGradient(), Squares(root=True))
    with nnj.collect(*asked) as context:
        loss(model(X), CLASSES).backward()
    eager = [(p.largest_gradient, p.squares) for p in model.parameters()]
    step = nnj.compile(model, loss, *asked, backend="aot")
    for _ in range(4):
        _, results = step(X, CLASSES)
    assert step.reasons == [] and step.replays >= 1
    torch.testing.assert_close(results["joint_block"], context.joint_block)
    for p, (largest, squares) in zip(model.parameters(), eager, strict=True):
        torch.testing.assert_close(p.largest_gradient, largest)
        torch.testing.assert_close(p.squares, squares)


def test_two_losses_of_what_is_quadratic():
    model, loss = given()
    message = r"^largest_gradient: two losses of the same samples are in one backward pass"
    with pytest.raises(nnj.NNJError, match=message), nnj.collect(LargestGradient()):
        z = model(X)
        (loss(z, CLASSES) + loss(2 * z, CLASSES)).backward()
    with nnj.collect(JointBlock()) as context:
        z = model(X)
        (loss(z, CLASSES) + loss(2 * z, CLASSES)).backward()
    both = context.joint_block
    with nnj.collect(JointBlock()) as context:
        loss(model(X), CLASSES).backward()
        loss(2 * model(X), CLASSES).backward()
    torch.testing.assert_close(both, context.joint_block)


def test_passes_of_other_forms():
    model, loss = given()
    other = nnj.extend(nn.Linear(X.shape[1], 3).double())
    message = r"^states of two passes have other facts .* Collect over models and losses that do"
    with pytest.raises(nnj.NNJError, match=message), nnj.collect(JointBlock()):
        loss(model(X), CLASSES).backward()
        loss(other(X), CLASSES).backward()


def test_a_matrix_of_a_part_and_of_what_was_not_reached():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "unused": nn.Linear(2, 2), "b": nn.Linear(4, 3)})
    model.forward = lambda x: model["b"](torch.tanh(model["a"](x)))
    nnj.extend(model.double())
    loss = nnj.extend(nn.MSELoss())
    x, y = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    with nnj.collect("ggn_diag", "ggn_block", "kfac") as context:
        loss(model(x), y).backward()
    for name in ("ggn_diag", "ggn_block", "kfac"):
        matrix = context.matrix(name)
        assert list(matrix.layout.shapes) == [n for n, _ in model.named_parameters()]
        assert not matrix.block("unused").dense().any() and matrix.block("a").dense().any()
        assert matrix.solve(torch.ones(matrix.shape[0]).double(), 1.0).isfinite().all()
    with nnj.collect("ggn_diag", modules=[model["b"]]) as context:
        loss(model(x), y).backward()
    assert list(context.matrix("ggn_diag").layout.shapes) == ["b.weight", "b.bias"]


def test_what_is_no_matrix():
    model, loss = given()
    with nnj.collect("batch_grad", "ggn_diag") as context:
        loss(model(X), CLASSES).backward()
    with pytest.raises(nnj.NNJError, match=r"^'batch_grad' is no matrix over the parameters"):
        context.matrix("batch_grad")
    with pytest.raises(nnj.NNJError, match=r"^'kfac' is not collected here\. Collected: batch_"):
        context.matrix("kfac")
    with nnj.collect("ggn_diag"):
        loss(model(X), CLASSES).backward()
    with pytest.raises(nnj.NNJError, match=r"^a later nnj.collect of ggn_diag has taken"):
        context.matrix("ggn_diag")
    fit = nnj.fit(model, nn.CrossEntropyLoss(), LOADER, "batch_grad")
    with pytest.raises(nnj.NNJError, match=r"^'batch_grad' is no matrix over the parameters"):
        fit.matrix("batch_grad")
    with pytest.raises(nnj.NNJError, match=r"^'kfac' was not fitted\. Fitted: batch_grad$"):
        fit.matrix("kfac")


def test_a_matrix_of_two_models():
    model, loss = given()
    other = nnj.extend(mlp())
    with nnj.collect("ggn_diag") as context:
        loss(model(X), CLASSES).backward()
        loss(other(X), CLASSES).backward()
    with pytest.raises(nnj.NNJError, match=r"^a matrix is over the parameters of one model, and 2"):
        context.matrix("ggn_diag")


def test_a_parameter_of_two_modules_is_with_the_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    nnj.extend(model)
    loss = nnj.extend(nn.MSELoss())
    with nnj.collect("ggn_block", "ggn_diag") as context:
        loss(model(torch.randn(5, 4).double()), torch.randn(5, 4).double()).backward()
    found = context.matrix("ggn_block")
    assert list(found.layout.shapes) == ["0.weight", "0.bias", "2.bias"]
    torch.testing.assert_close(found.diagonal(), context.matrix("ggn_diag").diagonal())
    torch.testing.assert_close(found.block("0").dense(), model[0].ggn_block)
