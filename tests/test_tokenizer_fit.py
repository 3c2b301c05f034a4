"""`Tokenizer.fit`, its scikit-learn interface, saving, and loading from a hub."""

from __future__ import annotations

import hashlib
import http.server
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FAMILIES, SUMMARY, planted_matrix, raises_one_line, synthetic_arrays, write_dataset

from spinlock_fast import Tokenizer, Trainer
from spinlock_fast.config.loading import load_config
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.descriptors.describe import Families
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.training.evaluation import evaluate_file

SMALL = {"num_epochs": 2, "batch_size": 64, "device": "cpu", "group_hidden_dim": 16, "group_embedding_dim": 8}
TINY = {**SMALL, "num_epochs": 1, "levels": [{"num_tokens": 3, "latent_dim": 4}]}


@pytest.fixture(scope="module")
def rows() -> np.ndarray[Any, Any]:
    x = 3.0 * planted_matrix(160, [5, 5, 6], seed=0) + 1.0
    x[:, 3] = 7.0  # constant
    x[:, 8] = x[:, 7]
    x[4, 2] = np.nan
    return x


@pytest.fixture(scope="module")
def fitted(rows: np.ndarray[Any, Any]) -> Tokenizer:
    return Tokenizer(settings=SMALL).fit(rows)


def test_every_column_of_a_matrix_comes_back(fitted: Tokenizer, rows: np.ndarray[Any, Any]) -> None:
    tokens = fitted.transform(rows)
    assert tokens.dtype == np.int64
    assert tokens.shape == (160, len(fitted.get_feature_names_out()))
    restored = fitted.inverse_transform(tokens)
    assert restored.shape == rows.shape
    assert np.allclose(restored[:, 3], 7.0)
    known = np.isfinite(rows[:, 0])
    assert np.corrcoef(restored[known, 0], rows[known, 0])[0, 1] > 0.2
    assert "x::x_8" in fitted.feature_names  # a copy of x_7, which cleaning would drop
    assert fitted.score(rows) > 0.1
    as_torch = fitted.inverse_transform(fitted.transform(torch.from_numpy(rows)))
    assert isinstance(as_torch, torch.Tensor)
    assert np.array_equal(as_torch.numpy(), restored)


def test_one_array_in_place_of_families(
    fitted: Tokenizer, rows: np.ndarray[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tokens = fitted.encode(rows)
    assert np.array_equal(fitted.encode(rows.astype(object)), tokens)
    with raises_one_line(DataError, "[N, D]", f"got [{rows.shape[1]}]", ".reshape(1, -1)"):
        fitted.encode(rows[0])
    caplog.clear()
    fitted.encode(np.where(np.arange(len(rows))[:, None] == 3, np.nan, rows))
    assert f"1 of {len(rows)} rows have no value in family x" in caplog.text


def test_families_in_memory_and_in_a_file_give_one_tokenizer(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "data.h5", 160, seed=3)
    arrays = synthetic_arrays(160, seed=3)
    families = {name: arrays[FAMILIES[name]] for name in ("summary", "temporal")}
    in_memory = Tokenizer(settings=SMALL).fit(families)
    from_file = Tokenizer(settings=SMALL).fit(path)  # families: auto
    assert [(f.name, f.encoder_name) for f in from_file.families] == [
        ("summary", "IdentityEncoder"),
        ("temporal", "StatisticsEncoder"),
    ]
    assert np.array_equal(in_memory.encode(families), from_file.encode(path))
    assert np.array_equal(in_memory.encode(path), from_file.encode(families))
    saved = in_memory.save(tmp_path / "checkpoint")
    metrics = evaluate_file(saved, str(path), rows="validation")  # its rows are recognised in the file
    assert metrics["quality"] == pytest.approx(in_memory.metrics["quality"], abs=1e-4)


def test_config_of_a_file_and_settings(tmp_path: Path, rows: np.ndarray[Any, Any]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training: {num_epochs: 3, batch_size: 64}\ndevice: cpu\n")
    base = {"group_hidden_dim": 16, "model__group_embedding_dim": 8}
    first = Tokenizer(path, base).fit(rows)
    second = Tokenizer(load_config(path)).fit(rows, num_epochs=3, **base)
    third = Tokenizer({"training": {"num_epochs": 9, "batch_size": 64}, "device": "cpu"}).fit(
        rows, config=RunConfig(device="cpu"), batch_size=64, **{"training.num_epochs": 3, **base}
    )
    tokens = first.transform(rows)
    assert first.metrics["epochs"] == 3
    assert np.array_equal(second.transform(rows), tokens)
    assert np.array_equal(third.transform(rows), tokens)


def test_saved_tokenizers_are_whole_checkpoints(fitted: Tokenizer, rows: np.ndarray[Any, Any], tmp_path: Path) -> None:
    directory = fitted.save(tmp_path / "a")
    loaded = Tokenizer.from_pretrained(directory)
    assert loaded.checkpoint_hash == fitted.checkpoint_hash != ""
    assert np.array_equal(loaded.transform(rows), fitted.transform(rows))
    tokens = fitted.transform(rows)
    assert np.array_equal(loaded.inverse_transform(tokens), fitted.inverse_transform(tokens))
    assert loaded.metrics["quality"] == fitted.metrics["quality"]
    again = loaded.save(tmp_path / "b")
    for name in ("best_model.pt", "config.yaml", "metrics.json", "README.md", "normalization_stats.npz"):
        assert (again / name).read_bytes() == (directory / name).read_bytes(), name
    fitted.save(directory)
    assert len(list((directory / "previous").iterdir())) == 1


def test_train_result_has_a_tokenizer(tmp_path: Path) -> None:
    x = 3.0 * planted_matrix(160, [5, 5, 6], seed=0) + 1.0
    settings = {"training.num_epochs": 2, "training.batch_size": 64, "device": "cpu"}
    for scale in (1.0, (x - x.mean(0)) / x.std(0) / x):  # to be normalised, and normalised already
        data = (x * scale).astype(np.float32)
        result = Trainer.from_config(RunConfig(), settings).fit(data, feature_names=[f"c{i}" for i in range(16)])
        tokenizer = result.tokenizer
        assert tokenizer.feature_names[:2] == ["c0", "c1"]
        assert (tokenizer.transform(data) == result.encode(data)).mean() > 0.999
        assert np.allclose(tokenizer.decode(result.encode(data)), result.decode(result.encode(data)), atol=1e-4)
        loaded = Tokenizer.from_checkpoint(tokenizer.save(tmp_path / "c"))
        assert np.array_equal(loaded.encode(data), tokenizer.encode(data))


def test_names_of_columns(rows: np.ndarray[Any, Any]) -> None:
    series = np.cumsum(np.ones((60, 9, 3)) * rows[:60, None, :3] / 9, 1)
    families = Families({"temporal": series}, {"temporal": ["a", "b", "c"]})
    tokenizer = Tokenizer(settings=TINY).fit(families)
    assert {name.split("::")[1] for name in tokenizer.feature_names} <= {"a", "b", "c"}
    with raises_one_line(DataError, "2 names for 3 columns"):
        Tokenizer(settings=TINY).fit(Families({"temporal": series}, {"temporal": ["a", "b"]}))


def test_data_frames_keep_their_columns(rows: np.ndarray[Any, Any]) -> None:
    pandas = pytest.importorskip("pandas", reason="data frames")
    frame = pandas.DataFrame(rows, columns=[f"c{i}" for i in range(16)])
    tokenizer = Tokenizer(settings=TINY).fit(frame)
    assert tokenizer.feature_names[0] == "x::c0"
    assert np.array_equal(tokenizer.transform(frame), tokenizer.transform(rows))
    with raises_one_line(DataError, "columns differ", "'c15' instead of 'c0'"):
        tokenizer.transform(frame[frame.columns[::-1]])


@pytest.mark.parametrize(
    ("data", "settings", "kind", "texts"),
    [
        (np.zeros((4, 3)), {}, DataError, ["4 rows", "at least 10"]),
        (np.zeros((40, 3)), {}, DataError, ["constant"]),
        (np.full((40, 3), np.inf), {}, DataError, ["infinite"]),
        (np.zeros(5), {}, DataError, ["[5]", "Reshape"]),
        ([["a", "b"]], {}, DataError, ["numbers"]),
        ([[1.0], [1.0, 2.0]], {}, DataError, ["one length"]),
        (None, {}, DataError, ["[]"]),
        ({}, {}, DataError, ["no families"]),
        ({"a": np.zeros((20, 2)), "b": np.zeros((21, 2))}, {}, DataError, ["a has 20", "b has 21"]),
        ({"a": np.zeros((20, 2, 2, 2))}, {}, DataError, ["'a'", "[20, 2, 2, 2]"]),
        ("missing.h5", {}, DataError, ["missing.h5", "no such file"]),
        (np.ones((40, 3)), {"num_epoch": 3}, ConfigError, ["num_epoch", "did you mean", "num_epochs"]),
        (np.ones((40, 3)), {"num_epochs": "x"}, ConfigError, ["training.num_epochs", "'x'"]),
        (np.ones((40, 3)), {"config": 3}, ConfigError, ["config", "int"]),
        (np.ones((40, 3)), {"config": "missing.yaml"}, ConfigError, ["missing.yaml"]),
        (np.ones((40, 3)), {"y": "run.yaml"}, ConfigError, ["config="]),
        ({"a": np.ones((40, 3))}, {"config": "configs/100k.yaml"}, DataError, ["summary", "but the data a"]),
        ({"a": np.ones((40, 3))}, {"isolated_families": ["b"]}, ConfigError, ["isolated_families", "'b'"]),
    ],
)
def test_bad_input_is_one_line(data: Any, settings: dict[str, Any], kind: type[Exception], texts: list[str]) -> None:
    with raises_one_line(kind, *texts):
        Tokenizer(device="cpu").fit(data, **settings)


def test_a_failed_fit_keeps_the_earlier_one(fitted: Tokenizer, rows: np.ndarray[Any, Any]) -> None:
    before = fitted.transform(rows)
    with pytest.raises(DataError):
        fitted.fit(np.zeros((40, 3)))
    assert np.array_equal(fitted.transform(rows), before)


def test_progress_and_observer(rows: np.ndarray[Any, Any], capfd: pytest.CaptureFixture[str]) -> None:
    epochs: list[int] = []

    class Observer:
        def training_started(self, epochs: int, first_epoch: int, rows: int) -> None: ...

        def epoch_finished(self, record: Any) -> None:
            epochs.append(record.epoch)

        def save(self, state: dict[str, Any]) -> None: ...

    Tokenizer(settings=SMALL, verbose=True, observer=Observer()).fit(rows)
    assert epochs == [1, 2]
    shown = capfd.readouterr()
    assert "epoch 2/2" in shown.err
    assert shown.out == ""
    Tokenizer(settings=SMALL).fit(rows)
    assert "epoch" not in capfd.readouterr().err


@pytest.mark.slow  # a process
def test_importing_the_tokenizer_alone_is_enough(tmp_path: Path) -> None:
    code = (
        "import numpy as np; from spinlock_fast.tokenizer import Tokenizer;"
        "x = np.random.default_rng(0).normal(size=(40, 4));"
        f"print(Tokenizer(settings={TINY}).fit_transform(x).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == "(40, 1)\n", done.stderr
    assert not list(tmp_path.iterdir())


# Checks of scikit-learn that do not apply.
NOT_APPLICABLE = {
    "check_dont_overwrite_parameters": "the trained parts are public attributes without underscore, such as model",
    "check_do_not_raise_errors_in_init_or_set_params": "passes **more as a parameter; unknown names are errors at once",
    "check_dtype_object": "wants TypeError for a dictionary in an array; every error of data is a DataError",
    "check_fit2d_1feature": "has 10 rows, of which 9 are left to train on: fewer than the required 10",
}


@pytest.mark.slow  # about forty fits
@pytest.mark.filterwarnings("ignore:Estimator Tokenizer does not inherit")
def test_scikit_learn_estimator_checks() -> None:
    checks = pytest.importorskip("sklearn.utils.estimator_checks", reason="scikit-learn")
    results = checks.check_estimator(
        Tokenizer(settings=TINY), expected_failed_checks=NOT_APPLICABLE, on_fail=None, on_skip=None
    )
    failed = {f"{r['check_name']}: {r['exception']}" for r in results if r["status"] == "failed"}
    assert not failed
    assert {r["check_name"] for r in results if r["status"] == "xfail"} == NOT_APPLICABLE.keys()
    assert sum(r["status"] == "passed" for r in results) > 35


def test_pipeline_search_clone_and_pickle(rows: np.ndarray[Any, Any]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn")
    from sklearn.base import clone
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    x = np.nan_to_num(rows)
    encoder = OneHotEncoder(handle_unknown="ignore")
    pipeline = make_pipeline(StandardScaler(), Tokenizer(settings=TINY), encoder).fit(x)
    assert pipeline.transform(x).shape[0] == len(x)
    pipeline.set_params(tokenizer__num_epochs=2)
    assert clone(pipeline)["tokenizer"].get_params()["num_epochs"] == 2
    search = GridSearchCV(Tokenizer(settings=TINY), {"num_epochs": [1, 4], "training__topo_weight": [0.0]}, cv=2).fit(x)
    assert search.best_params_["num_epochs"] == 4
    best = pickle.loads(pickle.dumps(search.best_estimator_))
    assert np.array_equal(best.transform(x), search.transform(x))
    with raises_one_line(ConfigError, "num_epoch", "num_epochs"):
        Tokenizer().set_params(num_epoch=2)


def test_an_unfitted_tokenizer_says_so(rows: np.ndarray[Any, Any], tmp_path: Path) -> None:
    unfitted = Tokenizer()
    for use in (unfitted.transform, unfitted.encode, unfitted.score, unfitted.decode):
        with pytest.raises(ValueError, match="not fitted"):
            use(rows)
    with pytest.raises(ValueError, match="not fitted"):
        unfitted.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


class _Hub(http.server.BaseHTTPRequestHandler):
    """The requests of `huggingface_hub.snapshot_download` for one repository, o/r."""

    directory: Path
    commit = "a" * 40

    def do_HEAD(self) -> None:
        self._reply(body=False)

    def do_GET(self) -> None:
        self._reply(body=True)

    def _reply(self, body: bool) -> None:
        file = self.directory / self.path.rpartition("/")[2]
        if self.path.startswith("/api/models/o/r/"):
            files = [
                {
                    "type": "file",
                    "oid": "b" * 40,
                    "size": path.stat().st_size,
                    "path": path.name,
                    "rfilename": path.name,
                }
                for path in self.directory.iterdir()
            ]
            listing: Any = files if "/tree/" in self.path else {"id": "o/r", "sha": self.commit, "siblings": files}
            data = json.dumps(listing).encode()
        elif self.path.startswith("/o/r/") and file.is_file():
            data = file.read_bytes()
        else:
            self.send_response(404)
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def hub(fitted: Tokenizer, tmp_path: Path) -> Iterator[str]:
    handler = type("Hub", (_Hub,), {"directory": fitted.save(tmp_path / "repository")})
    (tmp_path / "repository" / "evil.py").write_text("raise SystemExit\n")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.filterwarnings("ignore")  # of huggingface_hub
def test_from_pretrained_downloads_a_checkpoint(
    hub: str, fitted: Tokenizer, rows: np.ndarray[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants", reason="the extra hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # which other tests set in this process
    cache = tmp_path / "cache"
    loaded = Tokenizer.from_pretrained("o/r", endpoint=hub, cache_dir=cache)
    assert np.array_equal(loaded.transform(rows), fitted.transform(rows))
    assert not list(cache.rglob("evil.py"))
    offline = Tokenizer.from_pretrained("o/r", endpoint="http://127.0.0.1:1", cache_dir=cache, local_files_only=True)
    assert offline.checkpoint_hash == loaded.checkpoint_hash
    with raises_one_line(DataError, "o/none", "Hugging Face Hub"):
        Tokenizer.from_pretrained("o/none", endpoint=hub, cache_dir=cache)
    monkeypatch.chdir(tmp_path)
    fitted.save(tmp_path / "o" / "r")  # a local directory comes first
    assert Tokenizer.from_pretrained("o/r", endpoint="http://127.0.0.1:1").checkpoint_hash == loaded.checkpoint_hash


@pytest.mark.parametrize("name", ["missing", "/tmp/missing/checkpoint", "../a/b", "a b/c", "x\ny/z"])
def test_from_pretrained_of_no_directory_and_no_repository(name: str) -> None:
    with raises_one_line(DataError, "no such directory"):
        Tokenizer.from_pretrained(name)


def test_families_of_a_file_are_written_into_the_checkpoint(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "data.h5", 160, seed=3)
    saved = Tokenizer(settings=SMALL).fit([str(path)], config={"families": {"summary": {}}}).save(tmp_path / "c")
    family = load_config(saved / "config.yaml").families["summary"]
    assert (family.encoder, family.dataset) == ("IdentityEncoder", SUMMARY)
