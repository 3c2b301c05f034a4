"""Ten training steps with each argument give the results of vector-quantize-pytorch."""

import inspect

import pytest
import torch
from vqp_comparison import assert_alike, assert_same_training, pair, step

import spinlock_fast

pytestmark = [pytest.mark.filterwarnings("ignore:.* is not fused"), pytest.mark.filterwarnings("ignore::FutureWarning")]
vector_quantize_pytorch = pytest.importorskip("vector_quantize_pytorch", reason="pip install vector-quantize-pytorch")


def masks(i):
    return {"mask": torch.rand(2, 12, generator=torch.Generator().manual_seed(i)) > 0.4}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


CASES = {
    "plain": {},
    "straight through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "projection": {"codebook_dim": 4, "rotation_trick": False},
    "layernorm": {"codebook_dim": 4, "layernorm_after_project_in": True, "rotation_trick": False},
    "heads": {"heads": 2, "codebook_dim": 4},
    "projected heads": {"heads": 2, "codebook_dim": 3, "rotation_trick": False},
    "codebook per head": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "cosine per head": {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True, "use_cosine_sim": True},
    "frozen": {"freeze_codebook": True},
    "no update": {"ema_update": False},
    "manual update": {"manual_ema_update": True},
    "decay": {"decay": 0.5, "eps": 1e-3, "commitment_weight": 0.25},
    "no commitment": {"commitment_weight": 0.0},
    "no gradient to the input": {"route_gradients_to_input": False},
    "learned": {"learnable_codebook": True, "ema_update": False},
    "synchronous": {"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.3},
    "in place": {"learnable_codebook": True, "ema_update": False, "in_place_codebook_optimizer": sgd},
    "orthogonal": {"orthogonal_reg_weight": 3.0},
    "orthogonal, active": {"orthogonal_reg_weight": 3.0, "orthogonal_reg_active_codes_only": True},
    "orthogonal, some": {"orthogonal_reg_weight": 3.0, "orthogonal_reg_max_codes": 7},
    "random codes": {"stochastic_sample_codes": True, "sample_codebook_temp": 0.3},
    "gumbel": {"straight_through": True, "stochastic_sample_codes": True, "rotation_trick": False},
    "soft": {"straight_through": True, "rotation_trick": False},
    # 1.32 forms the gradient of distances with codes after the update, so here codes are not updated.
    "cross entropy": {"commitment_use_cross_entropy_loss": True, "manual_ema_update": True},
    "diversity": {
        "codebook_diversity_loss_weight": 0.1,
        "codebook_diversity_temperature": 2.0,
        "manual_ema_update": True,
    },
    "diversity of heads": {
        "codebook_diversity_loss_weight": 0.1,
        "heads": 2,
        "codebook_dim": 4,
        "manual_ema_update": True,
    },
    "affine": {"affine_param": True},
    "k-means": {"kmeans_init": True},
    "k-means, cosine": {"kmeans_init": True, "use_cosine_sim": True},
}


@pytest.mark.parametrize("case", CASES)
def test_arguments(case):
    assert_same_training("VectorQuantize", {"dim": 8, "codebook_size": 16, **CASES[case]})


@pytest.mark.parametrize("case", ["plain", "cosine", "learned", "affine"])
def test_masks(case):
    assert_same_training("VectorQuantize", {"dim": 8, "codebook_size": 16, **CASES[case]}, call=masks)


def test_masked_padding_returns_the_input():
    arguments = {"dim": 8, "codebook_size": 16, "return_zeros_for_masked_padding": False}
    assert_same_training("VectorQuantize", arguments, call=masks)


CALLS = {
    "lens": {"lens": torch.tensor([5, 9])},
    "frozen": {"freeze_codebook": True},
    "no update": {"ema_update": False},
    "breakdown": {"return_loss_breakdown": True},
    "several": {"topk": 3},
    "cross entropy": {"indices": torch.arange(24).view(2, 12) % 16},
    "weights": {"ema_update_weight": torch.linspace(0, 1, 16)},
    "weights by function": {"ema_update_weight": lambda sums, counts: (counts > 1).float()},
    "accumulated": {"accum_ema_update": True},
}


@pytest.mark.parametrize("case", CALLS)
def test_call_arguments(case):
    still = {"manual_ema_update": True} if case == "cross entropy" else {}
    assert_same_training("VectorQuantize", {"dim": 8, "codebook_size": 16, **still}, call=lambda i: CALLS[case])


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({"accept_image_fmap": True}, (2, 8, 3, 4)),
        ({"accept_image_fmap": True, "heads": 2, "codebook_dim": 4}, (2, 8, 3, 4)),
        ({"accept_3d_fmap": True}, (2, 8, 2, 3, 2)),
        ({"channel_last": False}, (2, 8, 12)),
        ({}, (20, 8)),
        ({"dim": 1}, (2, 12, 1)),
        ({"threshold_ema_dead_code": 2}, (2, 20, 8)),
        ({"threshold_ema_dead_code": 2, "use_cosine_sim": True}, (2, 20, 8)),
        ({"kmeans_init": True, "kmeans_iters": 3}, (1, 6, 8)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*")
def test_shapes(arguments, shape):
    assert_same_training("VectorQuantize", {"dim": 8, "codebook_size": 16, **arguments}, shape)


def test_directional_reparametrization():
    arguments = {"directional_reparam": True, "threshold_ema_dead_code": 1, "rotation_trick": False}
    assert_same_training("VectorQuantize", {"dim": 8, "codebook_size": 16, **arguments}, (2, 20, 8))


def test_input_without_gradient():
    assert_same_training("VectorQuantize", {"dim": 8, "codebook_size": 16}, differentiable=False)
    learned = {"dim": 8, "codebook_size": 16, "learnable_codebook": True, "ema_update": False}
    assert_same_training("VectorQuantize", learned, differentiable=False)


RESIDUAL = {
    "plain": {},
    "straight through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "projection": {"codebook_dim": 4, "rotation_trick": False},
    "shared": {"shared_codebook": True},
    "shared, cosine": {"shared_codebook": True, "use_cosine_sim": True},
    "dropout": {"quantize_dropout": True},
    "dropout in steps": {
        "quantize_dropout": True,
        "quantize_dropout_cutoff_index": 1,
        "quantize_dropout_multiple_of": 2,
    },
    "random codes": {"stochastic_sample_codes": True, "shared_codebook": True},
    "implicit": {"implicit_neural_codebook": True},
    "learned": {"learnable_codebook": True, "ema_update": False},
    "beam": {"beam_size": 2},
    "weighted beam": {"beam_size": 2, "eval_beam_size": 3, "beam_score_quantizer_weights": [1.0, 0.5, 0.25]},
    "gradient between stages": {"quant_grad_frac": 0.3},
    "orthogonal": {"orthogonal_reg_weight": 1.0},
    "no commitment": {"commitment_weight": 0.0},
}


@pytest.mark.parametrize("case", RESIDUAL)
def test_residual_arguments(case):
    arguments = {"dim": 8, "codebook_size": 16, "num_quantizers": 3, **RESIDUAL[case]}
    assert_same_training("ResidualVQ", arguments)


@pytest.mark.parametrize("case", ["plain", "dropout", "shared"])
def test_groups(case):
    arguments = {"dim": 16, "groups": 2, "codebook_size": 16, "num_quantizers": 3, **RESIDUAL[case]}
    assert_same_training("GroupedResidualVQ", arguments, (2, 12, 16))


def test_codebooks_of_several_sizes():
    arguments = {"dim": 8, "codebook_size": (5, 16, 7)}
    assert_same_training("ResidualVQ", arguments, call=lambda i: {"return_all_codes": True})


@pytest.mark.parametrize("case", ["plain", "cosine", "beam"])
def test_residual_masks(case):
    arguments = {"dim": 8, "codebook_size": 16, "num_quantizers": 3, **RESIDUAL[case]}
    assert_same_training("ResidualVQ", arguments, call=masks)


def test_residual_resets():
    arguments = {"dim": 8, "codebook_size": 16, "num_quantizers": 3, "threshold_ema_dead_code": 2}
    assert_same_training("ResidualVQ", arguments, (2, 20, 8))


def test_residual_calls():
    arguments = {"dim": 8, "codebook_size": 16, "num_quantizers": 3}
    assert_same_training("ResidualVQ", arguments, (20, 8))
    assert_same_training("ResidualVQ", arguments, differentiable=False)
    assert_same_training("ResidualVQ", arguments, call=lambda i: {"freeze_codebook": True, "return_all_codes": True})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["VectorQuantize", "ResidualVQ"])
def test_types(name, dtype):
    stages = {"num_quantizers": 3} if name == "ResidualVQ" else {}
    theirs, ours = pair(name, dim=8, codebook_size=16, **stages)
    x = torch.randn(2, 50, 8).to(dtype)
    (expected, expected_grads), (returned, grads) = step(theirs, x), step(ours, x)
    assert_alike(expected[0].dtype == dtype and expected[1:2], returned[1:2], "codes")
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(dtype, 1e-4)
    assert_alike(expected, returned, "returned", tolerance)
    assert_alike(expected_grads, grads, "gradients", 4 * tolerance)


@pytest.mark.parametrize("name", ["VectorQuantize", "ResidualVQ", "GroupedResidualVQ"])
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures(name, method):
    theirs = inspect.signature(getattr(getattr(vector_quantize_pytorch, name), method)).parameters
    ours = inspect.signature(getattr(getattr(spinlock_fast, name), method)).parameters
    assert list(theirs) == [parameter for parameter in ours if parameter not in ("corrections", "process_group")]
    for parameter, value in theirs.items():
        assert value.default == ours[parameter].default or value.default == {}, parameter
