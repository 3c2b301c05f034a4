import helpers
import numpy as np
import pytest
import torch

from spinlock_fast.config.schema import FamilyConfig, MLPEncoderParams, TemporalCNNEncoderParams
from spinlock_fast.data.batch_memory import BatchMemory
from spinlock_fast.data.feature_source import DatasetInfo, FeatureSource
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.features import encode as module
from spinlock_fast.features.encode import FamilyEncoder, block_rows, encode, make_encoders

CPU = torch.device("cpu")
BUDGET = 10**8
FAMILIES = {
    "summary": FamilyConfig(encoder="MLPEncoder", encoder_params=MLPEncoderParams(hidden_dims=[16], output_dim=8)),
    "temporal": FamilyConfig(encoder="TemporalCNNEncoder", encoder_params=TemporalCNNEncoderParams(embedding_dim=6)),
    "architecture": FamilyConfig(encoder="IdentityEncoder"),
}
IDENTITY = {"summary": FamilyConfig(encoder="IdentityEncoder")}


def columns(paths, families=FAMILIES, budget=BUDGET, progress=None):
    with FeatureSource(paths, {name: helpers.FAMILIES[name] for name in families}) as source:
        encoders = make_encoders(source, families, 42, budget)
        return encode(source, encoders, budget, CPU, progress), encoders


@pytest.fixture
def path(tmp_path):
    return str(helpers.write_dataset(tmp_path / "a.h5", 45, seed=0))


def edited(tmp_path, where, value, **options):
    arrays = helpers.synthetic_arrays(45, seed=0)
    arrays[helpers.SUMMARY][where] = value
    return str(helpers.write_arrays(tmp_path / "b.h5", arrays, **options))


def test_columns_follow_the_order_of_the_families(path):
    out, encoders = columns(path)
    assert out.shape == (45, 8 + 6 + 12)
    assert out.dtype == np.float32
    names = [name for family in encoders for name in family.names]
    assert (names[0], names[8], names[-1]) == (
        "summary::summary_0",
        "temporal::temporal_0",
        "architecture::architecture_11",
    )
    np.testing.assert_array_equal(out[:, 14:], helpers.synthetic_arrays(45, seed=0)[helpers.ARCHITECTURE])


def test_missing_values_count_as_zero(path):
    raw = np.nan_to_num(helpers.synthetic_arrays(45, seed=0)[helpers.SUMMARY])
    out, encoders = columns(path)
    np.testing.assert_allclose(out[:, :8], encoders[0].encoder(torch.from_numpy(raw)).numpy(), rtol=1e-5, atol=1e-6)
    identity, _ = columns(path, IDENTITY)
    np.testing.assert_array_equal(identity, raw)


@pytest.mark.parametrize("rows", [1, 3, 8, 11, 45])
def test_the_size_of_a_block_does_not_matter(path, monkeypatch, rows):
    whole, _ = columns(path)
    monkeypatch.setattr(module, "block_rows", lambda info, budget: rows)
    np.testing.assert_allclose(columns(path)[0], whole, rtol=1e-4, atol=1e-5)


def test_the_budget_does_not_matter(path):
    whole, _ = columns(path)
    np.testing.assert_allclose(columns(path, budget=4000)[0], whole, rtol=1e-4, atol=1e-5)


def test_shards_encode_like_one_file(tmp_path, path):
    helpers.write_shards(tmp_path / "shards", [11, 30, 4], seed=0)
    whole, _ = columns(path)
    np.testing.assert_allclose(columns(str(tmp_path / "shards" / "*.h5"))[0], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [3000, BUDGET])
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_an_infinite_value_is_named(tmp_path, value, budget):
    with helpers.raises_one_line(DataError, "b.h5", helpers.SUMMARY, "row 37", "[5]", "infinite"):
        columns(edited(tmp_path, (37, 5), value), IDENTITY, budget)


@pytest.mark.filterwarnings("error")
def test_an_infinite_value_is_named_when_standardising(tmp_path):
    family = {"summary": FamilyConfig(encoder="IdentityEncoder", standardize=True)}
    with helpers.raises_one_line(DataError, "row 37", "[5]", "infinite"):
        columns(edited(tmp_path, (37, 5), np.inf), family)


def test_an_infinite_value_of_a_shard_names_the_shard(tmp_path):
    shards = helpers.write_shards(tmp_path, [20, 25], seed=0)
    arrays = helpers.synthetic_arrays(25, seed=1)
    arrays[helpers.TEMPORAL][3, 4, 5] = np.inf
    helpers.write_arrays(shards[1], arrays)
    with helpers.raises_one_line(DataError, "shard_1.h5", "row 3", "[4, 5]"):
        columns(str(tmp_path / "*.h5"))


def test_an_overflow_is_named(path):
    _, encoders = columns(path)
    encoders[0].encoder.encoder[0].weight.mul_(1e38)
    raw = torch.zeros(4, 36)
    raw[2] = 1e10
    with helpers.raises_one_line(DataError, "file.h5: row 12", "MLPEncoder", "families.summary.standardize"):
        encoders[0](raw, lambda row: f"file.h5: row {row + 10}")
    with helpers.raises_one_line(DataError, "'summary'", "row 2"):
        encoders[0](raw)


def test_standardising_removes_location_and_scale(tmp_path):
    family = {"summary": FamilyConfig(encoder="IdentityEncoder", standardize=True)}
    raw = helpers.synthetic_arrays(48, seed=0)[helpers.SUMMARY]
    factor = np.linspace(1.0, 1e6, raw.shape[1]).astype(np.float32)
    arrays = {helpers.SUMMARY: np.nan_to_num(raw) * factor}
    plain, _ = columns(str(helpers.write_arrays(tmp_path / "p.h5", {helpers.SUMMARY: np.nan_to_num(raw)})), family)
    scaled, _ = columns(str(helpers.write_arrays(tmp_path / "s.h5", arrays)), family)
    np.testing.assert_allclose(plain, scaled, rtol=1e-3, atol=1e-4)
    assert np.abs(np.median(plain, 0)).max() < 1e-3
    assert np.isfinite(plain).all()


def test_standardised_values_are_bounded(tmp_path):
    family = {"summary": FamilyConfig(encoder="IdentityEncoder", standardize=True)}
    out, _ = columns(edited(tmp_path, (3, 1), 1e30), family)
    assert np.abs(out).max() <= 10.0


def test_standardising_sequences_is_by_channel(path):
    family = {"temporal": FamilyConfig(encoder="IdentityEncoder", standardize=True)}
    _, (encoder,) = columns(path, family)
    assert encoder.center.shape == encoder.scale.shape == (7,)


@pytest.mark.parametrize("budget", [5000, 10**8])
def test_statistics_of_a_small_budget_are_those_of_a_sample(path, budget):
    family = {"temporal": FamilyConfig(encoder="IdentityEncoder", standardize=True)}
    out, _ = columns(path, family, budget)
    assert out.shape == (45, 32 * 7)
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("budget", "chunk_rows", "rows"),
    [
        (4 * 408 * 8, 1, 8),
        (4 * 408 * 8, 3, 6),
        (4 * 408 * 8, 8, 8),
        (4 * 408 * 8, 100, 8),
        (10**9, 8, 512),
        (4 * 408, 8, 1),
    ],
)
def test_blocks_fit_the_budget_in_whole_chunks(budget, chunk_rows, rows):
    info = DatasetInfo("x", 10_000, (100,), chunk_rows)
    assert block_rows(info, budget) == rows
    assert 4 * rows * info.row_bytes <= budget


def test_a_block_of_large_chunks_is_one_chunk():
    assert block_rows(DatasetInfo("x", 10_000, (1,), 1000), 10**9) == 1000


def test_a_budget_below_one_row_names_the_one_that_fits(path):
    with helpers.raises_one_line(ConfigError, "memory_budget 3615", helpers.TEMPORAL, "at least 3616 bytes"):
        columns(path, {"temporal": FAMILIES["temporal"]}, budget=3615)


def test_memory_stays_within_the_budget(path, monkeypatch):
    held, take = [], BatchMemory._unused_block

    def noted(memory):
        block = take(memory)
        held.append(sum(block.nbytes for block in memory._blocks))
        return block

    monkeypatch.setattr(BatchMemory, "_unused_block", noted)
    columns(path, {"temporal": FAMILIES["temporal"]}, budget=20_000)
    assert 0 < max(held) <= 15_000  # and a copy without NaN


def test_progress_reaches_the_end(path):
    seen = []
    columns(path, progress=lambda *step: seen.append(step))
    assert [step for step in seen if step[1] == step[2]] == [(name, 45, 45) for name in FAMILIES]


def test_a_temporal_network_on_a_table_is_an_error(path):
    families = {"summary": FAMILIES["temporal"]}
    with helpers.raises_one_line(DataError, "families.summary", helpers.SUMMARY, "3-D"):
        columns(path, families)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_state_survives_a_checkpoint(tmp_path, path, name, standardize):
    families = {name: FAMILIES[name].model_copy(update={"standardize": standardize})}
    expected, (encoder,) = columns(path, families)
    torch.save(encoder.state(), tmp_path / "state.pt")
    again = FamilyEncoder.from_state(name, torch.load(tmp_path / "state.pt", weights_only=True))
    with FeatureSource(path, {name: helpers.FAMILIES[name]}) as source:
        np.testing.assert_array_equal(encode(source, [again], BUDGET, CPU), expected)
    assert again.names == encoder.names


def test_rows_of_another_shape_are_an_error(path):
    _, encoders = columns(path)
    with helpers.raises_one_line(DataError, "'temporal'", "(32, 7)", "(16, 7)"):
        encoders[1](torch.zeros(2, 16, 7))
