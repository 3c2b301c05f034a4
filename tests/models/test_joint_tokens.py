"""Tokens of the joint search of a model, and their metrics."""

import helpers
import pytest
import torch

from spinlock_fast import Trainer
from spinlock_fast.config.schema import RunConfig, TrainingConfig
from spinlock_fast.models.joint_metrics import joint_metrics, joint_searches
from spinlock_fast.models.metrics import evaluate

SETTINGS = {
    "training.num_epochs": 3,
    "training.batch_size": 64,
    "training.val_every_n_epochs": 3,
    "training.topo_samples": 64,
    "model.group_embedding_dim": 16,
    "model.group_hidden_dim": 16,
    "model.dropout": 0.2,
    "logging.tensorboard": False,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def fitted():
    x = helpers.planted_matrix(240, [6, 4], seed=5)
    groups = {"a": [0, 1, 2, 3, 4, 5], "b": [6, 7, 8, 9]}
    return Trainer.from_config(RunConfig(), SETTINGS).fit(x, groups, val_rows=list(range(40))), x


def row_errors(model, x, tokens):
    return (model.decode_from_tokens(tokens) - x).double().square().sum(1)


def test_error_falls_with_every_sweep(fitted):
    model, x = fitted[0].model, torch.from_numpy(fitted[0].normalizer(fitted[1]) if fitted[0].normalizer else fitted[1])
    model.train()  # tokens are searched without dropout
    nearest = model.get_tokens(x)
    assert torch.equal(nearest, model.get_tokens(x, "nearest"))
    errors = [row_errors(model, x, nearest)]
    for sweeps in (1, 2, 3):
        tokens = model.get_tokens(x, "joint", sweeps)
        errors.append(row_errors(model, x, tokens))
        assert (errors[-1] <= errors[-2] + 1e-6).all()
    assert model.training
    assert errors[2].mean() < 0.99 * errors[0].mean()
    assert torch.equal(model.get_tokens(x, "joint"), model.get_tokens(x, "joint", 2))
    whole = model.get_tokens(x, "joint", 2)
    assert torch.equal(torch.cat([model.get_tokens(part, "joint", 2) for part in x.split(7)]), whole)


def test_result_encodes_in_the_units_of_the_data(fitted):
    result, x = fitted
    tokens, joint = result.encode(x), result.encode(x, "joint", 3)
    error = [((result.decode(t) - x) ** 2).mean() for t in (tokens, joint)]
    assert error[1] < error[0]


def test_metrics(fitted):
    result, x = fitted
    rows = torch.from_numpy(result.normalizer(x) if result.normalizer else x)
    rows = torch.cat([rows, torch.full_like(rows[:1], torch.inf)])
    metrics = joint_metrics(result.model, rows)
    rows = rows[:-1]
    tokens = result.model.get_tokens(rows, "joint", 2)
    error = float(row_errors(result.model, rows, tokens).mean()) / rows.shape[1]
    assert metrics["reconstruction_error"] == pytest.approx(error, rel=1e-6)
    assert metrics["reconstruction_error"] < evaluate(result.model, rows, TrainingConfig())["reconstruction_error"]
    assert metrics["changed"] == pytest.approx((tokens != result.model.get_tokens(rows)).double().mean())
    used = [len(column.unique()) for column in tokens.T]
    expected = [n / k for n, k in zip(used, result.model.quantizer.num_codes, strict=True)]
    measured = [value for category in metrics["categories"] for value in category["utilization"]]
    assert measured == pytest.approx(expected)
    weights = [len(members) for members in result.model.config.group_indices.values()]
    mean = sum(w * c["mse"] for w, c in zip(weights, metrics["categories"], strict=True)) / sum(weights)
    assert mean == pytest.approx(error, rel=1e-6)


def test_perturbations_lower_the_error(fitted):
    result, x = fitted
    rows = torch.from_numpy(result.normalizer(x) if result.normalizer else x)
    plain, perturbed = (joint_metrics(result.model, rows, perturbations=count) for count in (0, 6))
    assert perturbed["perturbations"] == 6
    reported = result.metrics["joint"]  # of the validation rows
    assert reported == joint_searches(result.model, rows[:40])
    assert reported["perturbed"]["reconstruction_error"] <= reported["reconstruction_error"]
    assert perturbed["reconstruction_error"] < plain["reconstruction_error"]
    tokens = result.model.get_tokens(rows, "joint", perturbations=6)
    assert torch.equal(tokens, result.encode(torch.from_numpy(x), "joint", perturbations=6))
    assert torch.equal(tokens[50:53], result.model.get_tokens(rows[50:53], "joint", perturbations=6))
    for count in (-1, 1.5):
        with helpers.raises_one_line(ValueError, "perturbations"):
            result.model.get_tokens(rows, "joint", perturbations=count)


@pytest.mark.parametrize(("search", "sweeps"), [("best", 2), ("joint", 0), ("nearest", 1.5)])
def test_unknown_search(fitted, search, sweeps):
    with helpers.raises_one_line(ValueError, "search" if search == "best" else "sweeps"):
        fitted[0].model.get_tokens(torch.zeros(1, 10), search, sweeps)


@pytest.mark.parametrize("setting", [{"sweeps": 3}, {"search_weight": 1.0}, {"perturbations": 8}], ids=str)
def test_settings_of_the_joint_search_need_it(fitted, setting):
    """They would be ignored in silence."""
    with helpers.raises_one_line(ValueError, next(iter(setting)), "search='joint'"):
        fitted[0].model.get_tokens(torch.zeros(1, 10), **setting)
