"""Activation checkpointing around quantizers does not change gradients, states and random numbers."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from spinlock_fast import (
    CategoricalHierarchicalVQVAE,
    CategoricalVQVAEConfig,
    GroupedResidualVQ,
    GroupedVectorQuantizer,
    ResidualVQ,
    VectorQuantize,
)
from spinlock_fast.compat import VectorQuantizer

D = 8


def vector(**options):
    return lambda: VectorQuantize(D, 16, **options)


def residual(cls=ResidualVQ, **options):
    return lambda: cls(dim=D, codebook_size=16, num_quantizers=3, **options)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


KINDS = {
    "plain": vector(),
    "cosine per head": vector(use_cosine_sim=True, heads=2, separate_codebook_per_head=True),
    "k-means and resets": vector(kmeans_init=True, threshold_ema_dead_code=2),
    "learned": vector(learnable_codebook=True, ema_update=False),
    "orthogonal": vector(orthogonal_reg_weight=1.0, orthogonal_reg_max_codes=8),
    "cross entropy": vector(commitment_use_cross_entropy_loss=True),
    "random codes": vector(stochastic_sample_codes=True, straight_through=True, rotation_trick=False),
    "affine": vector(affine_param=True),
    "in place": vector(in_place_codebook_optimizer=sgd, learnable_codebook=True, ema_update=False),
    "stages": residual(kmeans_init=True, threshold_ema_dead_code=1),
    "shared": residual(shared_codebook=True, threshold_ema_dead_code=2),
    "beam": residual(beam_size=2, corrections="all"),
    "implicit": residual(implicit_neural_codebook=True),
    "groups": residual(GroupedResidualVQ, groups=2, quantize_dropout=True),
    "grouped": lambda: GroupedVectorQuantizer([8, 5], [3, 5], decay=0.5),
    "grouped, learned": lambda: GroupedVectorQuantizer([8, 5], [3, 5], codebook_init="uniform", use_ema=False),
    "original": lambda: VectorQuantizer(16, D, decay=0.5),
}
MODES = {
    "none": lambda net, x: net(x),
    "plain": lambda net, x: checkpoint(net, x, use_reentrant=False),
    "reentrant": lambda net, x: checkpoint(net, x, use_reentrant=True),
    "nested": lambda net, x: checkpoint(MODES["plain"], net, x, use_reentrant=False),
    "nested in reentrant": lambda net, x: checkpoint(MODES["plain"], net, x, use_reentrant=True),
    "nested reentrant": lambda net, x: checkpoint(MODES["reentrant"], net, x, use_reentrant=False),
}


class Net(torch.nn.Module):
    """A quantizer called twice, followed by dropout, which draws random numbers."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.quantizer, self.after = torch.nn.Linear(D, D), make(), torch.nn.Linear(D, D)

    def forward(self, x):
        x, total = self.before(x), 0.0
        for _ in range(2):
            quantized, _, loss = self.quantizer(x)
            total = total + (loss["loss"] if isinstance(loss, dict) else loss.sum())
            x = torch.nn.functional.dropout(self.after(quantized), 0.3).sin()
        return x, total


def train(net, mode):
    """Gradients of two micro-batches in each of two steps, backward in reverse order; final states."""
    torch.manual_seed(5)
    gradients = []
    for step in range(2):
        net.zero_grad()
        leaves = torch.randn(2, 2, 10, D, generator=torch.Generator().manual_seed(step)).requires_grad_()
        losses = [x.square().sum() + loss for x, loss in (MODES[mode](net, leaf) for leaf in leaves)]
        for loss in losses[::-1]:
            loss.backward()
        gradients += [p.grad.clone() for p in [leaves, *net.parameters()] if p.grad is not None]
    return gradients, dict(net.state_dict()), torch.rand(3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*is not fused")
def test_checkpointing_changes_nothing(kind):
    net = Net(KINDS[kind])
    expected = train(copy.deepcopy(net), "none")
    for mode in MODES:
        found = train(copy.deepcopy(net), mode)
        for i, part in enumerate(found):
            torch.testing.assert_close(part, expected[i], rtol=1e-4, atol=1e-4, msg=lambda text, m=mode: f"{m}: {text}")


def test_without_early_stop():
    net = Net(KINDS["k-means and resets"])
    expected = train(copy.deepcopy(net), "none")
    with set_checkpoint_early_stop(False):
        found = train(net, "nested")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_second_backward_pass():
    grads = []
    for mode in ("none", "plain"):
        net = Net(KINDS["plain"])
        x = torch.randn(2, 10, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(3)
        loss = MODES[mode](net, x)[0].sum()
        loss.backward(retain_graph=True)
        net(x.detach())  # moves the codes between the two
        loss.backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_whole_model(use_reentrant):
    config = CategoricalVQVAEConfig(input_dim=6, group_indices={"a": [0, 1, 2], "b": [3, 4, 5]}, use_ema=True)
    torch.manual_seed(0)
    model = CategoricalHierarchicalVQVAE(config).train()
    results = []
    for region in (False, True):
        net = copy.deepcopy(model)

        def forward(x, net=net):
            out = net(x)
            return out["reconstruction"], out["vq_loss"], out["codebook"]

        torch.manual_seed(1)
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
        found = checkpoint(forward, x, use_reentrant=use_reentrant) if region else forward(x)
        (found[0].square().mean() + found[1]).backward()
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        results.append([*found, x.grad, *grads, *net.state_dict().values(), net.quantizer.usage, torch.rand(2)])
    torch.testing.assert_close(*results)


class OwnCheckpoint(torch.autograd.Function):
    """Recomputation by other packages, which cannot be distinguished from a first run."""

    @staticmethod
    def forward(ctx, net, x):
        ctx.net = net
        ctx.save_for_backward(x)
        with torch.no_grad():
            return net(x)[0]

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.net(x)[0].backward(grad)
        return None, x.grad


@pytest.mark.parametrize("kind", ["plain", "stages", "grouped", "original"])
def test_unsupported_recomputation_is_rejected(kind):
    net = Net(KINDS[kind])
    x = torch.randn(2, 10, D, requires_grad=True)
    loss = OwnCheckpoint.apply(net, x).sum()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match=r"only torch\.utils\.checkpoint is supported"):
        loss.backward()
    torch.testing.assert_close(net.state_dict(), before)
    OwnCheckpoint.apply(net.eval(), x).sum().backward()  # nothing moves


@pytest.mark.filterwarnings("ignore")
def test_compile_around_and_inside_a_region():
    torch._dynamo.reset()
    x = torch.randn(2, 10, D)
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = VectorQuantize(D, 16)
        region = lambda leaf, layer=layer: checkpoint(layer, leaf, use_reentrant=False)  # noqa: E731
        call = torch.compile(region, backend="aot_eager") if compiled else region
        leaf = x.clone().requires_grad_()
        quantized, _, loss = call(leaf)
        (quantized.sin().sum() + loss).backward()
        results.append([leaf.grad, *layer.state_dict().values()])
    torch.testing.assert_close(*results)
    inside = torch.compile(VectorQuantize(D, 16), backend="aot_eager")
    leaf = x.clone().requires_grad_()
    quantized = checkpoint(lambda y: inside(y)[0], leaf, use_reentrant=False)
    with pytest.raises(RuntimeError, match="Compile the checkpointed function instead"):
        quantized.sum().backward()
