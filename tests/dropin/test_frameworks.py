"""Quantizers in accelerate and Lightning: 20 steps of two processes are those of one, checkpoints resume."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from autoencoder import KINDS, assert_same, batch, make, state_of, train

pytestmark = [pytest.mark.dist, pytest.mark.slow]
HERE = Path(__file__).parent


def run(*command):
    paths = (str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]


def assert_trained(directory, steps_per_epoch):
    files = sorted(directory.glob("*.pt"))
    assert len(files) == 8
    for file in files:
        if file.stem in KINDS:
            module = make(file.stem)
            train(module, [batch(step % steps_per_epoch) for step in range(20)])
            assert_same(torch.load(file, weights_only=True), state_of(module), file.stem)


def test_accelerate(tmp_path):
    pytest.importorskip("accelerate", reason="needs the extra `distributed-test`")
    options = ("--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")
    run("-m", "accelerate.commands.launch", *options, str(HERE / "with_accelerate.py"), str(tmp_path))
    assert_trained(tmp_path, 20)


@pytest.mark.parametrize("strategy", ["ddp"])
def test_lightning(tmp_path, strategy):
    pytest.importorskip("lightning", reason="needs the extra `distributed-test`")
    run(str(HERE / "with_lightning.py"), strategy, str(tmp_path))
    assert_trained(tmp_path, 10)
