import os

import h5py
import helpers
import numpy as np
import pytest
import torch

from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.data.input_files import find_files
from spinlock_fast.errors import DataError

PATH = "features/x"


def write(path, values, name=PATH, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "a") as file:
        file.create_dataset(name, data=values, **options)
    return str(path)


def dataset(rows=6, width=3, dtype=np.float32, start=0):
    return np.arange(start, start + rows * width).reshape(rows, width).astype(dtype)


def open_family(paths, path=PATH):
    return FeatureSource(paths, {"family": path})


def fails(paths, *texts, path=PATH):
    with helpers.raises_one_line(DataError, *texts):
        open_family(paths, path)


def test_dataset_info_has_shape_and_chunks(tmp_path):
    file = str(helpers.write_dataset(tmp_path / "a.h5", 20, seed=0, chunk_rows=4))
    with FeatureSource(file, helpers.FAMILIES) as source:
        assert source.rows == 20
        temporal = source.datasets["temporal"]
        assert (temporal.path, temporal.rows, temporal.row_shape) == (helpers.TEMPORAL, 20, (32, 7))
        assert temporal.chunk_rows == 4
        assert temporal.row_bytes == 4 * 32 * 7


def test_contiguous_data_have_one_row_per_chunk(tmp_path):
    with open_family(write(tmp_path / "a.h5", dataset())) as source:
        assert source.datasets["family"].chunk_rows == 1


@pytest.mark.parametrize(
    "options", [{}, {"chunks": (4, 2), "compression": "gzip", "shuffle": True, "fletcher32": True}]
)
@pytest.mark.parametrize(("start", "stop"), [(0, 6), (0, 1), (2, 5), (5, 6), (3, 3)])
def test_read_returns_rows_of_a_file(tmp_path, options, start, stop):
    with open_family(write(tmp_path / "a.h5", dataset(), **options)) as source:
        np.testing.assert_array_equal(source.read("family", start, stop), dataset()[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(0, 15), (4, 6), (5, 6), (3, 14), (14, 15), (5, 5)])
def test_read_spans_shards(tmp_path, start, stop):
    whole = dataset(15)
    for i, rows in enumerate(np.split(whole, [5, 6])):
        write(tmp_path / f"shard_{i}.h5", rows)
    with open_family(str(tmp_path / "*.h5")) as source:
        assert source.rows == 15
        np.testing.assert_array_equal(source.read("family", start, stop), whole[start:stop])


def test_empty_shard_is_skipped(tmp_path):
    for i, rows in enumerate([dataset(3), dataset(0), dataset(2, start=9)]):
        write(tmp_path / f"shard_{i}.h5", rows)
    with open_family(str(tmp_path / "*.h5")) as source:
        np.testing.assert_array_equal(source.read("family", 0, 5), dataset(5))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8", "i1", "u1", "<i2", ">i4", "i8", "u8"])
def test_all_number_types_become_float32(tmp_path, dtype):
    with open_family(write(tmp_path / "a.h5", dataset(dtype=dtype))) as source:
        found = source.read("family", 0, 6)
    assert found.dtype == np.dtype("=f4")
    np.testing.assert_array_equal(found, dataset())


def test_values_beyond_float32_are_errors(tmp_path):
    """Finite values that overflow float32 are errors; infinite values are preserved."""
    values = dataset(dtype=np.float64)
    values[4, 1], values[0, 0] = -1e300, np.inf
    with open_family(write(tmp_path / "a.h5", values)) as source:
        assert source.read("family", 0, 4)[0, 0] == np.inf
        with helpers.raises_one_line(
            DataError, "a.h5", PATH, "row 4", "position [1]", "-1e+300", "does not fit float32"
        ):
            source.read("family", 2, 6)
        with helpers.raises_one_line(DataError, "row 4", "position [1]", "-1e+300", "does not fit float32"):
            list(source.batches(["family"], 2, 10**6, torch.device("cpu")))


def test_nan_is_preserved(tmp_path):
    values = dataset()
    values[2, 1] = np.nan
    with open_family(write(tmp_path / "a.h5", values)) as source:
        np.testing.assert_array_equal(source.read("family", 0, 6), values)


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (6, 8), (-1, 3), (4, 2)])
def test_rows_out_of_range_are_errors(tmp_path, start, stop):
    with open_family(write(tmp_path / "a.h5", dataset())) as source, pytest.raises((IndexError, ValueError, DataError)):
        source.read("family", start, stop)


def test_glob_is_in_natural_order(tmp_path):
    for i in (10, 9, 100, 1):
        write(tmp_path / f"shard_{i}.h5", dataset())
    found = [file.name for file in find_files(str(tmp_path / "shard_*.h5"))]
    assert found == [f"shard_{i}.h5" for i in (1, 9, 10, 100)]


def test_list_of_files_keeps_its_order(tmp_path):
    names = [write(tmp_path / name, dataset()) for name in ("b.h5", "a.h5", "part_2.h5", "part_10.h5")]
    assert [str(file) for file in find_files([names[0], names[1], str(tmp_path / "part_*.h5")])] == names


def test_existing_file_with_glob_characters_is_opened(tmp_path):
    assert find_files(write(tmp_path / "run[1].h5", dataset()))[0].name == "run[1].h5"


def test_files_are_closed_after_reading(tmp_path):
    with open_family(write(tmp_path / "a.h5", dataset())) as source:
        batches = source.batches(["family"], 2, 10**6, torch.device("cpu"))
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        assert PATH in file
    source.close()


def test_files_are_closed_after_an_error(tmp_path):
    write(tmp_path / "a.h5", dataset(dtype="S3"))
    fails(str(tmp_path / "a.h5"))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        assert PATH in file


@pytest.mark.parametrize("on_group", [False, True])
def test_feature_names_are_read(tmp_path, on_group):
    file = write(tmp_path / "a.h5", dataset())
    with h5py.File(file, "a") as handle:
        node = handle["features"] if on_group else handle[PATH]
        node.attrs["feature_names"] = ["a", "b", "ü"]
    with open_family(file) as source:
        assert source.feature_names("family") == ["a", "b", "ü"]


@pytest.mark.parametrize(
    ("names", "message"),
    [(None, ""), (["a", "b"], "is ignored: it has shape [2], expected [3]"), ("a,b,c", "is ignored: it has one value")],
)
def test_feature_names_of_wrong_shape_are_ignored(tmp_path, names, message, caplog):
    file = write(tmp_path / "a.h5", dataset())
    if names:
        with h5py.File(file, "a") as handle:
            handle[PATH].attrs["feature_names"] = names
    with open_family(file) as source:
        assert source.feature_names("family") is None
        assert source.feature_names("family") is None
    assert [message in record.getMessage() for record in caplog.records] == [True] * bool(names)


def test_shards_with_other_names_are_refused(tmp_path):
    for i, names in enumerate((["a", "b", "c"], None, ["a", "c", "b"])):
        with h5py.File(write(tmp_path / f"{i}.h5", dataset()), "a") as handle:
            if names:
                handle[PATH].attrs["feature_names"] = names
    with open_family([str(tmp_path / f"{i}.h5") for i in range(2)]) as source:
        assert source.feature_names("family") == ["a", "b", "c"]
    with (
        open_family(str(tmp_path / "*.h5")) as source,
        helpers.raises_one_line(DataError, "2.h5", PATH, "0.h5", "'c' instead of 'b'"),
    ):
        source.feature_names("family")


def test_feature_names_that_repeat_are_reported(tmp_path, caplog):
    file = write(tmp_path / "a.h5", dataset())
    with h5py.File(file, "a") as handle:
        handle[PATH].attrs["feature_names"] = ["a", "b", "a"]
    with open_family(file) as source:
        assert source.feature_names("family") == ["a", "b", "a"]
    assert "feature_names repeats names" in caplog.text


def test_missing_file_is_an_error(tmp_path):
    fails(str(tmp_path / "none.h5"), "none.h5", "no such file")


def test_file_below_a_regular_file_is_an_error(tmp_path):
    (tmp_path / "a").write_text("x")
    fails(str(tmp_path / "a" / "b.h5"), "b.h5")


def test_directory_is_an_error(tmp_path):
    fails(str(tmp_path), str(tmp_path), "directory", "*.h5")


def test_glob_without_matches_is_an_error(tmp_path):
    fails(str(tmp_path / "*.h5"), "*.h5", "no file matches")


def test_glob_that_matches_a_directory_is_an_error(tmp_path):
    (tmp_path / "a.h5").mkdir()
    fails(str(tmp_path / "*.h5"), "a.h5", "directory")


def test_empty_list_is_an_error():
    fails([], "dataset_path")


@pytest.mark.parametrize("content", [b"", b"\x89HDF", b"some text, and more of it\n" * 99])
def test_other_file_type_is_an_error(tmp_path, content):
    (tmp_path / "a.h5").write_bytes(content)
    fails(str(tmp_path / "a.h5"), "a.h5", "not an HDF5 file")


@pytest.mark.parametrize(
    ("name", "advice"),
    [("a.npy", "`extract` reads fields"), ("a.NPZ", "np.save"), ("a.pt", "--axes"), ("a.csv", "Tokenizer.fit")],
)
def test_other_format_says_what_reads_it(tmp_path, name, advice):
    (tmp_path / name).write_bytes(b"some text")
    fails(str(tmp_path / name), name, "not an HDF5 file; ", advice)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_file_is_an_error(tmp_path, share):
    path = helpers.write_dataset(tmp_path / "a.h5", 50, seed=0)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    fails(str(path), "a.h5", "truncated")


@pytest.mark.parametrize(("path", "hint"), [("features/y", "nearest is features/x"), ("zzz", "it holds features/x")])
def test_missing_dataset_names_the_nearest(tmp_path, path, hint):
    fails(write(tmp_path / "a.h5", dataset()), "a.h5", path, hint, path=path)


def test_missing_dataset_of_an_empty_file_is_an_error(tmp_path):
    h5py.File(tmp_path / "a.h5", "w").close()
    fails(str(tmp_path / "a.h5"), "no dataset features/x", "it holds no dataset")


def test_dataset_missing_in_one_shard_is_an_error(tmp_path):
    write(tmp_path / "shard_0.h5", dataset())
    write(tmp_path / "shard_1.h5", dataset(), name="other")
    fails(str(tmp_path / "*.h5"), "shard_1.h5", PATH)


def test_dangling_link_is_an_error(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["link"] = h5py.ExternalLink("nowhere.h5", "/x")
    fails(str(tmp_path / "a.h5"), "link", path="link")


@pytest.mark.parametrize("path", ["features", "/"])
def test_group_instead_of_a_dataset_is_an_error(tmp_path, path):
    fails(write(tmp_path / "a.h5", dataset()), "a.h5", path, "group", path=path)


def test_empty_dataset_path_is_an_error(tmp_path):
    fails(write(tmp_path / "a.h5", dataset()), "a.h5", path="")


@pytest.mark.parametrize(
    "values",
    [
        np.array([["a", "b"]], dtype="S1"),
        np.array([["a", "b"]], dtype=h5py.string_dtype()),
        np.zeros((2, 2), np.complex64),
        np.zeros((2, 2), [("x", "f4"), ("y", "f4")]),
    ],
    ids=["bytes", "text", "complex", "compound"],
)
def test_non_numeric_values_are_errors(tmp_path, values):
    fails(write(tmp_path / "a.h5", values), "a.h5", PATH, "expected numbers")


@pytest.mark.parametrize("shape", [(5,), (), (2, 2, 2, 2)])
def test_wrong_number_of_dimensions_is_an_error(tmp_path, shape):
    fails(write(tmp_path / "a.h5", np.zeros(shape, np.float32)), "a.h5", PATH, "'family'", str(shape))


def test_null_dataset_is_an_error(tmp_path):
    fails(write(tmp_path / "a.h5", h5py.Empty("f4")), "a.h5", PATH)


def test_dataset_without_columns_is_an_error(tmp_path):
    fails(write(tmp_path / "a.h5", np.zeros((4, 0), np.float32)), "a.h5", PATH, "no columns")


def test_dataset_without_rows_is_an_error(tmp_path):
    fails(write(tmp_path / "a.h5", np.zeros((0, 4), np.float32)), "a.h5", PATH, "no rows")


def test_families_of_different_length_are_errors(tmp_path):
    write(tmp_path / "a.h5", dataset(6))
    write(tmp_path / "a.h5", dataset(5), name="y")
    with helpers.raises_one_line(DataError, "a.h5", f"{PATH} has 6", "y has 5"):
        FeatureSource(str(tmp_path / "a.h5"), {"a": PATH, "b": "y"})


def test_families_of_different_length_in_one_shard_are_errors(tmp_path):
    """The total numbers of rows agree, those of the shards do not."""
    for shard, (a, b) in enumerate([(6, 5), (5, 6)]):
        write(tmp_path / f"shard_{shard}.h5", dataset(a))
        write(tmp_path / f"shard_{shard}.h5", dataset(b), name="y")
    with helpers.raises_one_line(DataError, "shard_0.h5", f"{PATH} has 6", "y has 5"):
        FeatureSource(str(tmp_path / "*.h5"), {"a": PATH, "b": "y"})


def test_shards_of_different_width_are_errors(tmp_path):
    write(tmp_path / "shard_0.h5", dataset(width=3))
    write(tmp_path / "shard_1.h5", dataset(width=4))
    fails(str(tmp_path / "*.h5"), "shard_1.h5", PATH, "(4,)", "(3,)", "shard_0.h5")


@pytest.mark.parametrize("filters", [{"compression": "gzip"}, {"fletcher32": True}])
def test_damaged_chunk_names_file_dataset_and_rows(tmp_path, filters):
    values = np.random.default_rng(0).standard_normal((8, 50)).astype(np.float32)
    file = write(tmp_path / "a.h5", values, chunks=(4, 50), **filters)
    with h5py.File(file) as handle:
        chunk = handle[PATH].id.get_chunk_info(1)
    with open(file, "r+b") as raw:
        raw.seek(chunk.byte_offset + chunk.size // 2)
        raw.write(b"\xa5" * 20)
    with open_family(file) as source:
        np.testing.assert_array_equal(source.read("family", 0, 4), values[:4])
        with helpers.raises_one_line(DataError, "a.h5", PATH, "chunk [4, 0] (rows 4..7) at byte", "damaged"):
            source.read("family", 3, 7)


def test_file_listed_twice_is_an_error(tmp_path):
    write(tmp_path / "a.h5", dataset())
    with helpers.raises_one_line(DataError, "a.h5", "twice"):
        find_files([str(tmp_path / "a.h5"), str(tmp_path / "*.h5")])


def test_file_changed_between_two_reads_is_an_error(tmp_path):
    file = write(tmp_path / "a.h5", dataset())
    with open_family(file) as source:
        os.utime(file, ns=(1, 1))
        with helpers.raises_one_line(DataError, "a.h5", "has changed"):
            next(source.batches(["family"], 2, 10**6, torch.device("cpu")))
