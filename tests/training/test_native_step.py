"""The CPU step without autograd against the one with autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from spinlock_fast import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.models.losses import LossTerms, LossWeights, loss_terms
from spinlock_fast.training import native_step

GROUPS = {"narrow": list(range(5)), "wide": list(range(5, 40))}
ROWS = 90
WEIGHTS = LossWeights(1.0, 1.0, 0.1, 0.1, 0.3)
EPS = torch.finfo(torch.float32).eps


def trained_model(**options: Any) -> tuple[CategoricalHierarchicalVQVAE, Tensor]:
    """A model with codes of its latents, and rows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CategoricalVQVAEConfig(input_dim=40, group_indices=GROUPS, **options)
        model = CategoricalHierarchicalVQVAE(config).train()
        x = torch.randn(ROWS, 40)
        with torch.no_grad():
            model.quantizer.initialize(model.encode(x))
    return model, x


def step_with_autograd(
    model: CategoricalHierarchicalVQVAE, x: Tensor, samples: int, weights: LossWeights
) -> tuple[LossTerms, Tensor]:
    out, apply_ema = model.encode_and_quantize(x)
    terms = loss_terms(model, x, out, samples, apply_ema)
    terms.backward(weights)
    return LossTerms(*(term.detach() for term in terms)), out["latents"].detach()


@pytest.mark.parametrize("without", [None, *LossTerms._fields])
@pytest.mark.parametrize("samples", [30, ROWS])
def test_losses_gradients_and_codes_equal_those_of_autograd(without: str | None, samples: int) -> None:
    """With dropout: both draw the same numbers. Gradients differ by a few roundings of their sums."""
    model, x = trained_model()
    weights = WEIGHTS if without is None else WEIGHTS._replace(**{without: 0.0})
    results = []
    models = model, copy.deepcopy(model)
    for step, m in zip((native_step.loss_and_gradients, step_with_autograd), models, strict=True):
        torch.manual_seed(1)
        if step is native_step.loss_and_gradients:
            assert native_step.supports(m, list(m.parameters()))
            results.append(native_step.loss_and_gradients(m, x, x, samples, weights))
        else:
            results.append(step_with_autograd(m, x, samples, weights))
    torch.testing.assert_close(results[0], results[1], rtol=16 * EPS, atol=0.0)
    for (name, parameter), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None and other.grad is not None:
            scale = float(other.grad.abs().max())
            torch.testing.assert_close(parameter.grad, other.grad, rtol=0.0, atol=64 * EPS * scale, msg=name)
    for (name, buffer), other in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=0.0, atol=0.0, msg=name)


def test_rows_without_a_code_make_the_loss_nan() -> None:
    model, x = trained_model()
    x[3, 0] = torch.inf
    terms, _ = native_step.loss_and_gradients(model, x, x, ROWS, WEIGHTS)
    expected = loss_terms(model, x, model(x), ROWS)
    torch.testing.assert_close(terms.informativeness, expected.informativeness, equal_nan=True)
    assert terms.informativeness.isnan()


@pytest.mark.parametrize("change", ["rotation", "learned", "frozen", "eval", "float64", "backend", "subclass"])
def test_other_models_are_left_to_autograd(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"rotation": {"rotation_trick": True}, "learned": {"use_ema": False}}.get(change, {})
    model, _ = trained_model(**options)
    if change == "frozen":
        model.shared_decoder.requires_grad_(False)
    elif change == "eval":
        model.eval()
    elif change == "float64":
        model.double()
    elif change == "backend":
        monkeypatch.setenv("SPINLOCK_FAST_BACKEND", "reference")
    elif change == "subclass":
        model.__class__ = type("Changed", (CategoricalHierarchicalVQVAE,), {})
    assert not native_step.supports(model, list(model.parameters()))
