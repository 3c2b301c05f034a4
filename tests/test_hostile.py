"""Configurations and checkpoints with wrong values: a one-line DataError or ConfigError, never another exception."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import planted_matrix, write_arrays
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spinlock_fast.checkpoints.directory import BEST, FINAL, load_torch
from spinlock_fast.commands.console import RunDisplay
from spinlock_fast.config.loading import load_config
from spinlock_fast.config.schema import LoggingConfig, RunConfig
from spinlock_fast.errors import ConfigError, DataError, SpinlockFastError
from spinlock_fast.messages import shown
from spinlock_fast.tokenizer import Tokenizer
from spinlock_fast.training import run as pipeline
from spinlock_fast.training.trainer import Trainer

X = planted_matrix(120, [6, 6], seed=4)
EXAMPLES = 200
HOSTILE = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WRONG: list[Any] = [
    None,
    True,
    -1,
    0,
    10**5000,
    2.5,
    float("nan"),
    float("inf"),
    "",
    "n" * 300,
    "\x1b[31m\udcff\x00",
    b"\xff",
    [],
    [[]] * 3,
    {},
    {"": {"": []}},
    torch.zeros(0),
    torch.full((3, 2), float("nan")),
    torch.arange(12),
    torch.zeros(3, dtype=torch.complex64),
    torch.zeros(2).to_sparse(),
    torch.zeros(4, dtype=torch.bfloat16),
]
PLAIN = [value for value in WRONG if not isinstance(value, (torch.Tensor, bytes))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hostile")
    config = {
        "dataset_path": str(write_arrays(directory / "x.h5", {"x": X})),
        "output_dir": str(directory / "out"),
        "device": "cpu",
        "families": {"mine": {"encoder": "IdentityEncoder", "dataset": "x"}},
        "training": {"batch_size": 64, "topo_samples": 64, "num_epochs": 1, "orthogonality_target": 10.0},
        "logging": {"tensorboard": False},
    }
    with RunDisplay(True, LoggingConfig()) as display:
        pipeline.run(RunConfig.model_validate(config), display)
    return directory / "out"


@pytest.fixture(scope="module")
def payload(checkpoint: Path) -> dict[str, Any]:
    return load_torch(checkpoint / BEST)


@pytest.fixture(scope="module")
def state(checkpoint: Path) -> dict[str, Any]:
    return dict(load_torch(checkpoint / FINAL)["run_state"]["run"])


def entry_paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all entries of nested mappings, and of the first three of lists."""
    paths = [path] if path else []
    if isinstance(value, dict):
        return paths + [p for key, inner in value.items() for p in entry_paths(inner, (*path, key))]
    if isinstance(value, list):
        return paths + [p for i, inner in enumerate(value[:3]) for p in entry_paths(inner, (*path, i))]
    return paths


def with_wrong_entry(value: Any, path: tuple[Any, ...], wrong: Any, removed: bool) -> Any:
    """A copy in which the entry at `path` is `wrong`, or is removed."""
    result = copy.copy(value)
    if len(path) > 1:
        result[path[0]] = with_wrong_entry(value[path[0]], path[1:], wrong, removed)
    elif removed:
        del result[path[0]]
    else:
        result[path[0]] = wrong
    return result


def assert_one_line(error: SpinlockFastError) -> None:
    text = str(error)
    assert text.isprintable(), text
    assert len(text) < 3000


@HOSTILE
@given(choice=st.data())
def test_checkpoint_with_a_wrong_entry_is_a_one_line_error(payload: dict[str, Any], choice: st.DataObject) -> None:
    path = choice.draw(st.sampled_from(entry_paths(payload)))
    hostile = with_wrong_entry(payload, path, choice.draw(st.sampled_from(WRONG)), choice.draw(st.booleans()))
    if any(key not in hostile for key in ("model_state_dict", "model_config")):
        return  # `load_payload` refuses these
    try:
        tokenizer = Tokenizer.from_payload(hostile)
        tokenizer.encode({family.name: X for family in tokenizer.families})
    except DataError as error:
        assert_one_line(error)


def test_resumed_state_with_a_wrong_entry_is_a_one_line_error(state: dict[str, Any]) -> None:
    """Drawn without hypothesis, whose random state the trainer would reset."""
    training = {"batch_size": 64, "topo_samples": 64, "num_epochs": 1, "orthogonality_target": 10.0}
    groups = {"a": list(range(6)), "b": list(range(6, 12))}
    draw = random.Random(0)
    for _ in range(40):
        path, wrong, removed = draw.choice(entry_paths(state)), draw.choice(WRONG), draw.random() < 0.5
        trainer = Trainer(RunConfig.model_validate({"device": "cpu", "training": training}))
        hostile = with_wrong_entry(copy.deepcopy(state), path, copy.deepcopy(wrong), removed)
        try:
            trainer.fit(X, groups, normalize=False, resume=hostile)
        except (DataError, ConfigError) as error:
            assert_one_line(error)
        except Exception as error:
            raise AssertionError(f"{path}, removed {removed}: {shown(wrong)}") from error


@HOSTILE
@given(choice=st.data())
def test_configuration_with_a_wrong_entry_is_a_one_line_error(tmp_path: Path, choice: st.DataObject) -> None:
    settings_ = RunConfig(families={"mine": {"encoder": "IdentityEncoder", "dataset": "x"}}).model_dump(mode="json")
    path = choice.draw(st.sampled_from(entry_paths(settings_)))
    hostile = with_wrong_entry(settings_, path, choice.draw(st.sampled_from(PLAIN)), choice.draw(st.booleans()))
    file = tmp_path / "hostile.yaml"
    text = yaml.safe_dump(_replace_long_integers(hostile), allow_unicode=False)
    file.write_text(text.replace("LONG", "9" * 5000))
    try:
        load_config(file)
    except ConfigError as error:
        assert_one_line(error)


def _replace_long_integers(value: Any) -> Any:
    """Replaces integers of more than 1000 bits by "LONG": Python does not convert them to text."""
    if isinstance(value, dict):
        return {key: _replace_long_integers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replace_long_integers(inner) for inner in value]
    return "LONG" if isinstance(value, int) and value.bit_length() > 1000 else value


def test_message_names_the_entry_and_the_version(payload: dict[str, Any]) -> None:
    for path, wrong, text in (
        (("normalization", "scale"), torch.zeros(12, dtype=torch.float64), "normalization: scale must be positive"),
        (("feature_cleaning", "fill"), None, "feature_cleaning: fill must be a tensor, got None"),
        (("encoder_state_dicts", "mine", "row_shape"), [5], "mine: fill is [12], expected [5]"),
        (("encoder_state_dicts", "mine", "encoder_name"), "NoEncoder", "encoder_state_dicts: 'NoEncoder' is missing"),
        (("feature_names",), ["a"], "feature_names must be 12 strings"),
        (("code_usage",), torch.zeros(3), "code_usage must be ["),
    ):
        with pytest.raises(DataError, match="read by spinlock-fast") as caught:
            Tokenizer.from_payload(with_wrong_entry(payload, path, wrong, removed=False))
        assert text in str(caught.value)


def test_unchanged_checkpoint_encodes(payload: dict[str, Any]) -> None:
    tokens = Tokenizer.from_payload(payload).encode(X)
    assert tokens.shape[0] == len(X)
    assert np.issubdtype(tokens.dtype, np.integer)
