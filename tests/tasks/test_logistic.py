from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.tasks.logistic import Logistic, Ridge

PATH = torch.logspace(-7, 2, 10, dtype=torch.float64).tolist()


def problem(classes: int, rows: int = 300, width: int = 24) -> tuple[Tensor, Tensor]:
    """Rows whose axes differ a thousandfold in spread and do not lie around zero; labels that are not certain."""
    generator = torch.Generator().manual_seed(classes)
    x = torch.randn(rows, width, generator=generator) * torch.logspace(-2, 1, width) + 3
    labels = (x[:, -classes:] + 3 * torch.randn(rows, classes, generator=generator)).argmax(1)
    return x, labels


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).double()


def objective(weight: Tensor, bias: Tensor, z: Tensor, labels: Tensor, c: float) -> Tensor:
    """Scikit-learn's objective divided by C N, written out; one row of weights means two classes."""
    logits = z @ weight.T + bias
    if len(weight) == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    return F.cross_entropy(logits, labels) + weight.square().sum() / (2 * c * len(z))


def scaled(x: Tensor) -> Tensor:
    return (x.double() - x.double().mean()) / x.double().std(correction=0)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_optimum_is_scikit_learn_s(classes: int):
    """Ten values of C: the same objective to 1e-9 as its solver at its tightest."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="the reference solver is scikit-learn's")
    x, labels = problem(classes)
    ours, z, start = Logistic(x, one_hot(labels, classes)), scaled(x), None
    for c in PATH:
        found = ours.solve(c, start)
        start = found.raw
        model = linear_model.LogisticRegression(C=c, tol=1e-12, max_iter=100_000)
        model.fit(z.numpy(), labels.numpy())
        theirs = objective(torch.tensor(model.coef_), torch.tensor(model.intercept_), z, labels, c)
        assert found.loss == pytest.approx(theirs.item(), abs=1e-9), c


@pytest.mark.parametrize("classes", [2, 5])
def test_gradient_vanishes_and_no_step_away_is_lower(classes: int):
    """By autograd on the written-out objective, in the scaled coordinates."""
    x, labels = problem(classes)
    z, solver = scaled(x), Logistic(x, one_hot(labels, classes))
    found = solver.solve(0.1)
    weight = found.weight * x.double().std(correction=0)
    bias = found.bias + found.weight.sum(1) * x.double().mean()
    if classes == 2:
        weight, bias = 2 * weight[1:], 2 * bias[1:]
    leaves = [weight.clone().requires_grad_(True), bias.clone().requires_grad_(True)]
    loss = objective(*leaves, z, labels, 0.1)
    assert loss.item() == pytest.approx(found.loss, abs=1e-12)
    gradients = torch.autograd.grad(loss, leaves)
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-6
    zero = objective(torch.zeros_like(weight), torch.zeros_like(bias), z, labels, 0.1)
    assert loss.item() < zero.item() - 0.1, "there is something to solve"


def test_solution_is_for_rows_as_they_were_given():
    x, labels = problem(2)
    found = Logistic(x, one_hot(labels, 2)).solve(1.0)
    assert found.weight.shape == (2, 24)
    assert torch.equal(found.weight[0], -found.weight[1]), "LP-FT's form of two classes"
    accuracy = (found.logits(x).argmax(1) == labels).double().mean()
    assert accuracy > 0.8


def test_the_start_decides_nothing():
    x, labels = problem(3)
    solver = Logistic(x, one_hot(labels, 3))
    fresh, warm = solver.solve(1.0), solver.solve(1.0, solver.solve(1e-3).raw)
    assert fresh.loss == pytest.approx(warm.loss, abs=1e-11)
    assert torch.allclose(fresh.weight, warm.weight, rtol=1e-3, atol=1e-5)


def test_a_label_without_rows_and_rows_without_spread():
    x, labels = problem(2)
    found = Logistic(torch.cat([x, torch.ones(300, 2)], 1), one_hot(labels, 3)).solve(1e-2)
    assert torch.isfinite(found.weight).all()
    assert found.logits(torch.cat([x, torch.ones(300, 2)], 1)).argmax(1).max() < 2


def test_one_vs_rest_is_scikit_learn_s():
    """Five labels of which any number applies, some of them not known; each as its own logistic regression."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="the reference solver is scikit-learn's")
    x, _ = problem(5)
    generator = torch.Generator().manual_seed(1)
    gold = (torch.randn(300, 5, generator=generator) + x[:, -5:] - 3 > 1).double()
    known = torch.rand(300, 5, generator=generator) < 0.9
    solver, z = Logistic(x, gold * known, (1 - gold) * known), scaled(x).numpy()
    for c in (1e-3, 1.0, 10.0):
        found = solver.solve(c, tolerance=1e-10)
        for label in range(5):
            rows = known[:, label].numpy()
            model = linear_model.LogisticRegression(C=c, tol=1e-12, max_iter=100_000)
            model.fit(z[rows], gold[:, label].numpy()[rows])
            theirs = torch.tensor(model.decision_function(z))
            torch.testing.assert_close(found.logits(x)[:, label], theirs, atol=1e-5, rtol=1e-5)


def test_ridge_is_scikit_learn_s():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="the reference solver is scikit-learn's")
    x, labels = problem(3)
    scores = labels.double() * 2.5 + x[:, 3].double()
    for c in PATH:
        found = Ridge(x, scores).solve(c)
        model = linear_model.Ridge(alpha=1 / c, solver="svd").fit(scaled(x).numpy(), scores.numpy())
        assert found.weight.shape == (1, x.shape[1])
        theirs = torch.tensor(model.predict(scaled(x).numpy()))
        assert torch.allclose(found.logits(x)[:, 0], theirs, rtol=0, atol=1e-9), c
        loss = (theirs - scores).square().mean() / 2 + (model.coef_**2).sum() / (2 * c * len(x))
        assert found.loss == pytest.approx(float(loss), abs=1e-9)


def test_ridge_with_fewer_rows_than_features_and_one_score():
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    found = Ridge(x, torch.full((5,), 2.5)).solve(100.0)
    assert torch.allclose(found.logits(x), torch.full((5, 1), 2.5, dtype=torch.float64))


@pytest.mark.parametrize("classes", [2, 3])
def test_fewer_rows_than_features(classes: int):
    """The optimum lies in the span of the rows; scikit-learn looks for it among all features."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="the reference solver is scikit-learn's")
    x, labels = problem(classes, rows=40, width=60)
    found, z = Logistic(x, one_hot(labels, classes)).solve(1.0), scaled(x)
    assert found.weight.shape == (classes, 60)
    model = linear_model.LogisticRegression(C=1.0, tol=1e-12, max_iter=100_000).fit(z.numpy(), labels.numpy())
    theirs = objective(torch.tensor(model.coef_), torch.tensor(model.intercept_), z, labels, 1.0)
    assert found.loss == pytest.approx(theirs.item(), abs=1e-9)
    probabilities = torch.tensor(model.predict_proba(z.numpy()))
    torch.testing.assert_close(found.logits(x).softmax(1), probabilities, rtol=0, atol=1e-4)
