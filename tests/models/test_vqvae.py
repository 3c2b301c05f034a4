import copy

import helpers
import pytest
import torch

from spinlock_fast import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.config.schema import LevelConfig
from spinlock_fast.errors import DataError

GOLDEN = [4, 16, 15, 13, 32, 28, 20, 10, 11, 14, 9]


def config_of(sizes, **options):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    groups = {f"cluster_{i + 1}": list(range(s, s + n)) for i, (s, n) in enumerate(zip(starts, sizes, strict=True))}
    return CategoricalVQVAEConfig(input_dim=sum(sizes), group_indices=groups, **options)


def make(sizes=(4, 6, 3), **options):
    torch.manual_seed(0)
    small = {"group_embedding_dim": 16, "group_hidden_dim": 24, **options}
    return CategoricalHierarchicalVQVAE(config_of(list(sizes), **small))


def features(model, rows=20, seed=0):
    return torch.randn(rows, model.config.input_dim, generator=torch.Generator().manual_seed(seed))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_golden_size_of_the_baseline():
    model = CategoricalHierarchicalVQVAE(config_of(GOLDEN))
    assert model.num_codebooks == 33
    assert model.quantizer.layout.total_codes == 484
    assert model.quantizer.layout.total_dims == 564
    assert model.num_parameters() == (2_687_476, 7_188)


def test_learned_codes_count_once():
    learned, averaged = make(use_ema=False), make()
    assert learned.num_parameters() == averaged.num_parameters()
    assert sum(p.numel() for p in learned.parameters()) == sum(averaged.num_parameters())


def test_shapes_of_the_output():
    model = make()
    out = model(features(model))
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "reconstruction": (20, 13),
        "tokens": (20, 9),
        "vq_loss": (),
        "latents": (20, model.quantizer.layout.total_dims),
        "quantized": (20, model.quantizer.layout.total_dims),
        "codebook": (model.quantizer.layout.total_entries,),
    }
    assert out["tokens"].dtype == torch.int64
    assert model.partial_reconstructions(out["quantized"]).shape == (9, 20, 13)


def test_tokens_are_ordered_by_category_then_level():
    model = make([3] * 11)
    expected = [f"cluster_{i}/L{level}" for i in range(1, 12) for level in range(3)]
    assert model.codebook_names == expected
    assert model.category_slice("cluster_10") == slice(27, 30)
    assert model.categories[-2:] == ["cluster_10", "cluster_11"]


def test_order_is_insertion_order_and_not_alphabetical():
    groups = {"b": [0, 3], "a": [1], "c10": [2], "c9": [4]}
    model = CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(input_dim=5, group_indices=groups))
    assert model.categories == ["b", "a", "c10", "c9"]
    assert model.codebook_names[:6] == ["b/L0", "b/L1", "b/L2", "a/L0", "a/L1", "a/L2"]


def test_token_depends_only_on_its_category():
    model = make().eval()
    x = features(model)
    changed = x.clone()
    changed[:, 4:10] = 10.0 * torch.randn(20, 6)  # cluster_2
    before, after = model.encode(x), model.encode(changed)
    columns = model.quantizer.layout.column_slice
    for g in range(9):
        same = torch.equal(before[:, columns(g)], after[:, columns(g)])
        assert same == (g not in range(3, 6))


def test_categories_take_their_features_by_index():
    groups = {"a": [4, 0], "b": [2, 1, 3]}
    model = CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(input_dim=5, group_indices=groups)).eval()
    x = features(model)
    straight = CategoricalHierarchicalVQVAE(
        CategoricalVQVAEConfig(input_dim=5, group_indices={"a": [0, 1], "b": [2, 3, 4]})
    ).eval()
    straight.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.encode(x), straight.encode(x[:, [4, 0, 2, 1, 3]]))


def test_the_network_is_that_of_the_specification():
    model = make([4, 3]).double().eval()
    x = features(model).double()
    layout = model.quantizer.layout
    parts = []
    for c, (start, n) in enumerate([(0, 4), (4, 3)]):
        first, _, _, second, norm = model.category_mlp
        h = torch.relu(x[:, start : start + n] @ first.weight[start : start + n] + first.bias[c])
        h = h @ second.weight[c] + second.bias[c]
        h = torch.nn.functional.layer_norm(h, [16], norm.weight[c], norm.bias[c])
        linear, _, head_norm = model.heads
        for g in range(3 * c, 3 * c + 3):
            columns = layout.column_slice(g)
            z = h @ linear.weight[columns].t() + linear.bias[columns]
            parts.append(
                torch.nn.functional.layer_norm(z, [layout.dims[g]], head_norm.weight[columns], head_norm.bias[columns])
            )
    out = model(x)
    torch.testing.assert_close(out["latents"], torch.cat(parts, 1))
    first, _, _, second = model.shared_decoder
    assert (first.out_features, second.out_features) == (256, 7)
    torch.testing.assert_close(out["reconstruction"], second(torch.relu(first(out["quantized"]))))
    first, _, second = model.partial_decoders
    for g, partial in enumerate(model.partial_reconstructions(out["quantized"])):
        columns = layout.column_slice(g)
        hidden = torch.relu(out["quantized"][:, columns] @ first.weight[columns] + first.bias[g])
        torch.testing.assert_close(partial, hidden @ second.weight[g] + second.bias[g])


def test_fused_layers_equal_separate_layers():
    model = make().double().eval()
    x = features(model).double()
    latents = model.heads(model.category_mlp(x[:, model.feature_order]))
    torch.testing.assert_close(model.encode(x), latents)
    torch.testing.assert_close(model.decode(latents), model.shared_decoder(latents))


@pytest.mark.parametrize("codebook_init", ["kmeans", "uniform"])
def test_output_codebook_is_that_before_the_update(codebook_init):
    model = make(codebook_init=codebook_init).train()
    for seed in range(2):
        out = model(features(model, seed=seed))
        moved = model.quantizer.embedding.clone()
        model.quantizer.embedding.copy_(out["codebook"])
        assert torch.equal(model.quantizer.lookup(out["tokens"]), out["quantized"])
        model.quantizer.embedding.copy_(moved)
    assert not torch.equal(moved, out["codebook"])  # the first batch does not move the codes that k-means fitted to it


def test_every_parameter_gets_a_gradient():
    model = make(dropout=0.0)
    out = model(features(model))
    partial = model.partial_reconstructions(out["quantized"])
    (out["reconstruction"].square().mean() + out["vq_loss"] + partial.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("training", [True, False])
def test_get_tokens_keeps_codes_and_mode(training):
    model = make(codebook_init="uniform").train(training)
    before = state(model)
    usage = model.quantizer.usage.clone()
    tokens = model.get_tokens(features(model).requires_grad_())
    assert_same(state(model), before)
    assert torch.equal(model.quantizer.usage, usage)
    assert all(module.training == training for module in model.modules())
    assert tokens.dtype == torch.int64
    assert not tokens.requires_grad


def test_get_tokens_does_not_initialise_codes():
    model = make().train()
    model.get_tokens(features(model))
    assert not model.quantizer.initialized


def test_get_tokens_ignores_dropout():
    model = make(dropout=0.5, codebook_init="uniform").train()
    x = features(model)
    assert torch.equal(model.get_tokens(x), model.get_tokens(x))
    assert torch.equal(model.get_tokens(x), model.eval()(x)["tokens"])


@pytest.mark.parametrize("method", ["get_tokens", "decode_from_tokens"])
def test_mode_of_a_part_is_restored(method):
    model = make(codebook_init="uniform").train()
    model.quantizer.eval()
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    getattr(model, method)(features(model) if method == "get_tokens" else tokens)
    assert model.heads.training
    assert not model.quantizer.training


def test_mode_is_restored_after_an_error():
    model = make().train()
    with pytest.raises(ValueError, match=r"\[B, 13\]"):
        model.get_tokens(torch.zeros(2, 3))
    with pytest.raises(IndexError):
        model.decode_from_tokens(torch.full((1, 9), 999))
    assert model.training


def test_tokens_decode_to_the_reconstruction():
    model = make().eval()
    x = features(model)
    out = model(x)
    torch.testing.assert_close(model.decode_from_tokens(out["tokens"]), out["reconstruction"])
    assert torch.equal(model.get_tokens(x), out["tokens"])


@pytest.mark.parametrize(("row", "g", "token"), [(0, 0, 15), (1, 8, 6), (1, 4, -1)])
def test_tokens_out_of_range_are_rejected(row, g, token):
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    tokens[row, g] = token
    with pytest.raises(IndexError, match=f"{token} of row {row} is outside codebook {g}"):
        make().decode_from_tokens(tokens)


def test_tokens_that_are_no_integers_are_refused():
    with helpers.raises_one_line(DataError, "tokens: expected integers, got torch.float32"):
        make().decode_from_tokens(torch.zeros(2, 9))


def test_tokens_of_a_category():
    model = make()
    tokens = torch.arange(18).view(2, 9)
    assert model.get_category_tokens(tokens, "cluster_2").tolist() == [[3, 4, 5], [12, 13, 14]]
    with pytest.raises(KeyError, match="cluster_1, cluster_2, cluster_3"):
        model.get_category_tokens(tokens, "cluster_4")


def test_tokens_of_categories_with_different_numbers_of_levels():
    levels = {"cluster_1": [(5, 2)], "cluster_2": [(4, 3), (3, 2)], "cluster_3": [(2, 2)]}
    spec = {name: [LevelConfig(num_tokens=k, latent_dim=d) for k, d in books] for name, books in levels.items()}
    model = make(levels=spec)
    assert model.codebook_names == ["cluster_1/L0", "cluster_2/L0", "cluster_2/L1", "cluster_3/L0"]
    assert model.category_slice("cluster_3") == slice(3, 4)
    assert model.quantizer.num_codes == (5, 4, 3, 2)
    assert model(features(model))["tokens"].shape == (20, 4)


def test_rows_do_not_influence_each_other_in_evaluation():
    model = make(codebook_init="uniform").eval()
    x = features(model)
    torch.testing.assert_close(model(x)["reconstruction"][3:5], model(x[3:5])["reconstruction"])


def test_state_dict_round_trips():
    trained, fresh = make(), make()
    for seed in range(3):
        trained(features(trained, seed=seed))
    fresh.load_state_dict(trained.state_dict())
    x = features(trained, seed=9)
    torch.manual_seed(1)
    trained.train()(x)
    torch.manual_seed(1)
    fresh.train()(x)
    assert_same(state(fresh), state(trained))


def test_configuration_round_trips():
    config = make(use_ema=False, rotation_trick=True, decay=0.9).config
    again = CategoricalVQVAEConfig(**config.model_dump())
    assert again == config
    assert list(again.group_indices) == list(config.group_indices)


@pytest.mark.parametrize("options", [{"use_ema": False}, {"rotation_trick": True}, {"levels": None}])
def test_options_train(options):
    model = make(**options)
    out = model(features(model))
    (out["reconstruction"].square().mean() + out["vq_loss"]).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_deep_copies_are_independent():
    model = make()
    before = state(model)
    copy.deepcopy(model)(features(model))
    assert_same(state(model), before)


def test_uncategorised_feature_is_reconstructed_and_not_encoded():
    config = CategoricalVQVAEConfig(input_dim=5, group_indices={"a": [0, 1], "b": [3, 4]})
    model = CategoricalHierarchicalVQVAE(config).eval()
    x = features(model)
    changed = x.clone()
    changed[:, 2] += 100.0
    assert torch.equal(model.encode(x), model.encode(changed))
    assert model(x)["reconstruction"].shape == (20, 5)


def test_extra_inputs_are_standardised_and_read_by_one_category():
    groups = {"a": [0, 1], "b": [3, 4]}
    model = CategoricalHierarchicalVQVAE(
        CategoricalVQVAEConfig(input_dim=5, group_indices=groups, extra_inputs={"b": [2]})
    ).eval()
    x = features(model)
    x[:, 2] = 50.0 * x[:, 2] + 7.0
    model.fit_extra_inputs(*helpers.column_mean_std(x))
    inputs = model.encoder_inputs(x)
    assert torch.equal(inputs[:, :4], x[:, [0, 1, 3, 4]])
    torch.testing.assert_close(inputs[:, 4].mean(), torch.tensor(0.0), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(inputs[:, 4].square().mean(), torch.tensor(1.0))
    expected = torch.tensor([1.0, 1.0, 1.0 / float(x[:, 2].std(correction=0)), 1.0, 1.0])
    torch.testing.assert_close(model.error_weight, expected)
    changed = x.clone()
    changed[:, 2] += 100.0
    before, after = model.encode(x), model.encode(changed)
    first = sum(level.latent_dim for level in model.levels["a"])
    assert torch.equal(before[:, :first], after[:, :first])
    assert not torch.equal(before[:, first:], after[:, first:])
    again = CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(**model.config.model_dump(mode="json"))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.get_tokens(x), model.get_tokens(x))


def test_extra_inputs_with_offset_or_constant_are_finite_and_accurate():
    config = CategoricalVQVAEConfig(input_dim=4, group_indices={"a": [0, 1]}, extra_inputs={"a": [2, 3]})
    model = CategoricalHierarchicalVQVAE(config).eval()
    x = torch.randn(50, 4)
    x[:, 2] = 1e4 + (x[:, 2] * 64.0).round() / 64.0
    x[:, 3] = 0.1
    model.fit_extra_inputs(*helpers.column_mean_std(x.double()))
    exact = (x[:, 2].double() - x[:, 2].double().mean()) / x[:, 2].double().std(correction=0)
    torch.testing.assert_close(model.encoder_inputs(x)[:, 2].double(), exact, atol=1e-3, rtol=0.0)
    assert float(model.encoder_inputs(x)[:, 3].abs().max()) < 1e-6
    assert model.error_weight[3] == 1.0


def test_model_without_extra_inputs_has_no_scale_buffers():
    model = make()
    assert not [name for name in model.state_dict() if "input" in name]
    assert torch.equal(model.encoder_inputs(x := features(model)), x[:, model.feature_order])


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ({"a": [0, 1]}, {"extra_inputs": {"a": [1]}}, "feature 1 is in two places"),
        ({"a": [0, 1]}, {"extra_inputs": {"b": [2]}}, "no category 'b'"),
        ({"a": [0, 1]}, {"extra_inputs": {"a": [5]}}, "feature 5 is outside"),
        ({"a": [0, 5]}, {}, r"feature 5 is outside 0\.\.4"),
        ({"a": [0, -1]}, {}, "feature -1 is outside"),
        ({"a": [0, 1], "b": [1, 2]}, {}, "feature 1 is in two places"),
        ({"a": [2, 2]}, {}, "feature 2 is in two places"),
        ({"a": []}, {}, "at least 1 feature"),
        ({}, {}, "at least 1 item"),
        ({"a": [0]}, {"levels": {"b": [LevelConfig(num_tokens=3, latent_dim=2)]}}, "levels and categories differ"),
        ({"a": [0]}, {"decay": 1.0}, "decay"),
        ({"a": [0]}, {"compression_ratios": "x"}, "positive numbers"),
        ({"a": [0]}, {"unknown": 1}, "unknown"),
        ({"a": ["0"]}, {}, "integer"),
    ],
)
def test_invalid_configurations_are_rejected(groups, options, message):
    with pytest.raises(ValueError, match=message):
        CategoricalVQVAEConfig(input_dim=5, group_indices=groups, **options)


@pytest.mark.parametrize("shape", [(4, 12), (13,), (2, 2, 13)])
def test_features_of_another_shape_are_rejected(shape):
    with pytest.raises(ValueError, match=r"\[B, 13\]"):
        make()(torch.zeros(shape))


def test_an_empty_batch_has_empty_results():
    model = make().eval()
    assert model.get_tokens(torch.zeros(0, 13)).shape == (0, 9)
    assert model.decode_from_tokens(torch.zeros(0, 9, dtype=torch.int64)).shape == (0, 13)


@pytest.mark.parametrize(("decoder", "encoder_varies", "decoder_varies"), [(None, True, True), (0.0, True, False)])
def test_decoder_dropout_overrides_dropout(decoder: float | None, encoder_varies: bool, decoder_varies: bool) -> None:
    model = make(dropout=0.5, decoder_dropout=decoder, codebook_init="uniform").train()
    x = torch.randn(16, model.config.input_dim)
    quantized = torch.randn(16, model.quantizer.layout.total_dims)
    assert (not torch.equal(model.encode(x), model.encode(x))) == encoder_varies
    assert (not torch.equal(model.decode(quantized), model.decode(quantized))) == decoder_varies
