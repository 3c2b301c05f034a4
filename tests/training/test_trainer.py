"""The training loop, on small planted matrices."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import signal
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SMALL_RUN, planted_matrix, raises_one_line, stop_after

from spinlock_fast.config.loading import apply_overrides
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.split import split_rows
from spinlock_fast.device import resolve_device
from spinlock_fast.errors import ConfigError, DataError, Interrupted, TrainingError
from spinlock_fast.quantize import dead_code_threshold
from spinlock_fast.training import trainer as trainer_module
from spinlock_fast.training.cuda_graphs import StepLauncher
from spinlock_fast.training.loop import TrainingRun
from spinlock_fast.training.observer import EpochRecord, SilentObserver
from spinlock_fast.training.result import TrainResult
from spinlock_fast.training.step import StepKind, TrainingStep
from spinlock_fast.training.trainer import Trainer

SIZES = [6, 9, 5]
GROUPS = {"cluster_2": list(range(6)), "cluster_10": list(range(6, 15)), "cluster_1": list(range(15, 20))}


@pytest.fixture(scope="module")
def x() -> np.ndarray[Any, Any]:
    return planted_matrix(300, SIZES, seed=0)


def trainer(observer: SilentObserver | None = None, **overrides: Any) -> Trainer:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return Trainer.from_config(RunConfig(), {**SMALL_RUN, **dotted}, observer)


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return dict(result.final_state["model_state_dict"])


def assert_same_weights(a: TrainResult, b: TrainResult) -> None:
    for key, value in weights(a).items():
        torch.testing.assert_close(value, weights(b)[key], rtol=0, atol=0)


def test_training_reduces_the_error_and_reports_every_metric(x: np.ndarray[Any, Any]) -> None:
    result = trainer(training__num_epochs=20).fit(x, GROUPS)
    m = result.metrics
    first = result.history[1].validation
    assert first is not None
    assert m["reconstruction_error"] < 0.6 * first["reconstruction_error"]
    assert m["quality"] == pytest.approx(1 - m["reconstruction_error"])
    assert 0 < m["utilization"] <= 1
    assert 0 < m["perplexity_over_k"] <= 1
    assert m["val_rows"] == 30
    assert m["samples"] == 300
    assert m["epochs"] == 20
    assert m["parameters"] == m["trainable_parameters"] + m["code_entries"]
    assert [c["name"] for c in m["categories"]] == list(GROUPS)
    assert [c["features"] for c in m["categories"]] == SIZES
    for category in m["categories"]:
        assert all(0 <= u <= 1 for u in category["utilization"])
        assert len(category["utilization"]) == len(category["perplexity"]) == len(category["codes"]) == 3
    json.dumps(m, allow_nan=False)


def test_returned_model_has_the_best_validation(x: np.ndarray[Any, Any]) -> None:
    result = trainer(training__num_epochs=8).fit(x, GROUPS)
    losses = {r.epoch: r.validation["val_loss"] for r in result.history if r.validation}
    assert result.best_epoch == min(losses, key=losses.__getitem__)
    assert result.metrics["val_loss"] == pytest.approx(losses[result.best_epoch], rel=1e-6)
    assert not result.model.training


def test_runs_with_the_same_seed_are_identical(x: np.ndarray[Any, Any]) -> None:
    a, b = trainer().fit(x, GROUPS), trainer().fit(x, GROUPS)
    assert_same_weights(a, b)
    assert {**a.metrics, "seconds": 0} == {**b.metrics, "seconds": 0}


def test_another_seed_gives_another_model(x: np.ndarray[Any, Any]) -> None:
    a, b = trainer().fit(x, GROUPS), trainer(random_seed=7).fit(x, GROUPS)
    assert a.metrics["reconstruction_error"] != b.metrics["reconstruction_error"]


def test_seed_determines_the_initial_weights(x: np.ndarray[Any, Any]) -> None:
    """With all rows in one batch, the seed only determines the initial weights."""
    settings = {
        "training__num_epochs": 1,
        "training__batch_size": 300,
        "training__topo_samples": 2,
        "model__dropout": 0.0,
    }
    a, b = (
        trainer(random_seed=seed, training__learning_rate=1e-9, **settings).fit(x, GROUPS, val_rows=range(30))
        for seed in (1, 2)
    )
    name = "shared_decoder.0.weight"
    assert (weights(a)[name] - weights(b)[name]).abs().mean() > 0.01


def test_random_state_of_the_caller_is_unchanged(x: np.ndarray[Any, Any]) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    trainer(training__num_epochs=1).fit(x, GROUPS)
    assert torch.equal(torch.rand(3), expected)


class StateRecorder(SilentObserver):
    """Keeps a copy of the saved state."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def save(self, state: dict[str, Any]) -> None:
        self.state = {
            key: torch.clone(value) if isinstance(value, torch.Tensor) else value for key, value in state.items()
        }


@pytest.mark.parametrize("steps", [1, 7, 12])
def test_resumed_run_equals_an_uninterrupted_run(x: np.ndarray[Any, Any], steps: int) -> None:
    settings = {"training__dead_code_reset_interval": 1, "training__dead_code_threshold": 0.5}
    whole = trainer(**settings).fit(x, GROUPS)

    observer = StateRecorder()
    broken = trainer(observer, **settings)
    with stop_after(steps, broken), pytest.raises(Interrupted) as stopped:
        broken.fit(x, GROUPS)
    assert stopped.value.exit_status == 143
    resumed = trainer(**settings).fit(x, GROUPS, resume=observer.state)
    assert_same_weights(whole, resumed)
    assert {**whole.metrics, "seconds": 0} == {**resumed.metrics, "seconds": 0}
    assert [r.train_loss for r in whole.history] == [r.train_loss for r in resumed.history]


def test_resuming_does_not_change_the_saved_state(x: np.ndarray[Any, Any]) -> None:
    done = trainer().fit(x, GROUPS).final_state
    before = copy.deepcopy(done)
    resumed = trainer(training__num_epochs=8).fit(x, GROUPS, resume=done)
    assert resumed.best_epoch > 4
    for part in ("model_state_dict", "best_state_dict"):
        assert all(torch.equal(done[part][name], value) for name, value in before[part].items())


def test_given_validation_rows_are_used(x: np.ndarray[Any, Any]) -> None:
    rows = [3, 1, 200, 77]
    result = trainer(training__num_epochs=1).fit(x, GROUPS, val_rows=rows)
    assert result.split.val.tolist() == sorted(rows)
    assert not set(rows) & set(result.split.train.tolist())
    assert result.metrics["val_rows"] == 4


@pytest.mark.parametrize("rows", [[1, 1], [-1], [300], []])
def test_invalid_validation_rows_are_rejected(x: np.ndarray[Any, Any], rows: list[int]) -> None:
    with pytest.raises(DataError, match="val_rows"):
        trainer().fit(x, GROUPS, val_rows=rows)


def test_test_rows_are_kept_out_of_training_and_reported(x: np.ndarray[Any, Any]) -> None:
    result = trainer(training__num_epochs=1, training__test_fraction=0.2).fit(x, GROUPS)
    split = result.split
    assert (split.train.size, split.val.size, split.test.size) == (210, 30, 60)
    assert sorted(np.concatenate([split.train, split.val, split.test])) == list(range(300))
    assert result.metrics["test"]["val_rows"] == 60


def test_split_depends_on_the_seed_alone() -> None:
    config = RunConfig().training
    assert np.array_equal(split_rows(100, config, 1).val, split_rows(100, config, 1).val)
    assert not np.array_equal(split_rows(100, config, 1).val, split_rows(100, config, 2).val)


def test_categories_are_discovered_if_not_given(x: np.ndarray[Any, Any]) -> None:
    result = trainer(training__num_epochs=1).fit(torch.from_numpy(x))
    found = {frozenset(members) for members in result.model.config.group_indices.values()}
    assert found == {frozenset(members) for members in GROUPS.values()}


def test_families_are_counted_from_feature_names(x: np.ndarray[Any, Any]) -> None:
    names = [f"{'a' if i % 2 else 'b'}::{i}" for i in range(20)]
    result = trainer(training__num_epochs=1).fit(x, GROUPS, feature_names=names)
    assert result.metrics["categories"][0]["families"] == {"b": 3, "a": 3}


def test_levels_argument_overrides_the_configuration(x: np.ndarray[Any, Any]) -> None:
    level = {"num_tokens": 8, "latent_dim": 4}
    result = trainer(training__num_epochs=1).fit(x, GROUPS, levels={name: [level] for name in GROUPS})
    assert result.metrics["total_codes"] == 24
    assert result.model.num_codebooks == 3


def test_uncategorised_feature_is_reconstructed(x: np.ndarray[Any, Any]) -> None:
    groups = {name: members[1:] for name, members in GROUPS.items()}
    result = trainer(training__num_epochs=1).fit(x, groups)
    assert result.model(torch.from_numpy(x))["reconstruction"].shape == x.shape
    assert not result.model.config.extra_inputs


def test_uncategorised_feature_can_be_read_by_the_nearest_category(x: np.ndarray[Any, Any]) -> None:
    groups = {name: members[1:] for name, members in GROUPS.items()}
    setting = {"model__unassigned_features": "nearest", "training__num_epochs": 2}
    result = trainer(**setting).fit(x, groups)
    assert result.model.config.extra_inputs == {"cluster_2": [0], "cluster_10": [6], "cluster_1": [15]}
    assert result.model.config.group_indices == groups
    observer = StateRecorder()
    broken = trainer(observer, **setting)
    broken.stop(signal.SIGTERM)
    with pytest.raises(Interrupted):
        broken.fit(x, groups)
    resumed = trainer(**setting).fit(x, groups, resume=observer.state)
    assert_same_weights(resumed, result)


@pytest.mark.parametrize(
    ("settings", "groups"),
    [({"model__levels": {"other": [{"num_tokens": 4, "latent_dim": 4}]}}, GROUPS), ({}, {"a": [0, 20]})],
)
def test_invalid_models_raise_configuration_errors(
    x: np.ndarray[Any, Any], settings: dict[str, Any], groups: dict[str, list[int]]
) -> None:
    with pytest.raises(ConfigError):
        trainer(**settings).fit(x, groups)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_value_is_reported(x: np.ndarray[Any, Any], value: float) -> None:
    bad = x.copy()
    bad[17, 3] = value
    with pytest.raises(DataError, match=r"x\[17, 3\]"):
        trainer().fit(bad, GROUPS)


@pytest.mark.parametrize("shape", [(300,), (300, 0), (10, 2, 3), (1, 20), (20, 20)])
def test_data_of_the_wrong_size_are_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError):
        trainer().fit(np.ones(shape, np.float32), GROUPS)


def test_exploding_loss_raises_with_step_and_term(x: np.ndarray[Any, Any]) -> None:
    with pytest.raises(TrainingError, match=r"the \w+ loss is not finite from step \d+"):
        trainer(training__learning_rate=1e30).fit(x, GROUPS)


def test_early_stopping_counts_validations(x: np.ndarray[Any, Any]) -> None:
    result = trainer(
        training__num_epochs=50,
        training__val_every_n_epochs=2,
        training__early_stopping_patience=2,
        training__early_stopping_min_delta=1e9,
    ).fit(x, GROUPS)
    assert len(result.history) == 2 + 2 * 2  # the first validation always counts as better


def test_validation_runs_at_its_interval_and_at_the_end(x: np.ndarray[Any, Any]) -> None:
    result = trainer(training__num_epochs=5, training__val_every_n_epochs=2).fit(x, GROUPS)
    assert [r.epoch for r in result.history if r.validation] == [2, 4, 5]


@pytest.mark.parametrize("strategy", ["perturb", "sample"])
def test_dead_codes_are_reset_at_their_interval_but_not_at_the_end(x: np.ndarray[Any, Any], strategy: str) -> None:
    result = trainer(
        training__num_epochs=4,
        training__dead_code_reset_interval=2,
        training__dead_code_threshold=0.9,
        training__dead_code_strategy=strategy,
    ).fit(x, GROUPS)
    assert [r.epoch for r in result.history if r.resets is not None] == [2]
    assert result.history[1].resets


def test_dead_codes_are_reset_during_a_share_of_the_epochs(x: np.ndarray[Any, Any]) -> None:
    settings = {
        "training__num_epochs": 5,
        "training__dead_code_reset_interval": 1,
        "training__dead_code_threshold": 0.9,
    }
    result = trainer(**settings, training__dead_code_reset_until=0.4).fit(x, GROUPS)
    assert [r.epoch for r in result.history if r.resets is not None] == [1, 2]
    # Resets by steps end as well: at 0 they are those of a run without resets.
    never = {**settings, "training__dead_code_reset_interval": 0}
    without, by_steps = (
        trainer(**never, training__dead_code_reset_until=until, training__dead_code_reset_steps=steps).fit(x, GROUPS)
        for until, steps in ((1.0, 0), (0.0, 2))
    )
    weights = [run.final_state["model_state_dict"] for run in (without, by_steps)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_automatic_settings_are_those_that_the_log_names(
    x: np.ndarray[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"training__num_epochs": 3, "training__dead_code_reset_interval": 1}
    automatic = {"training__dead_code_threshold": "auto", "model__commitment_cost": "auto"}
    with caplog.at_level("INFO", "spinlock_fast"):
        chosen = trainer(**settings, **automatic).fit(x, GROUPS)
    values = {name: float(value) for name, value in re.findall(r"\w+\.(\w+) auto: (\S+)", caplog.text)}
    assert chosen.model.quantizer.commitment_weight == pytest.approx(values["commitment_cost"], rel=1e-2)
    quantizer = chosen.model.quantizer
    threshold = dead_code_threshold("auto", quantizer.num_codes, len(chosen.split.train))
    assert 0.2 < threshold < 0.5
    assert threshold == pytest.approx(values["dead_code_threshold"], rel=1e-2)
    given = {"training__dead_code_threshold": threshold, "model__commitment_cost": quantizer.commitment_weight}
    same = trainer(**settings, **given).fit(x, GROUPS)
    weights = [run.final_state["model_state_dict"] for run in (same, chosen)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_learning_rate_warms_up_and_follows_the_cosine(x: np.ndarray[Any, Any]) -> None:
    result = trainer(
        training__num_epochs=4, training__warmup_epochs=1, training__scheduler="cosine", training__batch_size=270
    ).fit(x, GROUPS)
    rates = [r.learning_rate for r in result.history]
    cosine = [1e-3 * 0.5 * (1 + math.cos(math.pi * k / 3)) for k in range(3)]
    assert rates == pytest.approx([1e-3, *cosine])


@pytest.mark.parametrize(
    "settings",
    [
        {"model__use_ema": False},
        {"model__rotation_trick": True},
        {"model__codebook_init": "uniform"},
        {"model__codebook_init": "product"},
        {"training__input_noise": 0.3, "training__mixup_scale": 0.2},
        {"training__optimizer": "adamw", "training__weight_decay": 0.01},
        {"training__topo_weight": 0.0, "training__informativeness_weight": 0.0},
        {"training__dead_code_reset_steps": 2, "training__dead_code_strategy": "sample"},
        {"training__batch_size": 10_000},
    ],
)
def test_options_train_to_a_finite_model(x: np.ndarray[Any, Any], settings: dict[str, Any]) -> None:
    result = trainer(training__num_epochs=2, **settings).fit(x, GROUPS)
    assert math.isfinite(result.metrics["val_loss"])


def test_overrides_are_checked() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        apply_overrides(RunConfig(), {"training.batch_size": 0})


def test_history_terms_add_up_to_the_loss(x: np.ndarray[Any, Any]) -> None:
    record: EpochRecord = trainer(training__num_epochs=1).fit(x, GROUPS).history[0]
    w = {"reconstruction": 1.0, "vq": 1.0, "orthogonality": 0.1, "informativeness": 0.1, "topographic": 0.3}
    assert sum(w[name] * value for name, value in record.terms.items()) == pytest.approx(record.train_loss, rel=1e-5)


@pytest.mark.parametrize("value", [1e11, 1e20, 1e30, 3e38])
@pytest.mark.parametrize("where", ["validation", "test", "host"])
def test_outlier_row_is_reported_and_left_out_of_the_metrics(
    x: np.ndarray[Any, Any], caplog: pytest.LogCaptureFixture, where: str, value: float
) -> None:
    kind = "test" if where == "test" else "validation"
    settings: dict[str, Any] = {"training__num_epochs": 1, "training__test_fraction": 0.1}
    if where == "host":
        settings["training__data_on_device"] = "never"
    rows = split_rows(300, trainer(**settings).config.training, 42)
    number = int((rows.test if kind == "test" else rows.val)[4])
    bad = x.copy()
    bad[number, 3] = value
    found = trainer(**settings).fit(bad, GROUPS).metrics
    json.dumps(found, allow_nan=False)
    measured = found["test"] if kind == "test" else found
    assert f"{kind} row {number}: the features are too large" in caplog.text
    assert measured["reconstruction_error"] < 10
    if kind == "test":
        assert measured["rows_left_out"] == [number]
        kept = np.setdiff1d(rows.test, number)
        expected = trainer(**settings).fit(x, GROUPS, val_rows=rows.val)  # another split of the rest
        assert measured["val_rows"] == kept.size
        assert expected.metrics["test"]["val_rows"] == kept.size + 1
    else:
        assert found["val_rows"] == rows.val.size - 1


def test_outlier_training_row_is_reported(x: np.ndarray[Any, Any]) -> None:
    bad = x.copy()
    bad[9, 3] = 1e30
    with raises_one_line(TrainingError, "row 9 has a value of magnitude 1e+30"):
        trainer().fit(bad, GROUPS, val_rows=[3, 100], normalize=False)


def test_a_stopped_trainer_can_be_used_again(x: np.ndarray[Any, Any]) -> None:
    again = trainer()
    again.stop(signal.SIGINT)
    with pytest.raises(Interrupted):
        again.fit(x, GROUPS)
    assert len(again.fit(x, GROUPS).history) == 4
    again.stop(signal.SIGINT)  # too late for the fit above, and not meant for the next
    assert len(again.fit(x, GROUPS).history) == 4


@pytest.mark.parametrize("moment", ["best_model", "evaluate"])
def test_signal_after_the_last_step_interrupts(
    x: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The signal arrives during evaluation, by `stop` or `stop_requested`."""
    expected = trainer().fit(x, GROUPS)
    for by_call in (True, False):
        signals: list[int] = []
        recorder = CallbackRecorder()
        run = Trainer(trainer().config, recorder, lambda signals=signals: signals[0] if signals else None)  # type: ignore[misc]

        def late(*_: object, run: Trainer = run, signals: list[int] = signals, by_call: bool = by_call) -> None:
            run.stop(15) if by_call else signals.append(15)

        with monkeypatch.context() as patch:
            if moment == "evaluate":
                measured = trainer_module.evaluate_with_counts
                patch.setattr(trainer_module, "evaluate_with_counts", lambda *a: (late(), measured(*a))[1])  # noqa: B023
            else:
                best = TrainingRun.best_model
                patch.setattr(TrainingRun, "best_model", lambda self: (late(), best(self))[1])  # noqa: B023
            with pytest.raises(Interrupted, match="after the last epoch") as stopped:
                run.fit(x, GROUPS)
        assert stopped.value.exit_status == 143
        found = trainer().fit(x, GROUPS, resume=recorder.states[-1])
        assert_same_weights(found, expected)
        assert found.metrics["reconstruction_error"] == expected.metrics["reconstruction_error"]


def test_resumed_run_adds_up_its_seconds(x: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = CallbackRecorder()
    run = trainer(recorder)
    with stop_after(6, run), pytest.raises(Interrupted):  # in the second epoch
        run.fit(x, GROUPS)
    state = recorder.states[-1]
    assert state["seconds"] > sum(record["seconds"] for record in state["history"]) > 0
    assert state["epoch_seconds"] > 0
    state["seconds"], state["epoch_seconds"] = 1000.0, 400.0
    found = trainer().fit(x, GROUPS, resume=state)
    assert 1000 < found.metrics["seconds"]["train"] <= found.metrics["seconds"]["total"] < 1100
    assert [record.seconds > 400 for record in found.history] == [False, True, False, False]
    again = trainer(training__num_epochs=5).fit(x, GROUPS, resume=found.final_state)
    assert again.metrics["seconds"]["train"] > 1000
    old = {key: value for key, value in found.final_state.items() if "seconds" not in key}
    assert trainer().fit(x, GROUPS, resume=old).metrics["seconds"]["train"] > 400  # of the epochs, in old states


LONGER = {
    "training__dead_code_reset_interval": 2,
    "training__dead_code_threshold": 5.0,
    "training__dead_code_strategy": "sample",
    "training__val_every_n_epochs": 3,
    "model__dropout": 0.2,
}


@pytest.mark.parametrize("first", [2, 3, 4])
def test_extended_run_equals_a_longer_run(x: np.ndarray[Any, Any], first: int) -> None:
    whole = trainer(training__num_epochs=7, **LONGER).fit(x, GROUPS)
    torch.manual_seed(7)  # the caller's random state must not matter
    short = trainer(training__num_epochs=first, **LONGER).fit(x, GROUPS)
    torch.manual_seed(8)
    state = copy.deepcopy(short.final_state)
    longer = trainer(training__num_epochs=7, **LONGER).fit(x, GROUPS, resume=state)
    assert_same_weights(longer, whole)
    for a, b in zip(longer.history, whole.history, strict=True):
        assert vars(a) | {"seconds": 0.0} == vars(b) | {"seconds": 0.0}
    assert longer.best_epoch == whole.best_epoch
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, longer.model.state_dict()[key])


def test_extending_a_cosine_schedule_warns(x: np.ndarray[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    done = trainer(training__scheduler="cosine").fit(x, GROUPS).final_state
    trainer(training__scheduler="cosine", training__num_epochs=5).fit(x, GROUPS, resume=done)
    assert "will differ from those of a run that had 5 from the start" in caplog.text


def test_states_are_saved_after_save_minutes(x: np.ndarray[Any, Any]) -> None:
    recorder = CallbackRecorder()
    expected = trainer(recorder, training__save_minutes=1e-9).fit(x, GROUPS)
    steps = -(-expected.split.train.size // 64)
    assert len(recorder.states) == 4 * steps  # after every step
    assert {state["step"] for state in recorder.states} == set(range(1, steps + 1))
    for state in (recorder.states[0], recorder.states[-3]):
        assert_same_weights(trainer().fit(x, GROUPS, resume=state), expected)


def test_early_stopping_accumulates_small_gains(x: np.ndarray[Any, Any]) -> None:
    """Early stopping compares with the last counted loss, so gains below min_delta add up."""
    plain = trainer(training__num_epochs=12).fit(x, GROUPS)
    losses = [r.validation["val_loss"] for r in plain.history if r.validation]
    gains = -np.diff(losses)
    assert (gains > 0).all()
    patient = trainer(
        training__num_epochs=12,
        training__early_stopping_patience=2,
        training__early_stopping_min_delta=float(gains.max() * 1.01),
    ).fit(x, GROUPS)
    counted, stale, expected = losses[0], 0, 2
    for loss in losses[1:]:
        if stale == 2:
            break
        expected += 2
        counted, stale = (loss, 0) if loss < counted - gains.max() * 1.01 else (counted, stale + 1)
    assert len(patient.history) == expected
    assert expected > 6  # comparing with the best loss alone would have stopped here


def test_resuming_with_fewer_epochs_than_done_is_rejected(x: np.ndarray[Any, Any]) -> None:
    done = trainer().fit(x, GROUPS).final_state
    with pytest.raises(ConfigError, match="has done 4 epochs"):
        trainer(training__num_epochs=3).fit(x, GROUPS, resume=done)


def test_resuming_a_complete_run_warns(x: np.ndarray[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    done = trainer().fit(x, GROUPS).final_state
    trainer().fit(x, GROUPS, resume=done)
    assert "the run is complete" in caplog.text


def test_fewer_categories_than_requested_warns(x: np.ndarray[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    trainer(training__num_epochs=1, training__num_categories_auto=15).fit(x)
    assert "instead of num_categories_auto 15" in caplog.text


def test_category_with_one_used_code_warns(x: np.ndarray[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    level = {"num_tokens": 1, "latent_dim": 4}
    levels = {name: [level if name == "cluster_1" else {"num_tokens": 8, "latent_dim": 4}] for name in GROUPS}
    trainer(training__num_epochs=1).fit(x, GROUPS, levels=levels)
    assert "cluster_1: every sample has the same code" in caplog.text


def test_term_of_weight_zero_may_be_nonfinite(x: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from spinlock_fast.kernels.topo_loss import cpu

    forward = cpu.forward

    def undefined(*arguments: Any) -> tuple[torch.Tensor, ...]:
        pre, *others = forward(*arguments)
        return pre * torch.nan, *others

    monkeypatch.setattr(cpu, "forward", undefined)
    trainer(training__num_epochs=1, training__topo_weight=0.0).fit(x, GROUPS)
    with pytest.raises(TrainingError, match="topographic"):
        trainer(training__num_epochs=1).fit(x, GROUPS)


@pytest.mark.parametrize("name", ["tritn", "triton"])
def test_unavailable_backend_is_rejected_before_any_work(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("SPINLOCK_FAST_BACKEND", name)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with raises_one_line(ConfigError, "triton"):
        resolve_device("cpu")


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x", "cuda:-1", "", "meta"])
def test_unknown_device_is_one_line(name: str) -> None:
    with raises_one_line(ConfigError, f"device: expected auto, cpu, cuda or cuda:N, got {name!r}"):
        resolve_device(name)


class CallbackRecorder(SilentObserver):
    """Records callbacks, and stops a run after some epochs."""

    def __init__(self) -> None:
        self.callbacks: list[Any] = []
        self.states: list[dict[str, Any]] = []

    def epoch_finished(self, record: EpochRecord) -> None:
        self.callbacks.append((record.epoch, record.train_loss, record.validation, record.resets))

    def save(self, state: dict[str, Any]) -> None:
        self.callbacks.append("saved")
        self.states.append(copy.deepcopy(state))


@pytest.fixture
def _overlapped_readback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epoch summaries are read after the steps of the next epoch were launched, as on CUDA."""
    init = TrainingRun.__init__

    def init_overlapped(self: TrainingRun, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self._overlap_readback = True

    monkeypatch.setattr(TrainingRun, "__init__", init_overlapped)


EPOCHS_APART = {
    "training__num_epochs": 11,
    "training__val_every_n_epochs": 4,
    "training__dead_code_reset_interval": 3,
    "training__save_every": 5,
}


def recorded_run(x: np.ndarray[Any, Any]) -> tuple[CallbackRecorder, TrainResult]:
    recorder = CallbackRecorder()
    return recorder, trainer(recorder, **EPOCHS_APART).fit(x, GROUPS)


def test_overlapped_readback_reports_the_same_epochs(x: np.ndarray[Any, Any], request: pytest.FixtureRequest) -> None:
    early, expected = recorded_run(x)
    request.getfixturevalue("_overlapped_readback")
    late, found = recorded_run(x)
    assert late.callbacks == early.callbacks
    assert [item[0] for item in late.callbacks if item != "saved"] == list(range(1, 12))
    assert late.callbacks.count("saved") == 2
    for a, b in zip(found.history, expected.history, strict=True):
        assert vars(a) | {"seconds": 0.0} == vars(b) | {"seconds": 0.0}
        assert a.seconds > 0.0


@pytest.mark.usefixtures("_overlapped_readback")
def test_interruption_reports_the_pending_epoch(x: np.ndarray[Any, Any]) -> None:
    whole, expected = recorded_run(x)
    recorder = CallbackRecorder()
    run = trainer(recorder, **EPOCHS_APART)
    steps = -(-expected.split.train.size // 64)
    launched, calls = StepLauncher.run, itertools.count()

    def stops(self: StepLauncher, kind: StepKind, most: int) -> int:
        if next(calls) == 7 * steps + 2:  # with one validation, in the eighth epoch; the seventh is not read by then
            run.stop(2)
        return launched(self, kind, most)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepLauncher, "run", stops)
        with pytest.raises(Interrupted):
            run.fit(x, GROUPS)
    state = recorder.states[-1]
    assert (state["epoch"], state["step"]) == (7, 2)
    assert [record["epoch"] for record in state["history"]] == list(range(1, 8))
    found = run.fit(x, GROUPS, resume=state)
    assert [r.train_loss for r in found.history] == [r.train_loss for r in expected.history]
    assert_same_weights(found, expected)
    assert [item for item in recorder.callbacks if item != "saved"] == [
        item for item in whole.callbacks if item != "saved"
    ]


@pytest.mark.usefixtures("_overlapped_readback")
def test_overlapped_readback_reports_the_first_nonfinite_step(
    x: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainingStep.__call__
    steps = 0

    def breaking_step(self: TrainingStep, kind: Any) -> None:
        nonlocal steps
        steps += 1
        original(self, kind)
        if steps == self.steps_per_epoch + 2:  # the second step of the second epoch
            self.loss_values[1, 1] = torch.nan

    monkeypatch.setattr(TrainingStep, "__call__", breaking_step)
    run = trainer(training__num_epochs=6, training__val_every_n_epochs=5)
    with pytest.raises(TrainingError, match=r"reconstruction loss is not finite from step \d+ on \(epoch 2\)"):
        run.fit(x, GROUPS)


def test_refit_and_evaluation_run_on_the_device_of_the_data(x: np.ndarray[Any, Any], monkeypatch: Any) -> None:
    """Refit and evaluation run inside a device guard."""
    from contextlib import contextmanager

    from spinlock_fast.models import metrics
    from spinlock_fast.training import trainer as module

    depth, seen = [0], []

    @contextmanager
    def guard(device: torch.device) -> Any:
        depth[0] += 1
        yield
        depth[0] -= 1

    for name in ("fit_decoders", "evaluate_with_counts", "evaluate"):
        plain = getattr(module, name)

        def called(*args: Any, name: str = name, plain: Any = plain) -> Any:
            seen.append((name, depth[0]))
            return plain(*args)

        monkeypatch.setattr(module, name, called)
    monkeypatch.setattr(module, "device_guard", guard)
    monkeypatch.setattr(metrics, "device_guard", guard)
    trainer(training__num_epochs=2, training__decoder_refit=0.1, training__test_fraction=0.1).fit(x, GROUPS)
    assert [name for name, _ in seen] == ["fit_decoders", "evaluate_with_counts", "evaluate"]
    assert all(inside for _, inside in seen)
    assert depth == [0]


def test_use_torch_compile_is_logged_as_ineffective(x: np.ndarray[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(training__use_torch_compile=True, training__num_epochs=1).fit(x, GROUPS)
    assert sum("use_torch_compile has no effect" in message for message in caplog.messages) == 1
