"""The decoder of tokens: equal to the shared decoder at first, and what a fit changes."""

from __future__ import annotations

import copy
import signal
from typing import Any

import helpers
import numpy as np
import pytest
import torch

from spinlock_fast import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig, Trainer
from spinlock_fast.checkpoints.directory import model_from_payload, model_payload
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.errors import DataError, Interrupted
from spinlock_fast.models.joint_metrics import joint_metrics
from spinlock_fast.training import token_decoder_fit

GROUPS = {"a": [0, 1, 2, 3, 4, 5], "b": [6, 7, 8, 9]}
VALIDATION = list(range(40))
SETTINGS = {
    **helpers.SMALL_RUN,
    "training.mixup_scale": 0.2,
    "training.mixup_decay": True,
    "training.input_noise": 0.1,
    "model.dropout": 0.0,
    "model.group_embedding_dim": 16,
    "model.group_hidden_dim": 16,
}


def fit(epochs: int, x: np.ndarray[Any, Any], **changes: Any) -> Any:
    settings = {**SETTINGS, "training.joint_search_epochs": epochs, **changes}
    return Trainer.from_config(RunConfig(), settings).fit(x, GROUPS, val_rows=VALIDATION, normalize=False)


@pytest.fixture(scope="module")
def x() -> np.ndarray[Any, Any]:
    return helpers.planted_matrix(240, [6, 4], seed=5)


@pytest.fixture(scope="module")
def plain(x: Any) -> Any:
    return fit(0, x)


@pytest.fixture(scope="module")
def fitted(x: Any) -> Any:
    return fit(12, x)


def small_model() -> CategoricalHierarchicalVQVAE:
    torch.manual_seed(0)
    return CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(input_dim=10, group_indices=GROUPS, dropout=0.0)).eval()


def test_equals_the_shared_decoder_until_it_is_fitted() -> None:
    model, x = small_model().double(), torch.randn(30, 10, dtype=torch.float64)
    tokens, joint = model.get_tokens(x), model.get_tokens(x, "joint")
    expected = [model.decode_from_tokens(part) for part in (tokens, joint)]
    decoder = model.add_token_decoder()
    assert decoder.tables.dtype == torch.float64
    for part, features in zip((tokens, joint), expected, strict=True):
        torch.testing.assert_close(model.decode_from_tokens(part), features, rtol=0, atol=1e-12)
    assert torch.equal(model.get_tokens(x, "joint"), joint)
    decoder.tables += 1.0
    model.add_token_decoder()  # sets it back
    torch.testing.assert_close(model.decode_from_tokens(joint), expected[1], rtol=0, atol=1e-12)


def test_tables_of_its_own_decide_tokens_and_features() -> None:
    model, x = small_model(), torch.randn(50, 10)
    nearest, before = model.get_tokens(x), model.decode_from_tokens(model.get_tokens(x))
    decoder = model.add_token_decoder()
    decoder.tables += torch.randn(decoder.tables.shape)
    assert torch.equal(model.get_tokens(x), nearest)
    after = model.decode_from_tokens(nearest)
    assert not torch.allclose(before, after)
    assert torch.equal(model(x)["reconstruction"], after)
    joint = model.get_tokens(x, "joint", 2)
    errors = [(model.decode_from_tokens(t) - x).square().sum(1) for t in (nearest, joint)]
    assert (errors[1] <= errors[0] + 1e-5).all()
    assert errors[1].mean() < 0.9 * errors[0].mean()
    model.train()  # trains the shared decoder
    out = model(x)
    torch.testing.assert_close(out["reconstruction"], model.decode(out["quantized"]))


def test_linear_part_of_the_tables() -> None:
    """It is added to the features, and the search takes it into account."""
    model, x = small_model().double(), torch.randn(20, 10, dtype=torch.float64)
    decoder = model.add_token_decoder()
    decoder.linear += torch.randn(decoder.linear.shape, dtype=torch.float64)
    tokens = model.get_tokens(x)
    codes = tokens + model.quantizer.layout.indices(x.device).code_offsets
    without = model.decode(model.quantizer.lookup(tokens))
    torch.testing.assert_close(decoder(tokens), without + decoder.linear[codes].sum(1), rtol=0, atol=1e-12)
    for g, size in enumerate(model.quantizer.layout.num_codes):
        tried = torch.stack([tokens.index_fill(1, torch.tensor(g), k) for k in range(size)], 1)
        errors = (decoder(tried.flatten(0, 1)).view(20, size, 10) - x[:, None]).square().sum(-1)
        tokens[:, g] = errors.argmin(1)
    assert torch.equal(model.get_tokens(x, "joint", 1), tokens)


def test_rows_without_tokens_are_nan() -> None:
    model, x = small_model(), torch.randn(4, 10)
    x[1, 3] = torch.nan
    model.add_token_decoder()
    reconstruction = model(x)["reconstruction"]
    assert reconstruction[1].isnan().all()
    assert reconstruction[[0, 2, 3]].isfinite().all()
    with pytest.raises(IndexError):
        model.decode_from_tokens(torch.full((1, model.num_codebooks), 999))


def test_fit_lowers_the_joint_error_and_keeps_everything_else(plain: Any, fitted: Any, x: Any) -> None:
    own = plain.model.state_dict()
    for name, value in fitted.model.state_dict().items():
        if not name.startswith("token_decoder."):
            assert torch.equal(value, own[name]), name
    assert plain.model.token_decoder is None
    errors = [float(run.metrics["joint"]["reconstruction_error"]) for run in (plain, fitted)]
    assert errors[1] < 0.9 * errors[0]
    nearest = [run.metrics["reconstruction_error"] for run in (plain, fitted)]
    assert nearest[1] < 1.1 * nearest[0]
    rows = torch.from_numpy(x[:40])
    assert joint_metrics(fitted.model, rows)["reconstruction_error"] == pytest.approx(errors[1])
    assert np.array_equal(fitted.encode(x), plain.encode(x))
    assert not any(value.requires_grad for value in fitted.model.token_decoder.buffers())


def test_fit_is_repeatable_whatever_the_memory(fitted: Any, x: Any) -> None:
    again = fit(12, x, **{"training.data_on_device": "never"})
    for name, value in fitted.model.token_decoder.state_dict().items():
        assert torch.equal(value, again.model.token_decoder.state_dict()[name]), name
    other = fit(12, x, **{"training.input_noise": 0.0})
    assert not torch.equal(other.model.token_decoder.tables, fitted.model.token_decoder.tables)


def test_targets_and_tokens_of_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_model(), torch.randn(300, 10)
    model.add_token_decoder()

    def epoch(nearest: float, **settings: float) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(token_decoder_fit, "_NEAREST", nearest)
        training = RunConfig().training.model_copy(update=settings)
        random = torch.Generator().manual_seed(0)
        (block,) = token_decoder_fit._searched_blocks(model, x, training, 0.5, random)
        return block[1]

    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    rows, joint = epoch(0.0)
    assert torch.equal(rows, x[order])
    assert torch.equal(joint, model.get_tokens(rows, "joint", 1))
    clean, noisy = epoch(0.0, input_noise=0.5)  # the noise is not in the targets
    assert torch.equal(clean, rows)
    assert not torch.equal(noisy, joint)
    mixed, _ = epoch(0.0, mixup_scale=0.4)
    assert not torch.equal(mixed, rows)
    decoded, nearest = epoch(1.0)  # nearest tokens, some of them of other rows, as the shared decoder decodes them
    torch.testing.assert_close(decoded, model.decode(model.quantizer.lookup(nearest)))
    exchanged = (nearest != model.get_tokens(rows)).double().mean()
    assert 0.05 < exchanged < 0.2


def test_blocks_of_rows(fitted: Any, x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than are searched at once."""
    monkeypatch.setattr(token_decoder_fit, "_ROWS", 96)
    blocks = fit(12, x)
    errors = [run.metrics["joint"]["reconstruction_error"] for run in (fitted, blocks)]
    assert 0.5 * errors[0] < errors[1] < 1.15 * errors[0]


def test_fit_that_does_not_help_is_not_kept(
    plain: Any, x: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(token_decoder_fit, "_RATE", 10.0)
    result = fit(2, x)
    assert result.model.token_decoder is None
    assert result.metrics["joint"] == plain.metrics["joint"]
    assert "is not kept" in caplog.text


@pytest.mark.parametrize(("rows", "epochs"), [(100, 60), (8500, 29), (1_000_000, 5)])
def test_automatic_epochs(rows: int, epochs: int) -> None:
    training = RunConfig().training.model_copy(update={"joint_search_epochs": "auto", "batch_size": 256})
    assert token_decoder_fit.joint_search_epochs(training, rows) == epochs


def test_stopped_fit_is_interrupted(x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trainer.from_config(RunConfig(), {**SETTINGS, "training.joint_search_epochs": 12})
    original = token_decoder_fit._fit_block

    def stopping(*arguments: Any) -> None:
        original(*arguments)
        run.stop(signal.SIGTERM)

    monkeypatch.setattr(token_decoder_fit, "_fit_block", stopping)
    with pytest.raises(Interrupted, match="before the metrics"):
        run.fit(x, GROUPS, val_rows=VALIDATION, normalize=False)


def test_checkpoint(fitted: Any, plain: Any, x: Any) -> None:
    payload = model_payload(fitted.model, fitted.model.state_dict(), 4, {})
    loaded, rows = model_from_payload(payload), torch.from_numpy(x)
    tokens = loaded.get_tokens(rows, "joint")
    assert torch.equal(tokens, fitted.model.get_tokens(rows, "joint"))
    assert torch.equal(loaded.decode_from_tokens(tokens), fitted.model.decode_from_tokens(tokens))
    linear = payload["model_state_dict"].pop("token_decoder.linear")  # as in files of earlier versions
    assert linear.abs().max() > 0.01
    assert not model_from_payload(payload).token_decoder.linear.any()
    copied = copy.deepcopy(fitted.model)
    assert torch.equal(copied.decode_from_tokens(tokens), fitted.model.decode_from_tokens(tokens))
    del payload["model_state_dict"]["token_decoder.w2"]
    with helpers.raises_one_line(DataError, "token_decoder.w2"):
        model_from_payload(payload)
    assert model_from_payload(model_payload(plain.model, plain.model.state_dict(), 4, {})).token_decoder is None
