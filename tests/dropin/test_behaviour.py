"""Behaviour of the drop-in quantizers beyond equality with vector-quantize-pytorch; see docs/drop-in.md."""

import copy
import sys
import warnings

import pytest
import torch

import spinlock_fast
from spinlock_fast import GroupedResidualVQ, ResidualVQ, VectorQuantize
from spinlock_fast.dropin import arguments

KINDS = {
    "plain": (VectorQuantize, {}),
    "cosine per head": (VectorQuantize, {"use_cosine_sim": True, "heads": 2, "separate_codebook_per_head": True}),
    "k-means and resets": (VectorQuantize, {"kmeans_init": True, "threshold_ema_dead_code": 2}),
    "learned": (VectorQuantize, {"learnable_codebook": True, "ema_update": False}),
    "orthogonal": (VectorQuantize, {"orthogonal_reg_weight": 1.0}),
    "random codes": (VectorQuantize, {"stochastic_sample_codes": True}),
    "stages": (ResidualVQ, {"num_quantizers": 3}),
    "shared": (ResidualVQ, {"num_quantizers": 3, "shared_codebook": True}),
    "dropout": (ResidualVQ, {"num_quantizers": 3, "quantize_dropout": True}),
    "groups": (GroupedResidualVQ, {"num_quantizers": 2, "groups": 2, "quantize_dropout": True}),
}


def make(kind, **more):
    torch.manual_seed(0)
    cls, options = KINDS[kind]
    return cls(dim=8, codebook_size=16, **options, **more)


@pytest.mark.parametrize(
    ("kind", "training"),
    [(kind, True) for kind in KINDS]
    + [pytest.param(kind, False, marks=[] if kind in ("plain", "stages") else pytest.mark.slow) for kind in KINDS],
)
@pytest.mark.filterwarnings("ignore")
def test_compile_fullgraph_matches_eager(kind, training):
    torch._dynamo.reset()
    quantizer, plain = make(kind).train(training), make(kind).train(training)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    x, mask = torch.randn(2, 40, 8), torch.rand(2, 40) > 0.3
    for _ in range(2):
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, expected = compiled(leaf, mask=mask), plain(other, mask=mask)
        if kind in ("plain", "learned", "orthogonal", "stages", "shared", "cosine per head"):
            torch.testing.assert_close(found, expected)
            if training:
                (found[0].sin().sum() + found[2].sum()).backward()
                (expected[0].sin().sum() + expected[2].sum()).backward()
                torch.testing.assert_close(leaf.grad, other.grad)
            torch.testing.assert_close(quantizer.state_dict(), plain.state_dict())


def test_other_classes_come_from_vector_quantize_pytorch():
    vector_quantize_pytorch = pytest.importorskip("vector_quantize_pytorch")
    assert spinlock_fast.FSQ is vector_quantize_pytorch.FSQ
    theirs = {
        name for name in vars(vector_quantize_pytorch) if isinstance(getattr(vector_quantize_pytorch, name), type)
    }
    for name in theirs:
        assert getattr(spinlock_fast, name) is not None


def test_other_classes_without_the_package_raise(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(ImportError, match="LFQ is provided by another package: pip install vector-quantize-pytorch"):
        _ = spinlock_fast.LFQ
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = spinlock_fast.Nonsense


@pytest.mark.parametrize("kind", ["plain", "stages"])
def test_usage_statistics_match_counts(kind):
    quantizer = make(kind)
    x = torch.randn(4, 100, 8)
    counts = 0
    for _ in range(2):
        codes = quantizer(x)[1].flatten(0, 1).view(400, -1)
        counts = counts + torch.stack([torch.bincount(column, minlength=16) for column in codes.T])
    share = counts.double() / counts.sum(1, keepdim=True)
    perplexity = (-torch.xlogy(share, share).sum(1)).exp().float()
    used = (counts > 0).float().mean(1)
    torch.testing.assert_close(quantizer.perplexity().reshape(-1), perplexity)
    torch.testing.assert_close(quantizer.utilization().reshape(-1), used)
    quantizer.eval()(x)
    torch.testing.assert_close(quantizer.utilization().reshape(-1), used)
    quantizer.reset_usage()
    assert quantizer.perplexity().abs().sum() == 0


def test_usage_statistics_of_groups_and_heads():
    groups, heads = make("groups"), make("cosine per head")
    for quantizer in (groups, heads):
        quantizer(torch.randn(2, 40, 8))
    assert groups.utilization().shape == groups.perplexity().shape == (2, 2)
    assert heads.utilization().shape == (2,)
    groups.reset_usage()
    assert groups.utilization().sum() == 0


def test_accumulated_batches_are_one_update():
    whole, parts = make("plain"), make("plain")
    x = torch.randn(4, 30, 8)
    whole(x)
    for i in range(4):
        parts(x[i : i + 1], accum_ema_update=i < 3)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, parts.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "cosine per head", "stages"])
def test_half_precision_computes_in_float32(kind, dtype):
    half, full = make(kind), make(kind)
    x = torch.randn(2, 50, 8).to(dtype)
    one, other = x.clone().requires_grad_(), x.float().requires_grad_()
    (narrow, codes, loss), (wide, wide_codes, wide_loss) = half(one), full(other)
    assert torch.equal(codes, wide_codes)
    torch.testing.assert_close(narrow, wide.to(dtype))
    assert torch.equal(loss, wide_loss)
    for name, value in half.state_dict().items():
        assert torch.equal(value, full.state_dict()[name]), name
    (narrow.sum() + loss.sum()).backward()
    assert one.grad.dtype == dtype


def test_half_precision_module_output():
    quantizer = make("stages").half()
    quantized, *_ = quantizer(torch.randn(2, 50, 8).half())
    assert quantized.dtype == torch.float16
    assert torch.isfinite(quantized).all()
    assert quantizer.utilization().max() <= 1


def test_correction_reset_scale():
    torch.manual_seed(1)
    x = torch.randn(1, 4000, 8)
    replaced = {}
    for corrections in ((), ("reset_scale",)):
        quantizer = VectorQuantize(8, 64, threshold_ema_dead_code=1.5, decay=0.9, corrections=corrections)
        quantizer._codebook.embed[:, 32:] = 100.0  # never chosen
        quantizer._codebook.cluster_size[:, 32:] = 0.0
        quantizer(x)
        replaced[bool(corrections)] = quantizer._codebook.cluster_size[0, 32:]
        assert (quantizer._codebook.embed.abs() < 50).all()
        assert (quantizer.codebook[32:, None] == x).all(-1).any(1).all()  # rows of the batch
    assert (replaced[False] == 1.5).all()
    assert (replaced[True] > 1.5).all()


def test_correction_kmeans_scale():
    x = torch.randn(1, 4, 8)
    for corrections, origin in (((), True), ("kmeans_scale", False)):
        torch.manual_seed(0)
        quantizer = VectorQuantize(8, 12, kmeans_init=True, ema_update=False, corrections=corrections)
        quantizer(x)
        assert bool((quantizer.codebook.norm(dim=1) < 1e-3).any()) == origin


def test_kmeans_init_fits_clusters():
    torch.manual_seed(0)
    centres = 10 * torch.randn(4, 8)
    x = centres[torch.randint(0, 4, (500,))] + 0.1 * torch.randn(500, 8)
    losses = []
    for seed in range(8):
        torch.manual_seed(seed)
        quantizer = VectorQuantize(8, 16, kmeans_init=True)
        losses.append(float(quantizer(x)[2].detach()))
    assert sorted(losses)[4] < 0.05
    assert bool(quantizer._codebook.initted)


def test_random_codes_follow_the_softmax_of_distances():
    quantizer = VectorQuantize(2, 3, stochastic_sample_codes=True, sample_codebook_temp=0.7)
    quantizer.codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    x = torch.tensor([[0.3, 0.4]]).repeat(20000, 1)
    codes = quantizer(x, freeze_codebook=True)[1]
    share = torch.bincount(codes, minlength=3) / 20000
    expected = (-torch.cdist(x[:1], quantizer.codebook) / 0.7).softmax(1)[0]
    torch.testing.assert_close(share, expected, rtol=0, atol=0.02)
    assert (quantizer.eval()(x)[1] == 0).all()


@pytest.mark.parametrize("kind", ["plain", "stages"])
def test_peak_memory_is_below_a_distance_matrix(kind):
    rows, codes = 4096, 4096
    quantizer = (
        VectorQuantize(4, codes) if kind == "plain" else ResidualVQ(dim=4, codebook_size=codes, num_quantizers=2)
    )
    x = torch.randn(rows, 4, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        quantized, _, loss = quantizer(x)
        (quantized.sum() + loss.sum()).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < rows * codes  # bytes: a quarter of one matrix of distances


@pytest.mark.parametrize("kind", ["plain", "cosine per head", "stages", "shared"])
def test_output_from_indices_equals_eval_output(kind):
    quantizer = make(kind, codebook_dim=4).eval()
    quantized, codes, loss = quantizer(torch.randn(2, 5, 8))
    torch.testing.assert_close(quantizer.get_output_from_indices(codes), quantized)
    assert loss.sum() == 0
    assert codes.dtype == torch.int64


@pytest.mark.parametrize("options", [{"codebook_dim": 4}, {"heads": 2, "codebook_dim": 3}])
def test_output_from_indices_of_images_equals_eval_output(options):
    quantizer = VectorQuantize(8, 16, accept_image_fmap=True, **options).eval()
    quantized, codes, _ = quantizer(torch.randn(2, 8, 3, 5))
    assert codes.shape[:3] == (2, 3, 5)
    torch.testing.assert_close(quantizer.get_output_from_indices(codes), quantized)


def test_residual_vq_image_shapes():
    quantizer = ResidualVQ(dim=8, codebook_size=16, num_quantizers=3, accept_image_fmap=True)
    quantized, codes, losses, every = quantizer(torch.randn(2, 8, 3, 5), return_all_codes=True)
    assert quantized.shape == (2, 8, 3, 5)
    assert codes.shape == (2, 3, 5, 3)
    assert every.shape == (3, 2, 3, 5, 8)
    assert losses.shape == (3,)


def test_decoding_of_fewer_stages():
    quantizer = make("dropout").eval()
    quantized, codes, _ = quantizer(torch.randn(2, 5, 8))
    assert quantizer.get_output_from_indices(codes[..., :2]).shape == quantized.shape
    with pytest.raises(ValueError, match="without quantize_dropout, indices are of 3 stages, got 2"):
        make("stages").get_output_from_indices(codes[..., :2])


def test_unfused_argument_warns_once():
    arguments.warn_unfused.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            VectorQuantize(8, 16, commitment_use_cross_entropy_loss=True)
    (warning,) = caught
    assert str(warning.message).startswith(
        "commitment_use_cross_entropy_loss is not fused: it runs on the reference path"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cosine_sim": True, "learnable_codebook": True, "ema_update": False}, "use_cosine_sim does not go with"),
        ({"learnable_codebook": True, "ema_update": True}, "ema_update does not go with learnable_codebook"),
        ({"straight_through": True}, "straight_through and rotation_trick exclude each other"),
        ({"sync_update_v": 0.5}, "sync_update_v needs learnable_codebook"),
        ({"directional_reparam": True}, "directional_reparam needs threshold_ema_dead_code above 0"),
        ({"corrections": ["colour"]}, "corrections must be among beam_update.*got colour"),
    ],
)
def test_incompatible_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantize(8, 16, **options)


@pytest.mark.parametrize("cls", [VectorQuantize, ResidualVQ])
def test_wrong_mask_shape_raises_without_an_update(cls):
    quantizer = cls(dim=8, codebook_size=16, **({"num_quantizers": 2} if cls is ResidualVQ else {}))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    for shape in ((4, 2), (8,), (1, 8)):
        with pytest.raises(ValueError, match=r"mask must be \[2, 4\] bool"):
            quantizer(torch.randn(2, 4, 8), mask=torch.ones(shape, dtype=torch.bool))
    torch.testing.assert_close(quantizer.state_dict(), before)


@pytest.mark.parametrize("kind", ["plain", "stages"])
def test_no_gradient_in_evaluation(kind):
    x = torch.randn(2, 20, 8, requires_grad=True)
    quantized = make(kind).eval()(x)[0]
    assert not quantized.requires_grad
    assert make(kind).train()(x)[0].requires_grad


def test_load_state_dict_discards_accumulated_sums():
    x, quantizer, other = torch.randn(1, 50, 8), make("plain"), make("plain")
    state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(torch.randn(1, 50, 8) + 3.0, accum_ema_update=True)
    quantizer.load_state_dict(state)
    for vq in (quantizer, other):
        vq(x)
    torch.testing.assert_close(quantizer.state_dict(), other.state_dict())


def test_invalid_dtype_and_sizes_raise():
    with pytest.raises(ValueError, match=r"floating-point type, got torch\.int64"):
        make("plain")(torch.zeros(1, 3, 8, dtype=torch.int64))
    for cls, more in ((VectorQuantize, {}), (ResidualVQ, {"num_quantizers": 2})):
        with pytest.raises(ValueError, match="codebook_size and dim must be at least 1, got 0 and 8"):
            cls(dim=8, codebook_size=0, **more)


def test_invalid_calls_raise():
    quantizer = make("plain")
    with pytest.raises(ValueError, match="mask or lens"):
        quantizer(torch.randn(2, 5, 8), mask=torch.ones(2, 5).bool(), lens=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="topk must be at least 1"):
        quantizer(torch.randn(2, 5, 8), topk=0)
    with pytest.raises(ValueError, match="mask does not go with"):
        quantizer(torch.randn(5, 8), mask=torch.ones(5).bool())
    with pytest.raises(ValueError, match="3 dimensions"):
        quantizer(torch.randn(2, 2, 5, 8))
    with pytest.raises(TypeError, match="colour"):
        VectorQuantize(8, 16, colour="blue")


@pytest.mark.filterwarnings("ignore:.*is not fused")
def test_batch_without_rows_has_zero_loss():
    options = {
        "plain": {},
        "projection": {"codebook_dim": 4, "heads": 2},
        "learned": {"learnable_codebook": True, "ema_update": False},
        "affine": {"affine_param": True},
        "cross entropy": {"commitment_use_cross_entropy_loss": True},
        "orthogonal": {"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True},
        "cosine": {"use_cosine_sim": True, "threshold_ema_dead_code": 2},
        "diversity": {"codebook_diversity_loss_weight": 1.0},
    }
    layers = {name: VectorQuantize(8, 16, **more) for name, more in options.items()}
    layers["stages"] = ResidualVQ(dim=8, codebook_size=16, num_quantizers=3)
    layers["k-means"] = ResidualVQ(dim=8, codebook_size=16, num_quantizers=3, kmeans_init=True)
    layers["beam"] = ResidualVQ(dim=8, codebook_size=16, num_quantizers=3, beam_size=2)
    for name, layer in layers.items():
        for n, masked in ((5, True), (0, False)):
            x = torch.randn(2, n, 8, requires_grad=True)
            mask = torch.zeros(2, n, dtype=torch.bool) if masked else None
            quantized, _, loss = layer(x, mask=mask)
            assert loss.isfinite().all(), name
            assert name in ("orthogonal", "diversity") or not loss.any(), name
            (quantized.sum() + loss.sum()).backward()
            assert x.grad is None or x.grad.isfinite().all(), name
        assert all(value.isfinite().all() for value in layer.state_dict().values() if value is not None), name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["vector", "stages", "grouped"])
@pytest.mark.filterwarnings("ignore")
def test_kmeans_init_uses_the_first_batch_with_rows(kind, compiled):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append([node for node in graph.graph.nodes if "start" in str(node.target) or "init" in str(node.target)])
        return graph

    make = {
        "vector": lambda: VectorQuantize(8, 4, kmeans_init=True),
        "stages": lambda: ResidualVQ(dim=8, codebook_size=4, num_quantizers=2, kmeans_init=True),
        "grouped": lambda: spinlock_fast.GroupedVectorQuantizer([4, 3], [5, 3]),
    }
    layer = make[kind]()
    call = torch.compile(layer, backend=backend) if compiled else layer
    x = 50.0 + torch.randn(2, 40, 8)
    nothing, everything = torch.zeros(2, 40, dtype=torch.bool), torch.ones(2, 40, dtype=torch.bool)
    for mask in (nothing, nothing):
        assert not call(x, mask=mask)[2].any()
    first = layer.layers[0] if kind == "stages" else layer
    started = first.initialized if kind == "grouped" else first._codebook.initted
    assert not started
    quantized, _, loss = call(x, mask=everything)
    assert started
    assert loss.sum() < 10.0
    assert (quantized - x).abs().mean() < 5.0
    for _ in range(2):
        call(x, mask=everything)
    copied = copy.deepcopy(layer)
    copied(x)
    if compiled:  # the second graph has no k-means operator, which synchronises with the host
        assert len(graphs) == 2
        assert graphs[0]
        assert not graphs[1]


def test_moving_averages_stay_float32_in_half_precision():
    layer = make("plain").bfloat16()
    assert layer._codebook.embed.dtype == torch.bfloat16
    assert layer._codebook.cluster_size.dtype == layer._codebook.embed_avg.dtype == torch.float32
    x = torch.zeros(1, 131_073, 8).bfloat16()
    for _ in range(2):
        layer(x)
    assert layer._codebook.usage.sum() == 262_146


@pytest.mark.parametrize("options", [{"commitment_use_cross_entropy_loss": True}, {"orthogonal_reg_weight": 1.0}])
@pytest.mark.filterwarnings("ignore:.*is not fused")
def test_gradients_use_codes_before_the_update(options):
    torch.manual_seed(0)
    moving = VectorQuantize(8, 16, **options)
    frozen = copy.deepcopy(moving)
    frozen._codebook.decay = 1.0  # averages and codes stay constant, up to smoothing
    moving._codebook.embed_avg.copy_(moving._codebook.embed.detach())
    grads = []
    for layer, manual in ((moving, False), (frozen, True)):
        layer._codebook.manual_ema_update = manual
        x = torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        layer(x)[2].backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)
