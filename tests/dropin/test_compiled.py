"""`torch.compile` with its default backend gives the outputs, gradients and states of eager mode.

Only Inductor removes and recomputes operations, so that other backends do not test this.
"""

import copy

import pytest
import torch
from torch import nn
from vqp_comparison import assert_alike

import spinlock_fast as vq
from spinlock_fast import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig, GroupedVectorQuantizer
from spinlock_fast.compat import VectorQuantizer

pytestmark = pytest.mark.filterwarnings("ignore")

ONE, STAGES = {"dim": 8, "codebook_size": 16}, {"dim": 8, "codebook_size": 16, "num_quantizers": 3}
LEARNED = {"learnable_codebook": True, "ema_update": False}


def one(**options):
    return lambda: vq.VectorQuantize(**ONE, **options)


def stages(**options):
    return lambda: vq.ResidualVQ(**{**STAGES, **options})


def grouped(**options):
    return lambda: GroupedVectorQuantizer([9, 4], [5, 3], codebook_init="uniform", **options)


def model():
    groups = {"a": [0, 1, 2, 3], "b": [4, 5, 6, 7]}
    config = CategoricalVQVAEConfig(
        input_dim=8, group_indices=groups, group_embedding_dim=8, group_hidden_dim=12, dropout=0.0,
        codebook_init="uniform",
    )  # fmt: skip
    return CategoricalHierarchicalVQVAE(config)


CASES = {
    "plain": one(),
    "straight through": one(rotation_trick=False),
    "cosine": one(use_cosine_sim=True),
    "projection": one(codebook_dim=4),
    "heads": one(heads=2, codebook_dim=3),
    "codebook per head": one(heads=2, codebook_dim=4, separate_codebook_per_head=True),
    "frozen": one(freeze_codebook=True),
    "manual update": one(manual_ema_update=True),
    "no commitment": one(commitment_weight=0.0),
    "no gradient to the input": one(route_gradients_to_input=False),
    "learned": one(**LEARNED),
    "synchronous": one(**LEARNED, sync_update_v=0.3),
    "learned, resets": one(**LEARNED, threshold_ema_dead_code=2),
    "orthogonal": one(orthogonal_reg_weight=3.0),
    "soft": one(straight_through=True, rotation_trick=False),
    "cross entropy": one(commitment_use_cross_entropy_loss=True),
    "diversity": one(codebook_diversity_loss_weight=0.5, codebook_diversity_temperature=2.0),
    "affine": one(affine_param=True),
    "directional": one(directional_reparam=True, threshold_ema_dead_code=2),
    "random codes": one(stochastic_sample_codes=True, sample_codebook_temp=0.3),
    "one stage": stages(num_quantizers=1),
    "stages": stages(),
    "projected stages": stages(codebook_dim=4),
    "stages of several sizes": stages(codebook_size=(5, 16, 7)),
    "cosine stages": stages(use_cosine_sim=True),
    "shared": stages(shared_codebook=True),
    "shared, orthogonal": stages(shared_codebook=True, orthogonal_reg_weight=1.0),
    "learned stages": stages(**LEARNED),
    "gradient between stages": stages(quant_grad_frac=0.3),
    "implicit": stages(implicit_neural_codebook=True),
    "noisy stages": stages(diveq=True),
    "beam": stages(beam_size=2),
    "groups": lambda: vq.GroupedResidualVQ(dim=8, groups=2, codebook_size=16, num_quantizers=2),
    "packed": grouped(),
    "packed, rotation": grouped(rotation_trick=True),
    "packed, learned": grouped(use_ema=False),
    "packed, laplace": grouped(smoothing="laplace"),
    "packed, one learned": lambda: GroupedVectorQuantizer([16], [8], codebook_init="uniform", use_ema=False),
    "original": lambda: VectorQuantizer(16, 8),
    "original, learned": lambda: VectorQuantizer(16, 8, use_ema=False),
    "model": model,
}
FULL_GRAPH = set(CASES) - {"affine", "beam", "implicit"}
# Cases compiled together in the fast tier.
TOGETHER = ("plain", "cross entropy", "packed, one learned")


class Several(nn.Module):
    """Applies several quantizers to the same input."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return [part(x) for part in self.parts]


def floats(returned):
    """The floating-point tensors of a result, in order."""
    if isinstance(returned, torch.Tensor):
        return [returned] if returned.is_floating_point() else []
    parts = returned.values() if isinstance(returned, dict) else returned
    return [value for part in parts for value in floats(part)]


def step(module, run, x, differentiable=True):
    """Results, gradients of input and parameters, and buffers and parameters after a step.

    The change of a parameter has a norm of at most 0.1: with a larger one, networks as deep as an implicit codebook
    diverge, and rounding errors of 1e-7 become as large as the gradients.
    """
    leaf = x.clone().requires_grad_(differentiable)
    torch.manual_seed(7)
    returned = run(leaf)
    weighted = [
        (value.sin() * torch.linspace(1, 2, value.numel()).view(value.shape)).sum() for value in floats(returned)
    ]
    total = sum(value for value in weighted if value.requires_grad)
    if isinstance(total, torch.Tensor):
        total.backward()
    gradients = [p.grad.clone() for p in (leaf, *module.parameters()) if p.grad is not None]
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad / parameter.grad.norm().clamp(min=1.0)
                parameter.grad = None
    return returned, gradients, list(module.buffers()), list(module.parameters())


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [one for part in (value.values() if isinstance(value, dict) else value) for one in flat(part)]


def assert_same_steps(module, training, dynamic, sizes=(40, 40, 40), fullgraph=True, differentiable=True):
    torch._dynamo.reset()
    plain, other = module.train(training), copy.deepcopy(module).train(training)
    compiled = torch.compile(other, fullgraph=fullgraph, dynamic=dynamic)
    with torch._inductor.config.patch(fallback_random=True):
        for i, size in enumerate(sizes):
            x = torch.randn(size, 8, generator=torch.Generator().manual_seed(i))
            expected = step(plain, plain, x, differentiable)
            found = step(other, compiled, x, differentiable)
            assert_alike(flat(expected), flat(found), f"step {i}")


def test_compiled_training_matches_eager():
    torch.manual_seed(0)
    assert_same_steps(Several(*(CASES[case]() for case in TOGETHER)), True, False)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("training", "dynamic"), [(True, False), (True, True), (False, False), (False, True)])
def test_compiled_quantizer_matches_eager(case, training, dynamic):
    torch.manual_seed(0)
    sizes = (40, 57, 33) if dynamic else (40, 40, 40)
    assert_same_steps(CASES[case](), training, dynamic, sizes, case in FULL_GRAPH)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_compiled_quantizer_without_input_gradient_matches_eager(case):
    torch.manual_seed(0)
    assert_same_steps(CASES[case](), True, False, fullgraph=case in FULL_GRAPH, differentiable=False)


@pytest.mark.parametrize("case", ["no commitment", "stages"])
def test_loss_backward_without_input_gradient(case):
    """As in vector-quantize-pytorch; also compiled."""
    torch._dynamo.reset()
    for run in (CASES[case](), torch.compile(CASES[case](), backend="aot_eager", fullgraph=True)):
        run(torch.randn(40, 8))[2].sum().backward()
        with torch.no_grad():
            assert not run(torch.randn(40, 8))[0].requires_grad


@pytest.mark.parametrize("case", ["soft", "cross entropy", "diversity", "learned, resets", "shared, orthogonal"])
def test_gradients_use_codes_before_the_update(case):
    """Also for two calls before one backward pass. vector-quantize-pytorch reads codes after the update."""
    torch.manual_seed(0)
    x = torch.randn(3, 40, 8)
    moving = CASES[case]()
    for part in moving.modules():
        part.threshold_ema_dead_code = min(getattr(part, "threshold_ema_dead_code", 0), 0.9)
    state = copy.deepcopy(moving)
    leaf = x[:2].clone().requires_grad_()
    first = moving(leaf[0])
    after = copy.deepcopy(moving)
    second = moving(leaf[1])
    (first[2].sum() + first[0].sin().sum() + second[2].sum() + second[0].sin().sum()).backward()
    for module, row in ((state, 0), (after, 1)):
        other = x[row].clone().requires_grad_()
        alone = module(other, freeze_codebook=True) if case != "learned, resets" else module(other)
        (alone[2].sum() + alone[0].sin().sum()).backward()
        torch.testing.assert_close(leaf.grad[row], other.grad)
