"""Randomly damaged data files in the loader, `train` and `tokenize`: a result or a one-line error, no crash."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from helpers import planted_matrix, write_arrays
from processes import forkserver

MANY, SOME = 500, 12
SETTINGS = {
    "device": "cpu",
    "families": {"mine": {"encoder": "IdentityEncoder", "dataset": "x"}},
    "training": {"batch_size": 64, "topo_samples": 32, "num_epochs": 1, "orthogonality_target": 10.0},
    "logging": {"tensorboard": False},
}


def damaged(whole: bytes, seed: int) -> bytes:
    """The file with changed bytes, a zeroed or copied block, or a missing end."""
    draw = random.Random(seed)
    data = bytearray(whole)
    kind = draw.choice(["bytes", "zeros", "repeat", "cut", "header"])
    if kind == "cut":
        return bytes(data[: draw.randrange(1, len(data))])
    if kind in ("bytes", "header"):
        end = len(data) if kind == "bytes" else min(len(data), 4096)
        for _ in range(draw.choice([1, 3, 20])):
            data[draw.randrange(end)] = draw.randrange(256)
        return bytes(data)
    size = draw.choice([4, 64, 1024])
    at, source = (draw.randrange(max(1, len(data) - size)) for _ in range(2))
    data[at : at + size] = bytes(size) if kind == "zeros" else data[source : source + size]
    return bytes(data)


def work(folder: Path, first: int, last: int) -> None:
    """Runs all actions on the files of a range of seeds; `last_seed` holds the current one, in case of a crash."""
    from spinlock_fast.commands.tokenize import write_tokens
    from spinlock_fast.config.schema import RunConfig
    from spinlock_fast.data import HDF5Loader
    from spinlock_fast.errors import SpinlockFastError
    from spinlock_fast.tokenizer import Tokenizer
    from spinlock_fast.training.observer import Display
    from spinlock_fast.training.run import run

    class Silent:
        def __getattr__(self, name: str) -> object:
            return lambda *arguments, **settings: None

    display: Display = Silent()  # type: ignore[assignment]
    tokenizer = Tokenizer.from_checkpoint(folder / "checkpoint")
    whole, place, output = (folder / "x.h5").read_bytes(), folder / "damaged.h5", folder / "tokens.h5"
    config = RunConfig.model_validate({**SETTINGS, "dataset_path": str(place), "output_dir": str(folder / "out")})
    actions = {
        "loader": lambda: sum(len(batch["x"]) for batch in HDF5Loader(str(place), ["x"], batch_size=32, seed=1)),
        "train": lambda: run(config, display),
        "tokenize": lambda: write_tokens(tokenizer, str(place), output, 1 << 26),
    }
    found = dict.fromkeys(actions, 0)
    for seed in range(first, last):
        (folder / "last_seed").write_text(str(seed))
        place.unlink(missing_ok=True)
        place.write_bytes(damaged(whole, seed))
        for name, action in actions.items():
            try:
                action()
            except SpinlockFastError as error:
                if "\n" in str(error) or len(str(error)) > 2000:
                    raise AssertionError(f"seed {seed}, {name}: not one line") from error
                found[name] += 1
    (folder / "found.json").write_text(json.dumps(found))


@pytest.mark.parametrize("count", [SOME, pytest.param(MANY, marks=pytest.mark.slow)])
def test_damaged_files_give_a_result_or_a_one_line_error(count: int, tmp_path: Path) -> None:
    from spinlock_fast.commands.console import RunDisplay
    from spinlock_fast.config.schema import RunConfig
    from spinlock_fast.training.run import run

    write_arrays(tmp_path / "x.h5", {"x": planted_matrix(300, [6, 6], seed=5)}, compression="gzip", chunk_rows=16)
    settings = {**SETTINGS, "dataset_path": str(tmp_path / "x.h5"), "output_dir": str(tmp_path / "checkpoint")}
    config = RunConfig.model_validate(settings)
    with RunDisplay(True, config.logging) as display:
        run(config, display)
    process = forkserver().Process(target=work, args=(tmp_path, 0, count))
    process.start()
    process.join(3000.0)
    process.kill()
    process.join()
    seed = (tmp_path / "last_seed").read_text() if (tmp_path / "last_seed").exists() else "none"
    assert process.exitcode == 0, f"seed {seed}: exit status {process.exitcode}"
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(0 < refused < count for refused in found.values()), found
