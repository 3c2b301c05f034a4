"""The fused Adam, against torch's."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from spinlock_fast.optimizer import FusedAdam


@pytest.mark.parametrize(("decoupled", "decay"), [(False, 0.0), (False, 0.1), (True, 0.1)])
def test_it_moves_weights_exactly_as_torch_does(decoupled: bool, decay: float) -> None:
    ours = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    theirs = copy.deepcopy(ours)
    rate = torch.zeros(1, dtype=torch.float64)
    adam = FusedAdam(ours.parameters(), rate, decay, decoupled)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = kind(theirs.parameters(), lr=0.0, weight_decay=decay, fused=True)
    for step in range(1, 6):
        x = torch.randn(11, 7)
        rate.fill_(0.1 / step)
        reference.param_groups[0]["lr"] = 0.1 / step
        for model, stepper in ((ours, adam), (theirs, reference)):
            stepper.zero_grad()
            model(x).square().mean().backward()
            stepper.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    copied = kind(theirs.parameters(), lr=0.0, fused=True)
    state = copy.deepcopy(adam.state_dict())
    state["param_groups"][0] |= {key: copied.param_groups[0][key] for key in copied.defaults}
    copied.load_state_dict(state)  # torch's reads our state
    for i, p in enumerate(theirs.parameters()):
        torch.testing.assert_close(copied.state[p]["exp_avg"], adam.mean[i], rtol=0, atol=0)
        assert int(copied.state[p]["step"]) == 5
    adam.load_state_dict(reference.state_dict())  # ours reads torch's


def test_a_parameter_without_gradient_stays() -> None:
    used, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    adam = FusedAdam([idle, used], torch.full((1,), 0.1, dtype=torch.float64), weight_decay=0.5)
    used.sum().backward()
    adam.step()
    assert torch.equal(idle, torch.ones(3))
    assert (used < 1).all()


def shapes_of_the_model() -> list[tuple[int, ...]]:
    """Of the parameters of 172 features in 11 categories."""
    return [
        (172, 512), (11, 512), (11, 512, 256), (11, 256), (11, 256), (11, 256), (564, 256), (564,), (564,), (564,),
        (256, 564), (256,), (172, 256), (172,), (564, 128), (33, 128), (33, 128, 172), (33, 172),
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_holds_the_launch() -> None:
    ours, theirs = ([nn.Parameter(torch.ones(shape, device="cuda")) for shape in shapes_of_the_model()] for _ in "ab")
    captured, plain = (FusedAdam(parameters, torch.full((1,), 0.1, device="cuda")) for parameters in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        captured.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            captured.step()
        graph.replay()
        graph.replay()
        torch.cuda.synchronize()
    for _ in range(3):
        plain.step()
    assert int(captured.count) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_training_does_not_import_the_compiler() -> None:
    """It takes more than a second, of a run of ten."""
    code = """
import sys, numpy, logging
from spinlock_fast.config import RunConfig
from spinlock_fast.trainer import Trainer
x = numpy.random.default_rng(0).normal(size=(60, 4)).astype("f4")
Trainer.from_config(RunConfig(), {"device": "cpu", "training.num_epochs": 2}).fit(x, {"a": [0, 1, 2, 3]})
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
