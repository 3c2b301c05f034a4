"""Ridge regression of the decoder's output layer."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import planted_matrix
from torch import Tensor

from spinlock_fast.config.schema import RunConfig
from spinlock_fast.models import decoder_refit
from spinlock_fast.models.decoder_refit import decoder_hidden, decoder_output_layer, least_squares, refit_decoder
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.training.trainer import Trainer

GROUPS = {"a": list(range(6)), "b": list(range(6, 15))}


@pytest.fixture
def x() -> Tensor:
    return torch.from_numpy(planted_matrix(300, [6, 9, 5], seed=0))  # the last five are in no category


@pytest.fixture
def model(x: Tensor) -> CategoricalHierarchicalVQVAE:
    torch.manual_seed(0)
    made = CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(input_dim=20, group_indices=GROUPS, dropout=0.5))
    made.eval()
    with torch.no_grad():
        made.quantizer.initialize(made.encode(x))
    return made


def error(model: CategoricalHierarchicalVQVAE, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x)["reconstruction"] - x).square().mean())


def test_refit_is_the_least_squares_solution(model: CategoricalHierarchicalVQVAE, x: Tensor) -> None:
    tokens, before = model.get_tokens(x), error(model, x)
    with torch.no_grad():
        hidden = decoder_hidden(model, x).double()
    weights, constant = least_squares(hidden, x.double(), 1e-9)
    best = float((hidden @ weights + constant - x).square().mean())
    refit_decoder(model, x, 1e-9)
    assert error(model, x) == pytest.approx(best, rel=1e-2)
    assert best < 0.5 * before
    assert torch.equal(model.get_tokens(x), tokens)


def test_least_squares_finds_a_plane_and_shrinks_towards_the_mean() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(50, 3, dtype=torch.float64)
    plane = torch.tensor([[1.0, -2.0], [0.5, 0.0], [3.0, 1.0]], dtype=torch.float64)
    targets = inputs @ plane + torch.tensor([4.0, -1.0], dtype=torch.float64)
    weights, constant = least_squares(inputs, targets, 1e-12)
    torch.testing.assert_close(weights, plane)
    torch.testing.assert_close(constant, torch.tensor([4.0, -1.0], dtype=torch.float64))
    weights, constant = least_squares(inputs, targets, 1e9)
    torch.testing.assert_close(weights, torch.zeros_like(plane), atol=1e-6, rtol=0)
    torch.testing.assert_close(constant, targets.mean(0))


def test_large_penalty_keeps_the_trained_weights(model: CategoricalHierarchicalVQVAE, x: Tensor) -> None:
    before = decoder_output_layer(model).weight.detach().clone()
    refit_decoder(model, x, 1e9)
    torch.testing.assert_close(decoder_output_layer(model).weight.detach(), before, atol=1e-6, rtol=0)


def test_blocks_of_rows_equal_all_rows_at_once(
    model: CategoricalHierarchicalVQVAE, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = copy.deepcopy(model)
    refit_decoder(whole, x, 0.01)
    monkeypatch.setattr(decoder_refit, "_ROWS_PER_BLOCK", 64)
    refit_decoder(model.train(), x, 0.01)
    assert model.training  # its mode stays
    torch.testing.assert_close(
        decoder_output_layer(model).weight, decoder_output_layer(whole).weight, atol=1e-4, rtol=1e-3
    )


def test_decoder_refit_uses_the_training_rows_of_the_run(x: Tensor) -> None:
    settings = {"device": "cpu", "training.num_epochs": 2, "training.val_every_n_epochs": 2}
    plain = Trainer.from_config(RunConfig(), settings).fit(x, GROUPS)
    fitted = Trainer.from_config(RunConfig(), {**settings, "training.decoder_refit": 0.01}).fit(x, GROUPS)
    rows = x[torch.from_numpy(plain.split.train)]
    assert error(fitted.model, rows) < 0.9 * error(plain.model, rows)
    refit_decoder(plain.model, rows, 0.01)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(fitted.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    # The resumable state does not include the refit.
    state = fitted.final_state["model_state_dict"]["shared_decoder.3.weight"]
    assert torch.equal(state, plain.final_state["model_state_dict"]["shared_decoder.3.weight"])
