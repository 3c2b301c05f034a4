import os
import re
from pathlib import Path

import helpers
import pytest
import yaml
from pydantic import ValidationError

from spinlock_fast.config.byte_sizes import parse_bytes
from spinlock_fast.config.help import help_text
from spinlock_fast.config.loading import apply_overrides, check_config, dump_config, load_config, parse_yaml
from spinlock_fast.config.schema import (
    FeatureCleaningConfig,
    IdentityEncoderParams,
    MLPEncoderParams,
    RunConfig,
    TemporalCNNEncoderParams,
)
from spinlock_fast.errors import ConfigError
from spinlock_fast.messages import one_line

ROOT = Path(__file__).parents[2]

BASELINE = """
families:
  summary:
    encoder: MLPEncoder
    encoder_params:
      hidden_dims: [512, 256]
      output_dim: 128
      dropout: 0.1
      activation: "relu"
      batch_norm: true

  temporal:
    encoder: TemporalCNNEncoder
    encoder_params:
      embedding_dim: 128
      architecture: "resnet1d_3"

  architecture:
    encoder: IdentityEncoder
    encoder_params: {}
    # Parameters already normalized to [0, 1]

model:
  group_embedding_dim: 256
  group_hidden_dim: 512
  levels: []  # auto-computed
  commitment_cost: 0.25
  use_ema: true
  decay: 0.99

training:
  batch_size: 512
  learning_rate: 0.001
  num_epochs: 200
  optimizer: "adam"

  # Category discovery
  category_assignment: "auto"
  orthogonality_target: 0.15

  # Loss weights
  reconstruction_weight: 1.0
  vq_weight: 1.0
  orthogonality_weight: 0.1
  informativeness_weight: 0.1
  topo_weight: 0.3
  topo_samples: 512

  # Callbacks
  early_stopping_patience: 30
  dead_code_reset_interval: 25
  val_every_n_epochs: 5
  use_torch_compile: true
"""


@pytest.fixture
def load(tmp_path):
    def load(text, overrides=()):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return load


def refused(load, text, *texts, overrides=()):
    with helpers.raises_one_line(ConfigError, *texts):
        load(text, overrides)


def test_the_baseline_loads_unchanged(load):
    config = load(BASELINE)
    assert list(config.families) == ["summary", "temporal", "architecture"]
    assert config.families["summary"].encoder_params == MLPEncoderParams(hidden_dims=[512, 256], output_dim=128)
    assert config.families["temporal"].encoder_params == TemporalCNNEncoderParams(embedding_dim=128)
    assert config.families["architecture"].encoder_params == IdentityEncoderParams()
    assert config.model.levels == []
    assert config.training.batch_size == 512
    assert config.training.use_torch_compile is True


def test_the_baseline_takes_the_top_level_keys(load):
    config = load(BASELINE + "dataset_path: a.h5\nrandom_seed: 7\nfeature_cleaning:\n  mad_threshold: 5\n")
    assert (config.dataset_path, config.random_seed) == ("a.h5", 7)
    assert config.feature_cleaning.mad_threshold == 5.0


def test_the_baseline_is_kept_as_a_configuration(load):
    """Equal except for paths, mad_scale and nan_fill, which the original does not set."""
    kept = load_config(ROOT / "configs" / "baseline-100k.yaml")
    written = load(BASELINE + "feature_cleaning: {mad_scale: 1.0, nan_fill: zero}\n")
    places = {"dataset_path": None, "output_dir": None}
    assert kept.model_copy(update=places) == written.model_copy(update=places)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_load(path):
    config = load_config(path)
    assert config.output_dir == f"checkpoints/{path.stem}"


def test_an_empty_file_is_the_default(load):
    config = load("")
    assert config.model_copy(update={"output_dir": None}) == RunConfig()
    assert config.families["summary"].encoder == "MLPEncoder"


def test_defaults_are_those_of_the_contract():
    config = RunConfig()
    assert config.memory_budget == 1_250_000_000
    assert config.model.commitment_cost == 0.25
    assert config.model.compression_ratios == "0.5:1:1.5"
    training = config.training
    weights = (training.orthogonality_weight, training.informativeness_weight, training.topo_weight)
    assert weights == (0.1, 0.1, 0.3)
    assert (training.dead_code_threshold, training.max_reset_fraction) == (0.05, 0.25)
    assert (training.val_fraction, training.test_fraction) == (0.1, 0.0)
    assert training.min_features_per_category == 3
    cleaning = config.feature_cleaning
    assert (cleaning.variance_threshold, cleaning.deduplicate_threshold) == (1e-8, 0.99)
    assert (cleaning.mad_threshold, cleaning.mad_scale) == (5.0, 1.4826)


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("trainin: {}", "trainin", "training"),
        ("dataset: a.h5", "dataset", "dataset_path"),
        ("training: {num_epoch: 3}", "training.num_epoch", "num_epochs"),
        ("model: {decays: 0.9}", "model.decays", "decay"),
        ("model: {levels: [{num_tokens: 3, latent_dims: 4}]}", "latent_dims", "latent_dim"),
        ("feature_cleaning: {mad_treshold: 3}", "feature_cleaning.mad_treshold", "mad_threshold"),
        ("logging: {levl: info}", "logging.levl", "level"),
        ("families: {summary: {encoder: MLPEncoder, datset: x}}", "families.summary.datset", "dataset"),
        (
            "families: {summary: {encoder: MLPEncoder, encoder_params: {output_dims: 3}}}",
            "families.summary.encoder_params.output_dims",
            "output_dim",
        ),
        ("families: {summary: {encoder: MLPEncoder, encoderParams: {}}}", "encoderParams", "encoder_params"),
        ("training: {evalConfig: 1}", "training.evalConfig", "unknown key"),
        ("training: {str: 1}", "training.str", "unknown key"),
        ("training: {3: 1}", "3", "training"),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest(load, text, key, nearest):
    refused(load, text, "run.yaml", key, nearest)


def test_an_unknown_key_of_an_encoder_without_settings(load):
    refused(load, "families: {architecture: {encoder: IdentityEncoder, encoder_params: {dim: 3}}}", "dim", "no keys")


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("training: {num_epochs: many}", ["training.num_epochs", "integer", "'many'"]),
        ("training: {num_epochs: 5.5}", ["training.num_epochs", "5.5"]),
        ("training: {num_epochs: true}", ["training.num_epochs", "True"]),
        ("training: {num_epochs: '5'}", ["training.num_epochs", "'5'"]),
        ("training: {learning_rate: fast}", ["training.learning_rate", "'fast'"]),
        ("training: {use_torch_compile: 1}", ["training.use_torch_compile", "1"]),
        ("training: {isolated_families: summary}", ["training.isolated_families", "list", "'summary'"]),
        ("training: 3", ["training", "3"]),
        ("training: []", ["training", "[]"]),
        ("model: {levels: 3}", ["model.levels", "3"]),
        ("families: {summary: {encoder: MLPEncoder, encoder_params: {hidden_dims: [a]}}}", ["hidden_dims.0", "'a'"]),
        ("families: {summary: {encoder: MLPEncoder, encoder_params: [1]}}", ["families.summary", "[1]"]),
        ("families: {summary: {encoder: [MLPEncoder]}}", ["families.summary.encoder", "['MLPEncoder']"]),
        ("families: {summary: MLPEncoder}", ["families.summary", "'MLPEncoder'"]),
        ("families: [summary]", ["families", "['summary']"]),
        ("dataset_path: 3", ["dataset_path", "3"]),
        ("random_seed: x", ["random_seed", "'x'"]),
        ("memory_budget: lots", ["memory_budget", "1.25GB", "'lots'"]),
        ("feature_cleaning: {percentile_range: ['1', '2']}", ["feature_cleaning.percentile_range", "'1'"]),
    ],
)
def test_a_wrong_type_is_named(load, text, texts):
    refused(load, text, "run.yaml", *texts)


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("training: {batch_size: 0}", ["training.batch_size", "greater than or equal to 1", "0"]),
        ("training: {learning_rate: -1}", ["training.learning_rate", "greater than 0"]),
        ("training: {learning_rate: .nan}", ["training.learning_rate", "nan"]),
        ("training: {learning_rate: .inf}", ["training.learning_rate", "inf"]),
        ("training: {val_fraction: 1.0}", ["training.val_fraction", "less than 1"]),
        ("training: {val_fraction: .nan}", ["training.val_fraction", "nan"]),
        ("training: {val_fraction: 0.5, test_fraction: 0.5}", ["training", "val_fraction + test_fraction"]),
        ("training: {max_reset_fraction: 1.5}", ["training.max_reset_fraction", "1.5"]),
        ("training: {optimizer: adm}", ["training.optimizer", "'adm'", "did you mean 'adam'"]),
        ("training: {topo_samples: 1}", ["training.topo_samples", "2"]),
        ("training: {isolated_families: [nobody]}", ["training.isolated_families", "'nobody'", "summary"]),
        ("model: {decay: 1.0}", ["model.decay", "less than 1"]),
        ("model: {decay: .nan}", ["model.decay", "nan"]),
        ("model: {dropout: 1.0}", ["model.dropout", "1.0"]),
        ("model: {compression_ratios: '1:x'}", ["model.compression_ratios", "'1:x'"]),
        ("model: {levels: [{num_tokens: 0, latent_dim: 4}]}", ["model.levels", "num_tokens", "0"]),
        ("model: {levels: [{num_tokens: 3}]}", ["model.levels", "latent_dim", "required"]),
        ("model: {levels: {a: [{num_tokens: 3, latent_dim: 0}]}}", ["model.levels", "latent_dim", "0"]),
        ("feature_cleaning: {deduplicate_threshold: 0}", ["feature_cleaning.deduplicate_threshold", "0"]),
        ("feature_cleaning: {percentile_range: [99, 1]}", ["feature_cleaning.percentile_range", "increasing"]),
        ("feature_cleaning: {percentile_range: [1]}", ["feature_cleaning.percentile_range"]),
        ("families: {summary: {encoder: MLPEncodr}}", ["families.summary.encoder", "did you mean 'MLPEncoder'"]),
        ("families: all", ["families", "auto", "'all'"]),
        ("families: {mine: {encoder_params: {dim: 3}}}", ["families.mine.encoder_params.dim", "no keys"]),
        ("families: {'a b': {encoder: IdentityEncoder, dataset: x}}", ["families", "'a b'"]),
        ("families: {}", ["families", "at least 1"]),
        ("device: tpu", ["device", "'tpu'"]),
        ("random_seed: -1", ["random_seed", "-1"]),
        ("memory_budget: 0", ["memory_budget", "above zero"]),
        ("output_dir: a\ntraining: {checkpoint_dir: b}", ["output_dir (a)", "checkpoint_dir (b)"]),
    ],
)
def test_an_impossible_value_is_named(load, text, texts):
    refused(load, text, *texts)


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("training: {a: 1", ["not valid YAML"]),
        ("- a\n- b", ["expected sections", "list"]),
        ("just text", ["expected sections", "str"]),
        ("training:\n  num_epochs: 1\n  num_epochs: 2", ["'num_epochs'", "twice"]),
        ("random_seed: 1\nmodel: {}\nrandom_seed: 2", ["'random_seed'", "twice"]),
        ("dataset_path: !!python/object/apply:os.system [x]", ["not valid YAML"]),
        ("dataset_path: {{ DATA }}", ["run.yaml"]),
    ],
)
def test_files_that_are_no_configuration(load, text, texts):
    refused(load, text, "run.yaml", *texts)


def test_every_wrong_key_has_its_line(load):
    with pytest.raises(ConfigError) as caught:
        load("training: {num_epochs: a, optimizer: sgd}\nmodell: 1\nmodel: {levels: [{num_token: 3, latent_dim: 4}]}")
    num_token, modell, epochs, optimizer = caught.value.lines
    assert "modell: unknown key; did you mean 'model'?" in modell
    assert "model.levels.0.num_token: unknown key; did you mean 'num_tokens'?" in num_token
    assert "training.num_epochs: input should be a valid integer" in epochs
    assert "training.optimizer: input should be 'adam' or 'adamw', got 'sgd'" in optimizer
    assert all("run.yaml: " in line and "\n" not in line for line in caught.value.lines)


def test_many_wrong_keys_are_counted(load):
    with pytest.raises(ConfigError) as caught:
        load("\n".join(f"key_{i}: 1" for i in range(30)))
    assert len(caught.value.lines) == 21
    assert caught.value.lines[-1].endswith("and 10 more wrong keys")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("num_epochs=3", "num_epochs: unknown key; did you mean 'training.num_epochs'?"),
        ("decay=0.9", "did you mean 'model.decay'?"),
        ("training.random_seed=1", "training.random_seed: unknown key; did you mean 'random_seed'?"),
        ("model.num_epochs=3", "did you mean 'training.num_epochs'?"),
    ],
)
def test_a_key_of_another_section_is_named_with_its_section(load, override, hint):
    refused(load, "", hint, overrides=[override])


def test_files_that_cannot_be_read(tmp_path):
    with helpers.raises_one_line(ConfigError, "none.yaml", "no such configuration file"):
        load_config(tmp_path / "none.yaml")
    with helpers.raises_one_line(ConfigError, f"{tmp_path}: is a directory, not a file"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: \xff\xfe\xfa")
    with helpers.raises_one_line(ConfigError, "latin.yaml", "is not a text file; expected a configuration file"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-8", 1e-8), ("1E-3", 1e-3), ("-2e5", -2e5), (".5e3", 500.0), ("1.e+2", 100.0), ("1.0e-8", 1e-8)],
)
def test_numbers_in_scientific_notation(text, value):
    found = parse_yaml(text)
    assert isinstance(found, float)
    assert found == value


@pytest.mark.parametrize("text", ["e5", "1e", "1e-", "abc1e5", "1e5x"])
def test_texts_that_only_look_like_numbers(text):
    assert parse_yaml(text) == text


def test_a_small_threshold_is_a_number(load):
    assert load("feature_cleaning: {variance_threshold: 1e-8}").feature_cleaning.variance_threshold == 1e-8


def test_anchors_and_merge_keys(load):
    config = load(
        "families:\n"
        "  summary: &base {encoder: IdentityEncoder, standardize: true}\n"
        "  architecture:\n    <<: *base\n    standardize: false\n"
    )
    assert config.families["summary"].standardize
    assert config.families["architecture"].encoder == "IdentityEncoder"
    assert not config.families["architecture"].standardize


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("training.num_epochs=5", "training.num_epochs", 5),
        (" training.num_epochs = 5", "training.num_epochs", 5),
        ("training.learning_rate=1e-4", "training.learning_rate", 1e-4),
        ("model.use_ema=false", "model.use_ema", False),
        ("dataset_path=a=b.h5", "dataset_path", "a=b.h5"),
        ("dataset_path=[a.h5, 'b*.h5']", "dataset_path", ["a.h5", "b*.h5"]),
        ("dataset_path=@files.txt", "dataset_path", "@files.txt"),
        ("memory_budget=512MiB", "memory_budget", 2**29),
        ("training.num_categories_auto=null", "training.num_categories_auto", None),
        ("families.summary.standardize=true", "families.summary.standardize", True),
        ("families.temporal.encoder_params.embedding_dim=16", "families.temporal.encoder_params.embedding_dim", 16),
        ("logging.level=debug", "logging.level", "debug"),
    ],
)
def test_overrides_of_the_command_line(load, override, path, value):
    found = load(BASELINE, [override])
    for part in path.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


def test_later_overrides_win(load):
    assert load("", ["random_seed=1", "random_seed=2"]).random_seed == 2


def test_overrides_as_a_mapping(load):
    config = load(BASELINE, {"training.num_epochs": 5, "model.dropout": 0.0})
    assert (config.training.num_epochs, config.model.dropout) == (5, 0.0)
    assert apply_overrides(config, {"training.num_epochs": 6}).training.num_epochs == 6


@pytest.mark.parametrize(
    ("override", "texts"),
    [
        ("training.num_epochs", ["training.num_epochs", "key=value"]),
        ("=5", ["key=value"]),
        ("training.num_epoch=5", ["training.num_epoch", "num_epochs"]),
        ("training.num_epochs=[", ["training.num_epochs", "not valid YAML"]),
        ("random_seed.deep=1", ["random_seed"]),
        ("training=5", ["training", "5"]),
        ("training..x=5", ["training"]),
    ],
)
def test_overrides_that_cannot_be(load, override, texts):
    refused(load, "random_seed: 1", *texts, overrides=[override])


@pytest.mark.parametrize("section", ["training", "model", "feature_cleaning", "logging"])
def test_an_empty_section_is_the_default(load, section):
    assert getattr(load(f"{section}:\n"), section) == getattr(RunConfig(), section)


def test_an_override_in_an_empty_section(load):
    assert load("training:\n", ["training.num_epochs=5"]).training.num_epochs == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "checkpoints/run"),
        ("output_dir: a", "a"),
        ("training: {checkpoint_dir: b}", "b"),
        ("output_dir: a\ntraining: {checkpoint_dir: a}", "a"),
    ],
)
def test_the_output_directory(load, text, expected):
    assert load(text).output_dir == expected


@pytest.mark.parametrize(
    "text",
    [
        BASELINE,
        "",
        "dataset_path: [a.h5, b.h5]\nmemory_budget: 1.5GiB",
        "feature_cleaning: {percentile_range: [1, 99], variance_threshold: 1e-12}",
        "model: {levels: [{num_tokens: 3, latent_dim: 4}]}",
        "model: {levels: {b: [{num_tokens: 3, latent_dim: 4}], a: []}}",
        "families: {b: {encoder: IdentityEncoder, dataset: x/y}, a: {encoder: MLPEncoder, dataset: z}}",
        "output_dir: 'ü: #x'\nlogging: {tensorboard: false}",
        "dataset_path: '1e5'\noutput_dir: 'null'",
    ],
)
def test_a_written_configuration_reads_back(load, text):
    config = load(text)
    again = load(dump_config(config))
    assert again == config
    assert list(again.families) == list(config.families)
    assert yaml.safe_load(dump_config(config)) == parse_yaml(dump_config(config))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1),
        ("17", 17),
        ("1.25GB", 1_250_000_000),
        ("512 MiB", 2**29),
        (" 2kb ", 2000),
        (".5KiB", 512),
        ("3tb", 3 * 10**12),
        ("10B", 10),
        ("1.GB", 10**9),
    ],
)
def test_sizes_in_bytes(value, expected):
    assert parse_bytes(value) == expected


@pytest.mark.parametrize(
    "value", [0, -1, "0", "0.1B", "1.5 XB", "GB", "", "1 2", "-1GB", None, True, 1.5, [1], "1G", "9" * 400 + "GB"]
)
def test_invalid_sizes_are_refused(value):
    with pytest.raises(ValueError, match="expected a size"):
        parse_bytes(value)


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().training.num_epochs = 3
    with pytest.raises(ValidationError, match="frozen"):
        FeatureCleaningConfig().enabled = False


def test_datasets_of_families_in_order(load):
    config = load("families: {x: {encoder: IdentityEncoder, dataset: a/b}, temporal: {encoder: TemporalCNNEncoder}}")
    assert list(config.datasets().items()) == [("x", "a/b"), ("temporal", "features/temporal/features")]


def test_aliases_are_read_and_not_written(load):
    config = load("training: {checkpoint_dir: out, category_mapping_file: map.json}")
    assert (config.output_dir, config.training.category_assignment) == ("out", "map.json")
    assert "checkpoint_dir" not in dump_config(config)
    assert "category_mapping_file" not in dump_config(config)
    assert load("training: {checkpoint_dir: null, category_mapping_file: null}") == load("")
    refused(load, "training: {checkpoint_dir: 3}", "output_dir: input should be a valid string, got 3")


def test_plain_data_are_checked_alike():
    assert check_config({"random_seed": 3}).random_seed == 3
    with helpers.raises_one_line(ConfigError, "configuration", "random_sed", "random_seed"):
        check_config({"random_sed": 3})


def test_help_names_every_key_with_its_default():
    text = help_text()
    for section in (RunConfig, MLPEncoderParams, TemporalCNNEncoderParams, FeatureCleaningConfig):
        for name, field in section.model_fields.items():
            assert name in text
            assert field.description
    assert "num_epochs  (integer >= 1; default 200)" in text
    assert "levels  (list of {num_tokens, latent_dim} or mapping from name to list of {num_tokens, latent_dim};" in text
    assert "dropout  (number >= 0 and < 1; default 0.1)" in text
    assert "memory_budget  (size such as 1.25GB or 512MiB; default 1.25GB)" in text
    assert "num_categories_auto  (integer >= 2 or null; default null)" in text
    assert "percentile_range  (list of 2 numbers; default [0.5, 99.5])" in text
    types = "\n".join(re.findall(r"\((.+); (?:default|required)", text))
    assert not re.search(r"Pydantic|Annotated|Optional|None|Literal|class|\bstr\b|\bint\b|\bbool\b|\bfloat\b", types)


def test_an_override_may_touch_a_default_family(load):
    config = load("training: {num_epochs: 1}", ["families.summary.standardize=true"])
    assert list(config.families) == ["summary", "temporal", "architecture"]
    assert config.families["summary"].standardize
    assert config.families["summary"].encoder_params == RunConfig().families["summary"].encoder_params


def _expanding(head, item, levels=9):
    """YAML whose aliases expand to 9 ** levels values."""
    lines = [head, f"{item}&a0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(1, levels):
        lines.append(f"{item}&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (_expanding("training:\n  num_epochs:", "    - "), "aliases expand to more than 1,000,000 values"),
        ("model: &a\n  levels: *a\n", "an alias refers to a value that contains it"),
        ("model: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("model: " + "{a: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
        ("training:\n  num_epochs: " + "9" * 5000, "5000 digits"),
        ("training:\n  num_epochs: 0x" + "f" * 50_000, "training.num_epochs: input should be less than or equal"),
        ("training:\n  learning_rate: 0x" + "f" * 50_000, "training.learning_rate: input should be a valid number"),
        ("random_seed: 0x" + "f" * 5000, "random_seed"),
        ("training:\n  num_epochs: 2020-13-45\n", "month must be in 1..12"),
        ("model:\n  group_hidden_dim: 10000000000\n", "model.group_hidden_dim: input should be less than or equal"),
        ('"\\e[31mred": 1\n', "\\x1b[31mred: unknown key"),
    ],
    ids=["expanding", "recursive", "lists", "maps", "digits", "hexadecimal", "float", "seed", "date", "huge", "escape"],
)
def test_hostile_yaml_is_one_short_line(load, text, expected):
    with pytest.raises(ConfigError) as caught:
        load(text)
    message = one_line(caught.value)
    assert expected in message
    assert len(message) < 600


def test_a_merge_that_expands_is_refused(load):
    lines = ["m0: &m0 {a: 1, b: 2}"]
    lines += [f"m{i}: &m{i}\n  <<: [{', '.join([f'*m{i - 1}'] * 9)}]" for i in range(1, 9)]
    with helpers.raises_one_line(ConfigError, "aliases expand"):
        load("\n".join(lines))


def test_aliases_of_an_ordinary_file_are_read():
    assert parse_yaml("a: &x {p: 1}\nb: *x\nc:\n  <<: *x\n  q: 2\n") == {
        "a": {"p": 1},
        "b": {"p": 1},
        "c": {"p": 1, "q": 2},
    }


def test_a_pipe_a_folder_or_an_impossible_path_is_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with helpers.raises_one_line(ConfigError, "pipe.yaml", "not a regular file"):
        load_config(tmp_path / "pipe.yaml")
    with helpers.raises_one_line(ConfigError, "is a directory"):
        load_config(tmp_path)
    with helpers.raises_one_line(ConfigError, "cannot be read"):
        load_config("a\0b.yaml")
    with helpers.raises_one_line(ConfigError, "File name too long"):
        load_config("x" * 300 + ".yaml")


@pytest.mark.parametrize("text", ["training: {mixing: 0.4, mixing_decays: true}", "training: {mixup_scale: 0.1}"])
def test_old_names_of_mixup_settings_are_accepted(load, text):
    config = load(text, ["training.mixing=0.3", "training.mixup_decay=true"])
    assert (config.training.mixup_scale, config.training.mixup_decay) == (0.3, True)
    assert apply_overrides(config, {"training.mixing": 0.5}).training.mixup_scale == 0.5
    assert "mixing" not in dump_config(config)


def test_an_error_in_an_old_name_names_the_current_key(load):
    refused(load, "training: {mixing: 2.0}", "training.mixup_scale", "2.0")
