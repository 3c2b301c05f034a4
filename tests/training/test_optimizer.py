"""Fused Adam compared with torch's."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.training.optimizer import FusedAdam
from spinlock_fast.training.step import TrainingStep


@pytest.mark.parametrize(("decoupled", "decay"), [(False, 0.0), (False, 0.1), (True, 0.1)])
def test_updates_equal_those_of_torch(decoupled: bool, decay: float) -> None:
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


def test_parameter_without_gradient_is_unchanged() -> None:
    used, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    adam = FusedAdam([idle, used], torch.full((1,), 0.1, dtype=torch.float64), weight_decay=0.5)
    used.sum().backward()
    adam.step()
    assert torch.equal(idle, torch.ones(3))
    assert (used < 1).all()


def shapes_of_the_model() -> list[tuple[int, ...]]:
    """Parameter shapes of a model of 172 features in 11 categories."""
    return [
        (172, 512), (11, 512), (11, 512, 256), (11, 256), (11, 256), (11, 256), (564, 256), (564,), (564,), (564,),
        (256, 564), (256,), (172, 256), (172,), (564, 128), (33, 128), (33, 128, 172), (33, 172),
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graph_keeps_the_launch_arguments_alive() -> None:
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
    """The import takes more than a second. Neither do the quantizers."""
    code = """
import sys, numpy, spinlock_fast
spinlock_fast.ResidualVQ
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.training.trainer import Trainer
x = numpy.random.default_rng(0).normal(size=(60, 4)).astype("f4")
Trainer.from_config(RunConfig(), {"device": "cpu", "training.num_epochs": 2}).fit(x, {"a": [0, 1, 2, 3]})
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def parameters_of_both(
    start: torch.Tensor, change: Callable[[nn.Parameter, torch.Tensor], None]
) -> tuple[torch.Tensor, ...]:
    """A parameter after three steps of ours and of torch's Adam; `change(parameter, gradient)` sets our gradient."""
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    adam, reference = FusedAdam([ours], torch.full((1,), 0.1, dtype=torch.float64)), torch.optim.Adam([theirs], lr=0.1)
    for _ in range(3):
        theirs.grad = torch.randn_like(start)
        change(ours, theirs.grad)
        adam.step()
        reference.step()
    return ours.detach(), theirs.detach()


def transposed(p: nn.Parameter, grad: torch.Tensor) -> None:
    p.grad = grad.t().contiguous().t()


def broadcast(p: nn.Parameter, grad: torch.Tensor) -> None:
    grad.copy_(grad[:, :1].expand_as(grad).clone())
    p.grad = grad[:, :1].expand_as(grad)


def parameter_transposed(p: nn.Parameter, grad: torch.Tensor) -> None:
    p.data = p.data.t().contiguous().t()
    p.grad = grad


def parameter_with_gaps(p: nn.Parameter, grad: torch.Tensor) -> None:
    p.data = p.data.repeat_interleave(3, 1)[:, ::3]
    p.grad = grad


@pytest.mark.parametrize("change", [transposed, broadcast, parameter_transposed, parameter_with_gaps])
def test_strides_of_parameters_and_gradients_do_not_matter(
    change: Callable[[nn.Parameter, torch.Tensor], None],
) -> None:
    ours, theirs = parameters_of_both(torch.randn(5, 7), change)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", [lambda p: p.double(), lambda p: p[:2].clone()], ids=["dtype", "shape"])
def test_parameter_that_no_longer_fits_its_moments_is_rejected(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    parameter = nn.Parameter(torch.ones(3))
    adam = FusedAdam([parameter], torch.full((1,), 0.1, dtype=torch.float64))
    parameter.data = change(parameter.data)
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"parameter 0 is .* its moments are"):
        adam.step()


def test_replaced_parameters_are_rejected() -> None:
    model = nn.Linear(3, 2)
    adam = FusedAdam(model.parameters(), torch.full((1,), 0.1, dtype=torch.float64))
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        adam.step()


def test_sparse_gradient_is_rejected() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    adam = FusedAdam(table.parameters(), torch.full((1,), 0.1, dtype=torch.float64))
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        adam.step()


def model_after_a_step() -> tuple[nn.Linear, FusedAdam]:
    model = nn.Linear(3, 2)
    adam = FusedAdam(model.parameters(), torch.full((1,), 0.1, dtype=torch.float64))
    model(torch.ones(1, 3)).sum().backward()
    adam.step()
    return model, adam


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda state: state.pop(1), "not of all 2"),
        (lambda state: state.update({2: state[0]}), "not of all 2"),
        (lambda state: state[0].update(exp_avg=torch.ones(1)), "exp_avg of parameter 0 has the shape"),
        (lambda state: state[1].update(step=torch.tensor(7.0)), "different numbers of steps"),
    ],
)
def test_mismatched_state_changes_nothing(broken: Callable[[dict[int, Any]], Any], message: str) -> None:
    adam, other = model_after_a_step()[1], model_after_a_step()[1]
    before = copy.deepcopy(adam.state_dict())
    state = copy.deepcopy(other.state_dict())
    broken(state["state"])
    with pytest.raises(ValueError, match=message):
        adam.load_state_dict(state)
    torch.testing.assert_close(adam.state_dict(), before, rtol=0, atol=0)


def test_empty_state_resets_the_moments() -> None:
    model, adam = model_after_a_step()
    adam.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
    assert int(adam.count) == 0
    assert not any(bool(moment.any()) for moment in (*adam.mean, *adam.square))


def test_parameters_replaced_between_epochs_raise() -> None:
    settings = CategoricalVQVAEConfig(input_dim=4, group_indices={"a": [0, 1, 2, 3]}, codebook_init="uniform")
    model = CategoricalHierarchicalVQVAE(settings)
    step = TrainingStep(model, torch.randn(40, 4), TrainingConfig())
    places = step.memory_layout()
    model.shared_decoder[0].weight.data = model.shared_decoder[0].weight.data.clone()
    assert step.memory_layout() != places
    decoder = model.shared_decoder[0]
    decoder.load_state_dict({name: value.clone() for name, value in decoder.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="assign=True"):
        step.memory_layout()
