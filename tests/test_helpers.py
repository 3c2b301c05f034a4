import h5py
import helpers
import numpy as np
import pytest
import torch

from spinlock_fast.kernels._common.layout import CodebookLayout


def test_a_data_set_has_the_schema_of_the_specification(tmp_path):
    path = helpers.write_dataset(tmp_path / "a.h5", 20, seed=0, summary_width=24, temporal_shape=(16, 5))
    with h5py.File(path) as file:
        assert file[helpers.SUMMARY].shape == (20, 24)
        assert file[helpers.TEMPORAL].shape == (20, 16, 5)
        assert file[helpers.TRAJECTORIES].shape[0] == file[helpers.ARCHITECTURE].shape[0] == 20
        assert file[helpers.SUMMARY].chunks == (8, 24)
        assert file[helpers.FIELDS].chunks[0] == 1
        assert file[helpers.SUMMARY].compression == "gzip"
        assert file["metadata/ic_types"].asstr()[0] in ("gaussian", "grf", "waves")
        architecture = file[helpers.ARCHITECTURE][:]
    assert architecture.min() >= 0.0
    assert architecture.max() <= 1.0


def test_nan_columns_and_isolated_nan():
    summary = helpers.synthetic_arrays(200, seed=0)[helpers.SUMMARY]
    missing = np.isnan(summary)
    assert missing.all(axis=0).sum() == 3
    assert 0 < missing[:, 1:12].mean() < 0.05
    assert not np.isnan(helpers.synthetic_arrays(50, seed=0, nan=False)[helpers.SUMMARY]).any()


def test_same_seed_same_data_set():
    a, b = (helpers.synthetic_arrays(10, seed=3) for _ in range(2))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize(("structure", "low", "high"), [(True, 0.8, 1.0), (False, 0.0, 0.3)])
def test_columns_of_a_group_go_together(structure, low, high):
    summary = helpers.synthetic_arrays(400, seed=0, nan=False, structure=structure, groups=6)[helpers.SUMMARY]
    assert low <= abs(np.corrcoef(summary[:, 1], summary[:, 7])[0, 1]) <= high


def test_datasets_can_be_left_out_and_stored_contiguously(tmp_path):
    path = helpers.write_dataset(
        tmp_path / "a.h5", 4, seed=0, chunk_rows=None, omit=[helpers.TEMPORAL, "metadata"], compression=None
    )
    with h5py.File(path) as file:
        assert helpers.TEMPORAL not in file
        assert "metadata/ic_types" not in file
        assert file[helpers.SUMMARY].chunks is None


def test_shards_hold_the_rows_of_one_file(tmp_path):
    whole = helpers.synthetic_arrays(12, seed=5)[helpers.SUMMARY]
    shards = helpers.write_shards(tmp_path, [5, 7], seed=5, chunk_rows=4)
    parts = []
    for shard in shards:
        with h5py.File(shard) as file:
            parts.append(file[helpers.SUMMARY][:])
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_planted_groups_are_correlated_within_and_not_between():
    strength = np.abs(np.corrcoef(helpers.planted_matrix(500, [3, 4], seed=0), rowvar=False))
    assert strength[:3, :3].min() > 0.8
    assert strength[:3, 3:].max() < 0.2


def test_assert_nearest_refuses_a_code_that_is_not():
    layout = CodebookLayout.of([3], [2])
    codebook = torch.tensor([0.0, 0.0, 1.0, 0.0, 5.0, 0.0])
    z = torch.tensor([[0.9, 0.0]])
    helpers.assert_nearest(torch.tensor([[1]]), z, codebook, layout)
    with pytest.raises(AssertionError):
        helpers.assert_nearest(torch.tensor([[0]]), z, codebook, layout)


@pytest.mark.parametrize("message", ["two\nlines", "another"])
def test_raises_one_line_refuses_other_messages(message):
    with pytest.raises(AssertionError), helpers.raises_one_line(ValueError, "text"):
        raise ValueError(message)


def test_raises_one_line_refuses_subclasses_and_silence():
    with pytest.raises(AssertionError), helpers.raises_one_line(ValueError):
        raise UnicodeError
    with pytest.raises(pytest.fail.Exception), helpers.raises_one_line(ValueError):
        pass
