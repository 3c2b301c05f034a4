import copy

import pytest
import torch
from helpers import planted_matrix, raises_one_line

from spinlock_fast import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig, Trainer, load_checkpoint
from spinlock_fast.checkpoints.directory import BEST, model_payload, save_torch
from spinlock_fast.config.loading import apply_overrides
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.errors import ConfigError, DataError, is_out_of_memory

GROUPS = {"a": [0, 1, 2, 3], "b": [4, 5, 6, 7, 8]}
PARTS = {
    "encoder_state_dicts": {},
    "feature_mask": torch.ones(9, dtype=torch.bool),
    "feature_cleaning": {},
    "normalization": {},
    "feature_names": [f"f{i}" for i in range(9)],
}


def build(**settings):
    return CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(input_dim=9, group_indices=GROUPS, **settings))


@pytest.fixture(scope="module")
def payload():
    model = build()
    return model_payload(model, model.state_dict(), 1, PARTS)


def renamed(weights, old, new):
    return {new if name == old else name: value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda p: p["model_config"].update(flux=3), "model_config: flux: Extra inputs are not permitted"),
        (lambda p: p["model_config"].pop("group_indices"), "model_config: group_indices: Field required"),
        (lambda p: p["model_config"].update(dropout="much"), "model_config: dropout"),
        (lambda p: p["model_config"].update(group_hidden_dim=10**9), "model_config describes"),
        (lambda p: p["model_config"].update(group_hidden_dim=8), "model_state_dict: category_mlp.0.weight is"),
        (lambda p: p.update(model_config=[1]), "must be mappings"),
        (lambda p: p["model_state_dict"].pop("heads.0.bias"), "model_state_dict: heads.0.bias is missing"),
        (lambda p: p["model_state_dict"].update(extra=torch.ones(3)), "model_state_dict: 'extra' is unknown"),
        (
            lambda p: p["model_state_dict"].update({"heads.0.bias": p["model_state_dict"]["heads.0.bias"][None]}),
            "model_state_dict: heads.0.bias is [1, ",
        ),
        (
            lambda p: p.update(model_state_dict=renamed(p["model_state_dict"], "heads.0.bias", "\x1b[31m")),
            "heads.0.bias is missing",
        ),
        (lambda p: p["model_state_dict"].update({"heads.0.bias": [1.0]}), "'heads.0.bias' must be a tensor"),
    ],
)
def test_incompatible_payload_reports_its_writer(payload, tmp_path, change, expected):
    spoilt = copy.deepcopy(payload)
    spoilt["written_by"] = "spinlock-fast 9.9.9"
    change(spoilt)
    save_torch(tmp_path / BEST, spoilt)
    with raises_one_line(DataError, expected, "written by 'spinlock-fast 9.9.9'"):
        load_checkpoint(tmp_path)


def test_checkpoint_without_written_by_loads(payload, tmp_path):
    save_torch(tmp_path / BEST, {key: value for key, value in payload.items() if key != "written_by"})
    loaded = load_checkpoint(tmp_path)
    for name, value in payload["model_state_dict"].items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_ema": False},
        {"uniform_codebook_init": True, "group_hidden_dim": 20, "group_embedding_dim": 12},
        {"levels": {"a": [{"num_tokens": 3, "latent_dim": 2}], "b": [{"num_tokens": 5, "latent_dim": 7}] * 2}},
    ],
)
def test_parameters_are_counted_without_building_the_model(settings):
    model = build(**settings)
    assert model.config.parameter_count() == sum(model.num_parameters())


def test_model_larger_than_memory_is_rejected():
    config = apply_overrides(RunConfig(), {"model.group_hidden_dim": 10**9, "device": "cpu"})
    x = torch.from_numpy(planted_matrix(200, [4, 5], seed=0))
    with raises_one_line(ConfigError, "parameters need", "model.group_hidden_dim"):
        Trainer(config).fit(x, GROUPS)


def test_out_of_memory_errors_are_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**10, 10**10)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
