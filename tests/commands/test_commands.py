import signal
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from spinlock_fast import __version__
from spinlock_fast.commands.console import print_summary
from spinlock_fast.commands.main import VERBS, command_of, main

CONFIGS = Path(__file__).parents[2] / "configs"
ARGUMENTS = {
    "generate": ["--output", "x.h5"],
    "extract": ["fields.npy", "--axes", "n t x", "--output", "features.h5"],
    "train": ["run.yaml"],
    "evaluate": ["ckpt", "x.h5"],
    "ablate": ["run.yaml", "--output", "variants"],
    "predict": ["apply", "ckpt", "data.h5", "--output", "tokens.h5"],
    "search": ["ckpt", "tokens.h5", "--like", "0"],
    "tokenize": ["ckpt", "x.h5", "--output", "tokens.h5"],
    "analyze": ["ckpt", "x.h5", "--output", "tables"],
    "convert": ["ckpt", "--output", "converted"],
    "report": ["ckpt", "--output", "pictures"],
}
OF_RANKS = {
    "train",
    "generate",
    "extract",
    "evaluate",
    "tokenize",
    "monitor",
    "analyze",
}  # tested in test_ranks.py of their folders


@pytest.fixture(autouse=True)
def _sigterm_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in OF_RANKS])
def test_a_command_started_by_torchrun_is_refused(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        command_of(verb)(ARGUMENTS[verb])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: WORLD_SIZE is 2")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"spinlock-fast {__version__}\n"


@pytest.mark.parametrize(
    ("verb", "hint"), [("trian", "did you mean train?"), ("xyzzy", "choose from generate, extract, train")]
)
def test_unknown_verb_suggests_the_nearest(verb, hint, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "run.yaml"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: unknown verb '{verb}'; {hint}")
    assert error.count("\n") == 1


def test_help_describes_every_verb(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {verb}" in text and description in text for verb, description in VERBS.items())


@pytest.mark.parametrize("size", ["10k", "100k"])
def test_missing_published_data_set_names_the_ways_to_get_it(size, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command_of("train")([str(CONFIGS / f"{size}.yaml")])
    assert ended.value.code == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: datasets/")
    for advice in (
        "--set dataset_path=",
        "make train",
        f"generate --config configs/data/{size}.yaml --output datasets/",
    ):
        assert advice in error


def test_every_wrong_setting_has_its_line_on_stderr(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("training: {num_epochs: 0, optimizer: sgd}\ndecay: 0.9\n")
    with pytest.raises(SystemExit) as ended:
        command_of("train")([str(tmp_path / "run.yaml")])
    assert ended.value.code == 2
    decay, epochs, optimizer = capsys.readouterr().err.splitlines()
    assert decay.startswith("error: ")
    assert "decay: unknown key; did you mean 'model.decay'?" in decay
    assert "training.num_epochs" in epochs
    assert "'adam' or 'adamw'" in optimizer


def test_summary_shows_the_error_from_all_codebooks():
    category = {"name": "cluster_1", "features": 3, "purity": 1.0, "mse": 0.125, "partial_mse": 0.5}
    category |= {"utilization": [1.0, 0.5], "codes": [4, 2], "families": {"summary": 3}}
    names = ("quality", "reconstruction_error", "utilization", "perplexity_over_k", "topo_pre", "topo_post", "val_loss")
    counts = {"active_codes": 5, "total_codes": 6, "val_rows": 10}
    console = Console(record=True, width=100, file=StringIO())
    print_summary({**dict.fromkeys(names, 0.25), **counts, "categories": [category]}, console)
    (row,) = [line for line in console.export_text().splitlines() if line.startswith("cluster_1")]
    assert row.split() == ["cluster_1", "3", "SUM", "3", "100%", "0.1250", "1.00", "0.50", "4", "2"]
