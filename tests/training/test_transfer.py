"""Runs that start from a checkpoint: what is kept, what is frozen, what is refused, and what has changed afterwards."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from helpers import ARCHITECTURE, planted_matrix, raises_one_line, stop_after, synthetic_arrays, write_dataset
from processes import Ranks
from sklearn.metrics import adjusted_mutual_info_score

from spinlock_fast import Tokenizer, Trainer
from spinlock_fast.checkpoints.directory import load_payload, load_run_config, load_torch
from spinlock_fast.checkpoints.integrity import MANIFEST
from spinlock_fast.checkpoints.run_directory import FINAL, METRICS, VOCABULARY
from spinlock_fast.config.loading import apply_overrides, make_config
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.descriptors.describe import Families
from spinlock_fast.errors import ConfigError, DataError, Interrupted
from spinlock_fast.report.run_files import read_vocabulary
from spinlock_fast.report.vocabulary_changes import category_changes
from spinlock_fast.train import main as train_main
from spinlock_fast.training.initial_model import InitialModel, sampled
from spinlock_fast.training.observer import SilentObserver
from spinlock_fast.training.result import TrainResult
from spinlock_fast.training.vocabulary import CodeMoves, TokenChange

SHAPE: dict[str, Any] = {"summary_width": 12, "temporal_shape": (16, 3), "architecture_width": 6}
CONFIG: dict[str, Any] = {
    "device": "cpu",
    "families": {"summary": {"encoder": "IdentityEncoder"}, "temporal": {"encoder": "StatisticsEncoder"}},
    "model": {"group_hidden_dim": 16, "group_embedding_dim": 8},
    "training": {
        "batch_size": 64,
        "topo_samples": 64,
        "num_epochs": 6,
        "val_every_n_epochs": 2,
        "num_categories_auto": 3,
        "orthogonality_target": 10.0,
    },
    "logging": {"tensorboard": False},
}
GROUPS = {"cluster_1": list(range(6)), "cluster_2": list(range(6, 15)), "cluster_3": list(range(15, 20))}
MATRIX_SETTINGS = {f"training.{key}": value for key, value in CONFIG["training"].items()} | {"device": "cpu"}
ENCODERS, CODES = ("category_mlp.", "heads."), ("quantizer.",)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of operators, settings, and a checkpoint of the first file."""
    directory = tmp_path_factory.mktemp("transfer")
    write_dataset(directory / "old.h5", 160, seed=3, **SHAPE)
    write_dataset(directory / "new.h5", 120, seed=9, noise=0.6, **SHAPE)
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump({"dataset_path": str(directory / "old.h5"), **CONFIG}))
    assert train(path, "--output", directory / "start") == 0
    return directory


@pytest.fixture(scope="module")
def tuned(directory: Path) -> Path:
    """The checkpoint trained further on the second file."""
    assert train(*further(directory), "--output", directory / "tuned") == 0
    return directory / "tuned"


def train(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        train_main(["--quiet", *map(str, arguments)])
    return int(ended.value.code or 0)


def further(directory: Path) -> list[object]:
    data = f"dataset_path={directory / 'new.h5'}"
    return [directory / "run.yaml", "--set", data, "--init-from", directory / "start"]


def assert_same(one: Any, other: Any) -> None:
    """Equality of nested values, bit by bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    else:
        assert one == other


def test_features_categories_and_structure_are_kept(directory: Path, tuned: Path) -> None:
    old, new = load_payload(directory / "start"), load_payload(tuned)
    for key in ("encoder_state_dicts", "feature_mask", "feature_cleaning", "normalization", "feature_names"):
        assert_same(old[key], new[key])
    assert old["model_config"] == new["model_config"]
    assert not torch.equal(old["model_state_dict"]["heads.0.weight"], new["model_state_dict"]["heads.0.weight"])
    config = load_run_config(tuned)
    assert config.training.init_from == str(directory / "start")
    assert config.training.num_categories_auto == 3
    assert VOCABULARY in json.loads((tuned / MANIFEST).read_text())["files"]
    copy = Tokenizer.from_checkpoint(tuned).save(directory / "copy")
    assert (copy / VOCABULARY).read_bytes() == (tuned / VOCABULARY).read_bytes()


def test_vocabulary_compares_both_data_sets(directory: Path, tuned: Path) -> None:
    vocabulary = json.loads((tuned / VOCABULARY).read_text())
    old, new = Tokenizer.from_checkpoint(directory / "start"), Tokenizer.from_checkpoint(tuned)
    assert vocabulary["init_from"]["sha256"] == old.checkpoint_hash
    for data, file in (("old_data", "old.h5"), ("new_data", "new.h5")):
        before, after = (np.asarray(t.encode(directory / file)) for t in (old, new))
        total, books = vocabulary[data], [book[data] for book in vocabulary["codebooks"]]
        assert total["rows"] == len(before)
        assert total["equal_tokens"] == pytest.approx((before == after).mean())
        assert [book["usage_before"] for book in books] == [
            np.bincount(before[:, g], minlength=k).tolist() for g, k in enumerate(old.model.quantizer.num_codes)
        ]
        assert total["in_use_after"] == sum(len(np.unique(after[:, g])) for g in range(after.shape[1]))
        assert total["in_use_after"] - total["in_use_before"] == total["newly_used"] - total["died"]
        varied = [g for g in range(before.shape[1]) if min(len(np.unique(t[:, g])) for t in (before, after)) > 1]
        scores = [adjusted_mutual_info_score(before[:, g], after[:, g]) for g in varied]
        assert total["adjusted_mutual_information"] == pytest.approx(np.mean(scores))
    metrics = json.loads((tuned / METRICS).read_text())
    assert metrics["init_from"]["new_data"] == vocabulary["new_data"]
    assert vocabulary["new_data"]["error_after"] == pytest.approx(metrics["reconstruction_error"], rel=1e-4)
    assert vocabulary["new_data"]["error_after"] < vocabulary["new_data"]["error_before"]
    card = (tuned / "README.md").read_text()
    assert "The model of `start`" in card
    assert f"| equal tokens | {vocabulary['new_data']['equal_tokens']:.1%} |" in card
    changes = category_changes(read_vocabulary(tuned / VOCABULARY))
    assert [row.category for row in changes] == new.model.categories
    assert [row.kept + row.replaced for row in changes] == [row.codes for row in changes]
    assert sum(row.kept for row in changes) == vocabulary["codes"]["kept"]
    for name in ("died", "newly_used"):
        assert sum(getattr(row, name) for row in changes) == vocabulary["new_data"][name]
    assert str(directory) not in card


def test_earlier_data_that_are_gone_are_reported(directory: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(directory / "start")
    config = tokenizer.origin.texts["config.yaml"].replace("old.h5", "gone.h5")
    shutil.copytree(directory / "start", tmp_path / "start")
    (tmp_path / "start" / "config.yaml").write_text(config)
    data = f"dataset_path={directory / 'new.h5'}"
    arguments = ["--set", data, "--init-from", tmp_path / "start", "--set", "training.num_epochs=1"]
    assert train(directory / "run.yaml", *arguments, "--output", tmp_path / "run") == 0
    assert "gone.h5" in json.loads((tmp_path / "run" / VOCABULARY).read_text())["old_data"]["missing"]
    assert "could not be read again" in (tmp_path / "run" / "README.md").read_text()


# Frozen parts, on a matrix


@pytest.fixture(scope="module")
def starts() -> dict[bool, Tokenizer]:
    """Tokenizers of a matrix, with codes by moving average and by gradient."""
    x = planted_matrix(300, [6, 9, 5], seed=0)
    return {
        use_ema: Trainer(
            apply_overrides(RunConfig(), {**MATRIX_SETTINGS, "model.use_ema": use_ema, "model.group_hidden_dim": 16})
        )
        .fit(x, GROUPS)
        .tokenizer
        for use_ema in (True, False)
    }


def fit_further(start: Tokenizer, frozen: str, **more: Any) -> TrainResult:
    settings = {
        **MATRIX_SETTINGS,
        "training.optimizer": "adamw",
        "training.weight_decay": 0.1,
        "training.dead_code_reset_interval": 1,
        "training.dead_code_reset_steps": 1,
        "training.dead_code_threshold": 0.9,
        "training.freeze": frozen,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    x = 2.0 * planted_matrix(200, [6, 9, 5], seed=5, noise=0.6) + 0.5
    return Trainer(apply_overrides(RunConfig(), settings)).fit(x, init_from=start)


@pytest.mark.parametrize("use_ema", [True, False])
@pytest.mark.parametrize("frozen", ["none", "encoders", "codes", "tokens"])
def test_frozen_parts_keep_their_bits_and_the_others_change(
    starts: dict[bool, Tokenizer], frozen: str, use_ema: bool
) -> None:
    start = starts[use_ema]
    result = fit_further(start, frozen)
    kept = {"none": (), "encoders": ENCODERS, "codes": CODES, "tokens": ENCODERS + CODES}[frozen]
    before, after = start.model.state_dict(), result.final_state["model_state_dict"]
    names = [name for name, _ in result.model.named_parameters()] + ["quantizer.embedding", "quantizer.cluster_size"]
    moments = result.final_state["optimizer_state_dict"]["state"]
    for i, name in enumerate(names):
        assert torch.equal(before[name], after[name]) is name.startswith(kept), name
        if i in moments and name.startswith(kept):
            assert not moments[i]["exp_avg"].any()
    assert all(parameter.requires_grad for parameter in result.model.parameters())
    assert not result.model.quantizer.frozen
    assert result.metrics["trainable_parameters"] == fit_parameters(start)
    if frozen == "tokens":
        rows = planted_matrix(50, [6, 9, 5], seed=8)
        assert np.array_equal(start.encode(rows), result.encode(rows))
    resets = [record.resets for record in result.history]
    assert any(resets) is (frozen in ("none", "encoders"))
    assert all(0.0 < record.utilization <= 1.0 for record in result.history)


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", ["encoders", "codes", "tokens"])
def test_frozen_parts_keep_their_bits_in_cuda_graphs(starts: dict[bool, Tokenizer], frozen: str) -> None:
    result = fit_further(starts[True], frozen, device="cuda", training__num_epochs=20)
    kept = {"encoders": ENCODERS, "codes": CODES, "tokens": ENCODERS + CODES}[frozen]
    before, after = starts[True].model.state_dict(), result.final_state["model_state_dict"]
    for name in before:
        if name.startswith(kept):
            assert torch.equal(before[name], after[name].cpu()), name
    assert not torch.equal(before["shared_decoder.0.weight"], after["shared_decoder.0.weight"].cpu())


def fit_parameters(tokenizer: Tokenizer) -> int:
    return tokenizer.model.num_parameters()[0]


def test_weights_of_the_checkpoint_win_if_no_epoch_is_better(starts: dict[bool, Tokenizer]) -> None:
    result = fit_further(starts[True], "none", training__learning_rate=3.0)
    assert result.best_epoch == 0
    assert_same(dict(result.model.state_dict()), dict(starts[True].model.state_dict()))
    assert result.vocabulary is not None
    assert result.vocabulary["new_data"]["equal_tokens"] == 1.0
    assert result.vocabulary["codes"]["largest_shift"] == 0.0


def test_few_rows_can_be_trained_on(starts: dict[bool, Tokenizer]) -> None:
    config = apply_overrides(RunConfig(), {**MATRIX_SETTINGS, "training.num_epochs": 2})
    result = Trainer(config).fit(planted_matrix(4, [6, 9, 5], seed=6), init_from=starts[True])
    assert np.isfinite(result.metrics["val_loss"])


def test_extra_inputs_keep_their_standardisation() -> None:
    x = planted_matrix(200, [6, 9, 5], seed=0) * np.r_[np.ones(15), 20.0 * np.ones(5)].astype(np.float32)
    config = apply_overrides(RunConfig(), {**MATRIX_SETTINGS, "model.unassigned_features": "nearest"})
    groups = {name: GROUPS[name] for name in ("cluster_1", "cluster_2")}
    start = Trainer(config).fit(x, groups, normalize=False)
    result = Trainer(config).fit(5.0 * x, init_from=start.tokenizer, normalize=False)
    for name in ("input_mean", "input_scale"):
        assert torch.equal(getattr(result.model, name), getattr(start.model, name))
    final = Trainer(config).fit(x, groups, normalize=False, resume=start.final_state).model
    weight = result.model.error_weight[15:]
    torch.testing.assert_close(weight, final.error_weight[15:])
    assert (weight < 0.1).all()


def test_rows_are_normalised_as_in_the_checkpoint(starts: dict[bool, Tokenizer]) -> None:
    result = fit_further(starts[True], "none", families__mine__encoder="IdentityEncoder")  # families have no effect
    assert result.normalizer is not None
    assert np.array_equal(result.normalizer.normalizer.center, starts[True].normalizer.center)


def test_arguments_that_contradict_the_checkpoint(starts: dict[bool, Tokenizer]) -> None:
    start, x = starts[True], planted_matrix(100, [6, 9, 5], seed=1)
    fit = Trainer(apply_overrides(RunConfig(), MATRIX_SETTINGS)).fit
    with raises_one_line(DataError, "x has 19 columns", "20 features"):
        fit(x[:, :19], init_from=start)
    with raises_one_line(DataError, "'b' instead of 'feature_0'"):
        fit(x, feature_names=["b", *start.feature_names[1:]], init_from=start)
    with raises_one_line(ConfigError, "group_indices"):
        fit(x, {"cluster_1": list(range(20))}, init_from=start)
    with raises_one_line(ConfigError, "levels"):
        fit(x, levels=[{"num_tokens": 3, "latent_dim": 4}], init_from=start)  # type: ignore[list-item]
    with raises_one_line(ConfigError, "init_from: expected"):
        fit(x, init_from=3)  # type: ignore[arg-type]


# Settings


@pytest.mark.parametrize(
    ("key", "value", "texts"),
    [
        ("model.group_hidden_dim", 32, ["32", "start has 16"]),
        ("model.use_ema", False, ["True"]),
        ("model.unassigned_features", "nearest", ["'decoded'"]),
        ("model.levels", [{"num_tokens": 3, "latent_dim": 4}], ["codebooks"]),
        ("model.levels", {"other": [{"num_tokens": 3, "latent_dim": 4}]}, ["codebooks"]),
        ("model.compression_ratios", "1:2", ["codebooks"]),
        ("feature_cleaning.mad_threshold", 3.0, ["start has 5.0"]),
        ("feature_cleaning.nan_fill", "zero", ["'median'"]),
        ("training.num_categories_auto", 4, ["start has 3"]),
        ("training.normalization_method", "mad", ["'standard'"]),
        ("families.summary.encoder", "MLPEncoder", ["'IdentityEncoder'"]),
        ("families.summary.standardize", True, ["start has False"]),
        ("families.mine.encoder", "IdentityEncoder", ["start has no such family", "summary, temporal"]),
    ],
)
def test_contradictions_name_the_key(directory: Path, key: str, value: Any, texts: list[str]) -> None:
    initial = InitialModel.load(directory / "start")
    config = make_config(CONFIG, {key: value})
    with raises_one_line(ConfigError, f"{key.removesuffix('.encoder') if 'mine' in key else key}:", *texts):
        initial.settings(config)


def test_settings_come_from_the_checkpoint_unless_they_act_on_training_only(directory: Path) -> None:
    initial = InitialModel.load(directory / "start")
    given = make_config({"device": "cpu"}, {"model.dropout": 0.3, "model.codebook_init": "product", "random_seed": 5})
    config = initial.settings(given)
    assert list(config.families) == ["summary", "temporal"]
    assert (config.model.group_hidden_dim, config.model.dropout) == (16, 0.3)
    assert config.training.num_categories_auto == 3
    assert config.training.num_epochs == RunConfig().training.num_epochs
    assert initial.settings(config) == config
    assert initial.model_settings(config).dropout == 0.3
    same = {"model.levels": initial.tokenizer.model.levels, "families": "auto"}
    assert initial.settings(make_config(CONFIG, same)).families == config.families
    written = load_run_config(directory / "start")  # every key is given
    assert initial.settings(written).model_dump(exclude={"families"}) == written.model_dump(exclude={"families"})
    other_path = make_config(CONFIG, {"families.summary.dataset": "elsewhere/x"})
    assert initial.settings(other_path).families["summary"].dataset == "elsewhere/x"


def test_misspelt_and_lonely_options(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*further(directory), "--freeze", "encoder", "--output", tmp_path / "run") == 2
    assert "training.freeze" in capsys.readouterr().err
    assert train(directory / "run.yaml", "--freeze", "codes", "--output", tmp_path / "run") == 2
    assert "codes needs training.init_from" in capsys.readouterr().err
    assert train(directory / "run.yaml", "--init-from", tmp_path / "none", "--output", tmp_path / "run") == 3
    assert "training.init_from: " in capsys.readouterr().err
    weights = ("--set", "training.reconstruction_weight=0", "--set", "training.informativeness_weight=0")
    assert train(*further(directory), "--freeze", "tokens", *weights, "--output", tmp_path / "run") == 2
    assert not (tmp_path / "run").exists()


# Data that do not fit


def other_file(path: Path, change: str) -> Path:
    write_dataset(path, 60, seed=9, **{**SHAPE, **({"summary_width": 13} if change == "width" else {})})
    with h5py.File(path, "a") as file:
        if change == "missing":
            del file["features/temporal"]
    return path


def test_families_that_do_not_fit_are_named(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for change, texts in {"width": ["(13,)", "'summary'", "(12,)"], "missing": ["features/temporal"]}.items():
        path = other_file(tmp_path / f"{change}.h5", change)
        for dry in ([], ["--dry-run"]):
            arguments = [*further(directory), "--set", f"dataset_path={path}", *dry]
            assert train(*arguments, "--output", tmp_path / "run") == 3
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert all(text in error for text in texts), error
    assert not (tmp_path / "run").exists()


def test_columns_of_other_names_are_refused(tmp_path: Path) -> None:
    arrays = synthetic_arrays(60, seed=3, **SHAPE)
    settings = {**MATRIX_SETTINGS, "training.num_epochs": 1}
    rows = arrays[ARCHITECTURE]
    start = Tokenizer(settings=settings).fit(Families({"mine": rows}, {"mine": list("abcdef")}))
    start.save(tmp_path / "start")
    with raises_one_line(DataError, "'f' instead of 'e'"):
        Tokenizer(settings=settings, init_from=str(tmp_path / "start")).fit(
            Families({"mine": rows}, {"mine": list("abcdfe")})
        )
    with raises_one_line(DataError, "'mine'", "(5,)"):
        Tokenizer(settings=settings, init_from=str(tmp_path / "start")).fit({"mine": rows[:, :5]})
    with raises_one_line(DataError, "families mine, but the data other"):
        Tokenizer(settings=settings, init_from=str(tmp_path / "start")).fit({"other": rows})
    tuned = Tokenizer(settings=settings, init_from=str(tmp_path / "start")).fit(rows)  # one array: its only family
    assert [family.name for family in tuned.families] == ["mine"]
    assert VOCABULARY in tuned.origin.texts
    assert tuned.feature_names == start.feature_names


def test_held_out_rows_that_the_checkpoint_was_trained_on(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"random_seed": 43, "training.num_epochs": 1, "device": "cpu"}
    with caplog.at_level(logging.WARNING, "spinlock_fast"):
        tuned = Tokenizer(settings=settings, init_from=str(directory / "start")).fit(directory / "old.h5")
    assert any("held-out rows are training rows of" in record.getMessage() for record in caplog.records)
    assert tuned.known_rows is not None
    assert len(tuned.known_rows.keys) == 320


# Runs


class Saving(SilentObserver):
    """Keeps the last state."""

    state: dict[str, Any]

    def save(self, state: dict[str, Any]) -> None:
        self.state = dict(state)


def test_interrupted_run_goes_on_as_if_it_was_not(starts: dict[bool, Tokenizer]) -> None:
    x = planted_matrix(200, [6, 9, 5], seed=5)
    config = apply_overrides(RunConfig(), {**MATRIX_SETTINGS, "training.num_epochs": 4})
    whole = Trainer(config).fit(x, init_from=starts[True])
    observer = Saving()
    trainer = Trainer(config, observer)
    with pytest.raises(Interrupted), stop_after(5, trainer):
        trainer.fit(x, init_from=starts[True])
    resumed = Trainer(config).fit(x, init_from=starts[True], resume=observer.state)
    assert_same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    assert resumed.vocabulary == whole.vocabulary


def test_resumed_run_needs_the_same_checkpoint(
    directory: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tuned, run)
    more = ("--set", "training.num_epochs=8")
    shutil.copytree(directory / "start", tmp_path / "moved")
    assert train("--resume", run, *more, "--init-from", tmp_path / "moved") == 0
    assert len(json.loads((run / "training_history.json").read_text())["epochs"]) == 8
    assert train("--resume", run, *more, "--init-from", tuned) == 3
    assert "not the checkpoint that the interrupted run started from" in capsys.readouterr().err
    assert train("--resume", run, *more, "--freeze", "codes") == 2
    assert "training.freeze: 'codes', but the run to resume" in capsys.readouterr().err


def test_dry_run_says_what_is_taken_over(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*further(directory), "--freeze", "codes", "--dry-run") == 0
    out = capsys.readouterr().out
    assert f"init_from: {directory / 'start'}: encoders of 2 families" in out
    assert "3 categories" in out
    assert "freeze: codes\n" in out


@pytest.mark.dist
def test_two_ranks_equal_one_process(directory: Path, tmp_path: Path) -> None:
    calls, alone = [], []
    for frozen in ("none", "codes"):
        arguments = [*further(directory), "--freeze", frozen, "--set", "training.num_epochs=2"]
        calls.append(("train", [*arguments, "--output", tmp_path / frozen]))
        alone.append([*arguments, "--output", tmp_path / f"{frozen}-alone"])
    ranks = Ranks(calls, 2, tmp_path / "outputs")
    for arguments in alone:
        assert train(*arguments) == 0
    assert ranks.join() == [0, 0], ranks.stderr(0) + ranks.stderr(1)
    for frozen in ("none", "codes"):
        weights, others = (
            load_torch(tmp_path / name / FINAL)["model_state_dict"] for name in (frozen, f"{frozen}-alone")
        )
        for name, value in weights.items():
            torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-5)
        assert (tmp_path / frozen / VOCABULARY).exists()
    start = load_payload(directory / "start")["model_state_dict"]
    assert torch.equal(weights["quantizer.embedding"], start["quantizer.embedding"])


# The comparison itself


def test_code_moves_are_relative_to_the_spacing() -> None:
    old = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0], [6.0, 0.0]])
    new = old + torch.tensor([[0.5, 0.0], [0.0, 0.0], [2.0, 0.0], [0.0, -1.0]])
    moves = CodeMoves.of(old, new)
    assert moves.spacing == 2.0
    assert moves.shift.tolist() == [0.25, 0.0, 1.0, 0.5]
    assert moves.kept.tolist() == [True, True, False, True]
    single = CodeMoves.of(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 5.0]]))
    assert (single.spacing, single.shift.tolist(), single.kept.tolist()) == (5.0, [0.2], [True])
    twins = CodeMoves.of(torch.ones(2, 2), torch.ones(2, 2))
    assert twins.kept.all()
    assert not twins.shift.any()


def test_token_change_counts_codes() -> None:
    before, after = np.array([[0], [0], [1], [2]]), np.array([[0], [3], [1], [1]])
    change = TokenChange(before, after, 4, 0.5, 0.25)
    book = change.codebook(0, 5)
    assert book["usage_before"] == [2, 1, 1, 0, 0]
    assert book["usage_after"] == [1, 2, 0, 1, 0]
    assert (book["died"], book["newly_used"], book["equal_tokens"]) == ([2], [3], 0.5)
    total = change.total([book])
    assert (total["in_use_before"], total["in_use_after"], total["died"], total["newly_used"]) == (3, 3, 1, 1)
    constant = TokenChange(np.zeros((3, 1), int), np.zeros((3, 1), int), 3, 0.0, 0.0)
    assert constant.total([constant.codebook(0, 2)])["adjusted_mutual_information"] is None


def test_sampled_rows_are_distinct_and_spread() -> None:
    assert sampled(5, 8).tolist() == [0, 1, 2, 3, 4]
    assert sampled(0, 8).tolist() == []
    rows = sampled(1000, 7)
    assert len(set(rows.tolist())) == 7
    assert rows[-1] >= 850


def test_tables_of_the_page_are_current() -> None:
    path = Path(__file__).parents[2] / "docs" / "make_transfer.py"
    spec = importlib.util.spec_from_file_location("make_transfer", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run `python docs/make_transfer.py`"


def test_token_decoder_is_saved_and_fitted_anew(directory: Path, tmp_path: Path) -> None:
    fit = ("--set", "training.joint_search_epochs=3")
    assert train(directory / "run.yaml", *fit, "--output", tmp_path / "start") == 0
    tokenizer = Tokenizer.from_checkpoint(tmp_path / "start")
    metrics = json.loads((tmp_path / "start" / METRICS).read_text())
    assert metrics["joint"]["reconstruction_error"] < metrics["reconstruction_error"]
    assert tokenizer.model.token_decoder is not None
    for arguments, fitted in (((), False), (fit, True)):
        output = tmp_path / f"further{fitted}"
        data = ("--set", f"dataset_path={directory / 'new.h5'}", "--init-from", tmp_path / "start")
        assert train(directory / "run.yaml", *data, *arguments, "--output", output) == 0
        assert (Tokenizer.from_checkpoint(output).model.token_decoder is not None) == fitted
