import copy

import helpers
import pytest
import torch

from spinlock_fast import GroupedVectorQuantizer
from spinlock_fast.kernels._common.layout import CodebookLayout

SIZES = ([5, 3, 8], [3, 2, 4])
LAYOUT = CodebookLayout.of(*SIZES)


def make(**options):
    torch.manual_seed(0)
    return GroupedVectorQuantizer(*SIZES, **{"codebook_init": "uniform", **options})


def latents(rows=40, seed=0):
    return helpers.random_group(LAYOUT, rows, seed=seed)[0]


def snapshot(quantizer):
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3), (0,), ()])
def test_shapes_of_the_results(shape):
    quantizer = make().eval()
    quantized, codes, loss = quantizer(torch.randn(*shape, 9))
    assert quantized.shape == (*shape, 9)
    assert codes.shape == (*shape, 3)
    assert codes.dtype == torch.int64
    assert loss.shape == ()


@pytest.mark.parametrize("use_ema", [True, False])
def test_empty_batches_change_nothing(use_ema):
    quantizer = make(use_ema=use_ema)
    before = quantizer.embedding.detach().clone()
    assert quantizer(torch.zeros(0, 9))[2] == 0.0
    assert torch.equal(quantizer.embedding, before)
    assert not quantizer.usage.any()


def test_quantized_values_are_the_nearest_codes():
    quantizer = make().eval()
    z = latents()
    quantized, codes, _ = quantizer(z)
    helpers.assert_nearest(codes, z, quantizer.embedding, LAYOUT)
    for g, part in enumerate(helpers.split_columns(quantized, LAYOUT)):
        assert torch.equal(part, quantizer.codebook(g)[codes[:, g]])
    assert torch.equal(quantizer.lookup(codes), quantized)


@pytest.mark.parametrize("use_ema", [True, False])
def test_loss_against_the_formula(use_ema):
    quantizer = make(commitment_weight=0.7, use_ema=use_ema).eval()
    z = latents().double()
    quantizer = quantizer.double()
    quantized, _, loss = quantizer(z)
    parts = zip(helpers.split_columns(z, LAYOUT), helpers.split_columns(quantized, LAYOUT), strict=True)
    expected = sum((a - b).square().mean() for a, b in parts) * (0.7 if use_ema else 1.7)
    torch.testing.assert_close(loss, expected)


def test_commitment_loss_has_the_right_gradient_with_codes_fixed():
    quantizer = make().double().eval()
    z = latents(6).double().requires_grad_()
    torch.autograd.gradcheck(lambda t: quantizer(t)[2], z)


def test_straight_through_gradient():
    quantizer = make(commitment_weight=0.0).eval()
    z = latents(6).requires_grad_()
    upstream = torch.randn(6, 9)
    quantizer(z)[0].backward(upstream)
    assert torch.equal(z.grad, upstream)


def test_rotation_trick_changes_only_the_gradient():
    z = latents(6).requires_grad_()
    plain, rotated = make().eval()(z)[0], make(rotation_trick=True).eval()(z)[0]
    torch.testing.assert_close(plain, rotated, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(6, 9)
    gradient = torch.autograd.grad(rotated, z, upstream)[0]
    assert gradient.isfinite().all()
    assert not torch.allclose(gradient, upstream)


def test_rotation_of_a_zero_latent_is_finite():
    quantizer = make(rotation_trick=True, commitment_weight=0.0).eval()
    z = torch.zeros(2, 9, requires_grad=True)
    quantized, codes, _ = quantizer(z)
    quantized.sum().backward()
    torch.testing.assert_close(quantized, quantizer.lookup(codes))
    assert z.grad.isfinite().all()


def test_ema_codes_are_buffers():
    assert not list(make().parameters())
    assert [name for name, _ in make(use_ema=False).named_parameters()] == ["embedding"]


def test_learned_codes_get_the_gradient_of_their_error():
    quantizer = make(use_ema=False).double()
    z = latents().double()
    _, codes, loss = quantizer(z)
    loss.backward()
    expected = torch.zeros_like(quantizer.embedding)
    for g, part in enumerate(helpers.split_columns(z, LAYOUT)):
        book = expected[LAYOUT.entry_slice(g)].view(LAYOUT.num_codes[g], -1)
        error = 2.0 * (quantizer.codebook(g)[codes[:, g]] - part) / part.numel()
        book.index_add_(0, codes[:, g], error.detach())
    torch.testing.assert_close(quantizer.embedding.grad, expected)


def test_codes_are_updated_only_in_training():
    quantizer = make()
    before = snapshot(quantizer)
    quantizer.eval()(latents())
    assert_same(snapshot(quantizer), before)
    quantizer.train()(latents())
    assert not torch.equal(quantizer.embedding, before["embedding"])


def test_frozen_codes_are_not_updated():
    quantizer = make()
    quantizer.freeze()
    before = snapshot(quantizer)
    quantizer(latents())
    assert_same(snapshot(quantizer), before)
    assert quantizer.rows_seen == len(latents())
    assert quantizer.usage.sum() == len(latents()) * quantizer.layout.groups
    quantizer.freeze(False)
    quantizer(latents())
    assert not torch.equal(quantizer.embedding, before["embedding"])


def test_loss_uses_the_codes_before_the_update():
    quantizer = make()
    expected = copy.deepcopy(quantizer).eval()(latents())[2]
    assert torch.equal(quantizer.train()(latents())[2], expected)


def test_moving_average_follows_the_data():
    quantizer = make(decay=0.9)
    z = 3.0 + 0.01 * latents(64)
    for _ in range(200):
        quantizer(z)
    assert quantizer.eval()(z)[2] < 1e-3


def test_codes_are_fitted_to_the_first_training_batch():
    quantizer = GroupedVectorQuantizer(*SIZES)
    assert not quantizer.initialized
    quantizer.eval()(latents())
    assert not quantizer.initialized
    quantizer.freeze()
    z = 50.0 + latents(200)
    _, _, loss = quantizer.train()(z)
    assert quantizer.initialized
    assert loss < 2.0
    counts = quantizer.cluster_size
    assert [counts[LAYOUT.code_slice(g)].sum().item() for g in range(3)] == [200.0] * 3
    torch.testing.assert_close(
        quantizer.embedding_sum, quantizer.embedding * counts[LAYOUT.indices(z.device).code_of_entry]
    )


def test_codes_are_initialised_once():
    quantizer = GroupedVectorQuantizer(*SIZES, decay=0.99)
    quantizer(latents())
    before = quantizer.embedding.clone()
    quantizer(100.0 + latents())
    # One step of decay 0.99 moves a code at most about 1 % of the way, or wholly if it had no rows.
    assert (quantizer.embedding - before).abs().median() < 20.0


def test_initialization_leaves_masked_rows_out():
    quantizer = GroupedVectorQuantizer(*SIZES)
    z = latents()
    z[::2] = 1e6
    quantizer(z, mask=torch.arange(40) % 2 == 1)
    assert quantizer.embedding.abs().max() < 100.0


def test_a_first_batch_without_valid_rows_changes_nothing():
    quantizer = GroupedVectorQuantizer(*SIZES)
    quantizer(torch.full((3, 9), torch.nan))
    assert quantizer.embedding.isfinite().all()
    assert not quantizer.initialized


def test_state_dict_round_trips():
    trained, fresh = make(), GroupedVectorQuantizer(*SIZES)
    trained(latents())
    fresh.load_state_dict(trained.state_dict())
    assert_same(snapshot(fresh), snapshot(trained))
    z = latents(seed=5)
    assert torch.equal(fresh.eval()(z)[1], trained.eval()(z)[1])


@pytest.mark.parametrize("prefix", ["", "quantizer."])
def test_loaded_codes_are_not_initialised_again(prefix):
    trained, fresh = GroupedVectorQuantizer(*SIZES, decay=0.5), GroupedVectorQuantizer(*SIZES, decay=0.5)
    trained(latents())
    if prefix:
        torch.nn.ModuleDict({"quantizer": fresh}).load_state_dict(
            {prefix + name: value for name, value in trained.state_dict().items()}
        )
    else:
        fresh.load_state_dict(trained.state_dict())
    z = 100.0 + latents(seed=1)
    trained(z)
    fresh(z)
    assert_same(snapshot(fresh), snapshot(trained))


def test_loaded_untrained_state_is_initialised_on_the_first_batch():
    fresh = make(codebook_init="kmeans")
    fresh.load_state_dict(GroupedVectorQuantizer(*SIZES).state_dict())
    fresh(50.0 + latents())
    assert fresh.initialized


def test_reset_usage_starts_a_new_window():
    quantizer = make()
    assert quantizer.utilization().tolist() == quantizer.perplexity().tolist() == [0.0] * 3
    for seed in range(10):
        quantizer(latents(seed=seed))
    assert (quantizer.utilization() <= 1.0).all()
    assert (quantizer.perplexity() <= torch.tensor([5.0, 3.0, 8.0]) + 1e-4).all()
    assert quantizer.usage.sum() == 3 * 10 * 40
    quantizer.reset_usage()
    assert not quantizer.utilization().any()


def test_nonfinite_rows_are_counted_and_not_coded():
    quantizer = make()
    z = latents()
    z[3], z[5, 0], z[7, 8] = torch.nan, torch.inf, torch.nan
    quantized, codes, loss = quantizer(z)
    assert quantizer.nonfinite_rows == 2  # the most of any codebook: rows 3 and 5 in the first
    assert codes[3].tolist() == [-1, -1, -1]
    assert (codes[5] >= 0).tolist() == [False, True, True]
    assert quantized[3].isnan().all()
    assert loss.isfinite()
    assert quantizer.embedding.isfinite().all()
    quantizer.reset_usage()
    assert quantizer.nonfinite_rows == 0


def test_masked_rows_do_not_affect_values_loss_and_update():
    z = latents()
    mask = torch.arange(40) % 3 != 0
    masked, alone = make(), make()
    quantized, codes, loss = masked(z, mask=mask)
    expected = alone(z[mask])
    assert (codes[~mask] == -1).all()
    assert not quantized[~mask].any()
    assert torch.equal(codes[mask], expected[1])
    torch.testing.assert_close(loss, expected[2])
    for name, value in snapshot(alone).items():
        torch.testing.assert_close(masked.state_dict()[name], value)
    assert masked.nonfinite_rows == 0


@pytest.mark.parametrize("use_ema", [True, False])
def test_masked_rows_get_no_gradient(use_ema):
    quantizer = make(use_ema=use_ema)
    z = latents(6).requires_grad_()
    mask = torch.tensor([True, False, True, True, False, True])
    quantizer(z, mask=mask)[2].backward()
    assert not z.grad[~mask].any()
    assert z.grad[mask].isfinite().all()
    assert z.grad[mask].any()
    if not use_ema:
        assert quantizer.embedding.grad.isfinite().all()


def test_a_mask_of_the_shape_of_the_rows():
    quantizer = make().eval()
    mask = torch.tensor([[True, False, True], [False, True, True]])
    _, codes, _ = quantizer(torch.randn(2, 3, 9), mask=mask)
    assert torch.equal((codes >= 0).all(-1), mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents(dtype):
    quantizer = make()
    z = latents().to(dtype).requires_grad_()
    quantized, _, loss = quantizer(z)
    (quantized.float().square().sum() + loss).backward()
    assert quantized.dtype == z.grad.dtype == dtype
    assert quantizer.embedding.dtype == torch.float32
    assert z.grad.isfinite().all()


def test_reset_replaces_and_counts_dead_codes():
    quantizer = make()
    quantizer.cluster_size[8:16] = torch.tensor([0.0, 0.0, 0.0, 5.0, 5.0, 5.0, 5.0, 5.0])
    assert quantizer.reset_dead_codes().tolist() == [0, 0, 2]
    assert quantizer.reset_dead_codes(strategy="sample", latents=latents()).tolist() == [0, 0, 1]


def test_reset_works_on_learned_codes():
    quantizer = make(use_ema=False)
    quantizer.cluster_size[8:10] = 0.0
    before = quantizer.embedding.detach().clone()
    assert quantizer.reset_dead_codes().sum() == 2
    assert quantizer.embedding.requires_grad
    assert not torch.equal(quantizer.embedding, before)


@pytest.mark.parametrize("g", [-1, 3])
def test_codebook_index_out_of_range(g):
    with pytest.raises(IndexError):
        make().codebook(g)


@pytest.mark.parametrize(
    "options",
    [{"decay": 1.0}, {"decay": -0.1}, {"codebook_init": "x"}, {"smoothing": "x"}, {"backend": "cuda"}],
)
def test_invalid_options_are_rejected(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)


@pytest.mark.parametrize("shape", [(4, 8), (9, 4)])
def test_latents_of_another_width_are_rejected(shape):
    with pytest.raises(ValueError, match="9"):
        make()(torch.zeros(shape))


def test_backend_and_sizes_are_properties():
    quantizer = make()
    assert quantizer.backend == "reference"
    assert (quantizer.num_codes, quantizer.dims) == ((5, 3, 8), (3, 2, 4))
    assert quantizer.codebook(2).shape == (8, 4)
    assert "3 codebooks" in repr(quantizer)


def test_deep_copies_are_independent():
    quantizer = make()
    other = copy.deepcopy(quantizer)
    before = snapshot(quantizer)
    other(latents())
    assert_same(snapshot(quantizer), before)


def test_laplace_smoothing_changes_unused_codes():
    plain, laplace = make(), make(smoothing="laplace")
    z = torch.cat([latents(8)] * 2)
    for _ in range(3):
        plain(z)
        laplace(z)
    assert not torch.equal(plain.embedding, laplace.embedding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_in_half_precision(dtype):
    quantizer = make().to(dtype)
    z = latents().to(dtype)
    quantized, codes, loss = quantizer(z)
    assert quantized.dtype == dtype
    assert (codes >= 0).all()
    assert loss.isfinite()


def test_training_after_first_use_in_inference_mode():
    quantizer = GroupedVectorQuantizer([3, 5], [2, 7], codebook_init="uniform")
    quantizer.layout._cache.clear()
    with torch.inference_mode():
        quantizer.eval()(torch.randn(4, 9))
    z = torch.randn(4, 9, requires_grad=True)
    quantizer.train()(z)[2].backward()
    assert z.grad.isfinite().all()


def test_usage_counts_exceed_float_precision():
    quantizer = make().to(torch.bfloat16)
    quantizer.usage += 1 << 24
    quantizer.rows_seen += (1 << 24) * 8
    before = quantizer.usage.clone()
    quantizer(latents(3).to(torch.bfloat16))
    assert quantizer.usage.dtype == quantizer.rows_seen.dtype == torch.int64
    assert (quantizer.usage - before).sum() == 9
    assert quantizer.rows_seen == (1 << 24) * 8 + 3
    quantizer.reset_usage()
    for _ in range(2):
        quantizer(torch.zeros(131_073, 9, dtype=torch.bfloat16))
    assert quantizer.rows_seen == 262_146
    assert quantizer.nonfinite_rows == 0


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16])
def test_averages_stay_float32_in_half_precision(cast):
    quantizer, wide = make(decay=0.999), make(decay=0.999)
    cast(quantizer)
    assert quantizer.embedding.dtype in (torch.float16, torch.bfloat16)
    for _ in range(20):
        for module in (quantizer, wide):
            module(latents().to(module.embedding.dtype))
    assert quantizer.cluster_size.dtype == quantizer.embedding_sum.dtype == torch.float32
    torch.testing.assert_close(quantizer.cluster_size, wide.cluster_size, rtol=0.02, atol=0.02)
    assert quantizer.double().cluster_size.dtype == torch.float64


def test_masked_nonfinite_rows_do_not_reach_the_next_layer():
    quantizer, after = make(), torch.nn.Linear(9, 2)
    z = latents(6).requires_grad_()
    mask = torch.tensor([True, False, True, True, False, True])
    quantized, codes, loss = quantizer(z, mask=mask)
    (after(quantized).square().mean(1)[mask].sum() + loss).backward()
    assert not quantized[~mask].any()
    assert (codes[~mask] == -1).all()
    assert not z.grad[~mask].any()
    assert all(p.grad.isfinite().all() for p in [z, *after.parameters()])
    assert quantizer(z, mask=torch.zeros(6, dtype=torch.bool))[2] == 0.0
