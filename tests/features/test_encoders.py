import pytest
import torch
from torch import nn

from spinlock_fast.config.schema import IdentityEncoderParams, MLPEncoderParams, TemporalCNNEncoderParams
from spinlock_fast.features.encoders import build_encoder, seeded_encoder

KINDS = [
    ((20,), MLPEncoderParams(hidden_dims=[16, 8], output_dim=6)),
    ((32, 5), TemporalCNNEncoderParams(embedding_dim=6)),
    ((12,), IdentityEncoderParams()),
]


@pytest.mark.parametrize(
    ("row_shape", "params", "width"),
    [
        ((360,), MLPEncoderParams(), 128),
        ((256, 63), TemporalCNNEncoderParams(), 128),
        ((12,), IdentityEncoderParams(), 12),
        ((3, 4), IdentityEncoderParams(), 12),
        ((3, 4), MLPEncoderParams(hidden_dims=[], output_dim=5), 5),
        ((1, 1), TemporalCNNEncoderParams(embedding_dim=3), 3),
        ((7, 2), TemporalCNNEncoderParams(embedding_dim=3), 3),
    ],
)
def test_widths(row_shape, params, width):
    encoder = build_encoder(row_shape, params)
    assert encoder.output_dim == width
    assert encoder(torch.randn(4, *row_shape)).shape == (4, width)


def test_baseline_families_give_268_columns():
    shapes = [(360,), (256, 63), (12,)]
    params = [MLPEncoderParams(), TemporalCNNEncoderParams(), IdentityEncoderParams()]
    assert sum(build_encoder(s, p).output_dim for s, p in zip(shapes, params, strict=True)) == 268


@pytest.mark.parametrize(("row_shape", "params"), KINDS)
def test_encoders_are_frozen_in_evaluation_mode(row_shape, params):
    encoder = build_encoder(row_shape, params)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize(("row_shape", "params"), KINDS)
def test_rows_do_not_influence_each_other(row_shape, params):
    encoder = build_encoder(row_shape, params)
    x = torch.randn(6, *row_shape)
    torch.testing.assert_close(encoder(x)[2:4], encoder(x[2:4]))


def test_names_of_the_mlp_are_those_of_the_original():
    state = build_encoder((20,), MLPEncoderParams(hidden_dims=[16, 8], output_dim=6)).state_dict()
    weights = {name: tuple(value.shape) for name, value in state.items() if value.ndim == 2}
    assert weights == {"encoder.0.weight": (16, 20), "encoder.4.weight": (8, 16), "encoder.8.weight": (6, 8)}
    assert {"encoder.1.running_mean", "encoder.5.running_var", "encoder.9.weight"} < set(state)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"batch_norm": False}, ["encoder.0", "encoder.3", "encoder.6"]),
        ({"dropout": 0.0}, ["encoder.0", "encoder.3", "encoder.6"]),
        ({"dropout": 0.0, "batch_norm": False}, ["encoder.0", "encoder.2", "encoder.4"]),
    ],
)
def test_names_of_the_mlp_without_some_layers(options, names):
    state = build_encoder((20,), MLPEncoderParams(hidden_dims=[16, 8], output_dim=6, **options)).state_dict()
    assert [name.removesuffix(".weight") for name, value in state.items() if value.ndim == 2] == names


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_the_mlp_against_its_formula(activation):
    encoder = build_encoder((5,), MLPEncoderParams(hidden_dims=[4], output_dim=3, activation=activation)).double()
    first, _, _, _, last, _ = encoder.encoder
    for norm in (encoder.encoder[1], encoder.encoder[5]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)

    def normalise(h, norm):
        return (h - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias

    x = torch.randn(7, 5, dtype=torch.float64)
    function = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh}
    hidden = function[activation](normalise(first(x), encoder.encoder[1]))
    torch.testing.assert_close(encoder(x), normalise(last(hidden), encoder.encoder[5]))


def test_names_of_the_temporal_network_are_those_of_the_original():
    state = build_encoder((256, 63), TemporalCNNEncoderParams()).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items() if value.ndim >= 2}
    blocks = {2: (32, 64), 3: (64, 128), 4: (128, 256)}
    expected = {"stage1.0.weight": (32, 63, 7), "fc.weight": (128, 256)}
    for stage, (channels_in, channels_out) in blocks.items():
        expected[f"stage{stage}.conv1.weight"] = (channels_out, channels_in, 3)
        expected[f"stage{stage}.conv2.weight"] = (channels_out, channels_out, 3)
        expected[f"stage{stage}.skip.0.weight"] = (channels_out, channels_in, 1)
    assert shapes == expected
    norms = [f"stage{s}.{part}" for s in blocks for part in ("bn1", "bn2", "skip.1")] + ["stage1.1", "bn_final"]
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert set(state) == {*expected, "fc.bias"} | {f"{norm}.{part}" for norm in norms for part in statistics}


def test_the_temporal_network_shortens_time_by_32():
    encoder = build_encoder((256, 3), TemporalCNNEncoderParams())
    h = torch.randn(2, 3, 256)
    lengths = []
    for stage in (encoder.stage1, encoder.stage2, encoder.stage3, encoder.stage4):
        h = stage(h)
        lengths.append(h.shape[-1])
    assert lengths == [64, 32, 16, 8]


@pytest.mark.parametrize("row_shape", [(5,), ()])
def test_the_temporal_network_needs_two_dimensions(row_shape):
    with pytest.raises(ValueError, match="3-D"):
        build_encoder(row_shape, TemporalCNNEncoderParams())


@pytest.mark.parametrize(("row_shape", "params"), KINDS[:2])
def test_weights_follow_from_family_and_seed_alone(row_shape, params):
    def weights(family, seed, noise=0):
        torch.manual_seed(noise)
        return torch.cat([p.flatten() for p in seeded_encoder(row_shape, params, family, seed).parameters()])

    assert torch.equal(weights("summary", 42), weights("summary", 42, noise=1))
    assert not torch.equal(weights("summary", 42), weights("summary", 43))
    assert not torch.equal(weights("summary", 42), weights("other", 42))


@pytest.mark.parametrize("seed", [0, 42, 2**63 - 1])
def test_seeding_leaves_the_random_state_of_others_alone(seed):
    before = torch.get_rng_state()
    seeded_encoder((20,), MLPEncoderParams(hidden_dims=[4], output_dim=2), "summary", seed)
    assert torch.equal(torch.get_rng_state(), before)
