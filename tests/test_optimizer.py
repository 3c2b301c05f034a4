"""The fused Adam, against torch's."""

from __future__ import annotations

import copy
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from spinlock_fast import optimizer
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


def test_pieces_cover_every_tensor_once_and_fit_one_launch() -> None:
    tensors = [torch.arange(float(torch.Size(shape).numel())).view(shape) for shape in shapes_of_the_model()]
    tensors.append(torch.arange(30_000.0).view(150, 200).t())  # no view in one row
    one, other = optimizer._in_pieces([tensors, [t.clone() for t in tensors]])
    assert [piece.shape for piece in one] == [piece.shape for piece in other]
    assert 150 < len(one) <= 252
    largest = max(piece.numel() for piece in one[:-1])
    assert largest % 2048 == 0
    assert all(piece.data_ptr() % 16 == 0 for piece in one)
    assert torch.equal(torch.cat([t.flatten() for t in one]), torch.cat([t.flatten() for t in tensors]))
    for piece in one:
        piece.fill_(-1.0)
    assert all((tensor == -1.0).all() for tensor in tensors)


@pytest.mark.parametrize("sizes", [(1,), (2048, 3), (600_000,)])
def test_few_parameters_make_few_pieces(sizes: tuple[int, ...]) -> None:
    (pieces,) = optimizer._in_pieces([[torch.zeros(n) for n in sizes]])
    assert sum(piece.numel() for piece in pieces) == sum(sizes)
    assert all(piece.numel() >= 2048 for piece in pieces[:-1])
    assert len(pieces) <= 200 + len(sizes)


@pytest.mark.parametrize("most", [2, 36, 252])
@pytest.mark.parametrize(("decoupled", "decay"), [(False, 0.0), (True, 0.1)])
def test_pieces_move_as_whole_tensors_do(
    decoupled: bool, decay: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA device does, with streams that are none."""

    class Stream:
        waits = 0

        def __init__(self, device: object) -> None:
            pass

        def wait_stream(self, other: object) -> None:
            Stream.waits += 1

    main = Stream(None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    ours, whole = ([nn.Parameter(torch.ones(n)) for n in (7, 5000, 8192)] for _ in range(2))
    rate = torch.full((1,), 0.1, dtype=torch.float64)
    spread, plain = (FusedAdam(parameters, rate, decay, decoupled) for parameters in (ours, whole))
    for _ in range(3):
        for a, b in zip(ours, whole, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        monkeypatch.setattr(optimizer, "_tensors_per_launch", lambda device: most)
        spread.step()
        monkeypatch.setattr(optimizer, "_tensors_per_launch", lambda device: None)
        plain.step()
    assert all((p != 1.0).all() for p in ours)
    groups = -(-(1 + 3 + 4) // most)
    assert Stream.waits == 3 * 2 * (groups - 1)  # a fork and a join of every group but the first
    for here, there in ((ours, whole), (spread.mean, plain.mean), (spread.square, plain.square)):
        for a, b in zip(here, there, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("decoupled", "decay"), [(False, 0.0), (False, 0.1), (True, 0.1)])
def test_a_device_moves_weights_exactly_as_torch_does(decoupled: bool, decay: float) -> None:
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    ours, theirs = (
        [nn.Parameter(torch.ones(shape, device="cuda")) for shape in [*shapes_of_the_model(), (3, 7)]] for _ in range(2)
    )
    adam = FusedAdam(ours, torch.full((1,), 0.1, device="cuda"), decay, decoupled)
    reference = kind(theirs, lr=torch.tensor(0.1, device="cuda"), weight_decay=decay, fused=True, capturable=True)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        adam.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_holds_the_launches_on_all_streams() -> None:
    ours, theirs = ([nn.Parameter(torch.ones(shape, device="cuda")) for shape in shapes_of_the_model()] for _ in "ab")
    spread, plain = (FusedAdam(parameters, torch.full((1,), 0.1, device="cuda")) for parameters in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        spread.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            spread.step()
        graph.replay()
        graph.replay()
        torch.cuda.synchronize()
    for _ in range(3):
        plain.step()
    assert int(spread.count) == 3
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
