"""Combinations of the dtypes of the input, of the layer and of torch's default."""

import pytest
import torch

import spinlock_fast as vq
from spinlock_fast import GroupedVectorQuantizer
from spinlock_fast.compat import VectorQuantizer
from spinlock_fast.compat.codecs import FactorizedResidualVQ

KINDS = {
    "one": lambda **o: vq.VectorQuantize(dim=8, codebook_size=16, **o),
    "cosine": lambda **o: vq.VectorQuantize(dim=8, codebook_size=16, use_cosine_sim=True, **o),
    "heads": lambda **o: vq.VectorQuantize(dim=8, codebook_size=16, heads=2, codebook_dim=4, **o),
    "resets": lambda **o: vq.VectorQuantize(dim=8, codebook_size=16, threshold_ema_dead_code=2, **o),
    "k-means": lambda **o: vq.VectorQuantize(dim=8, codebook_size=16, kmeans_init=True, **o),
    "learned": lambda **o: vq.VectorQuantize(8, 16, learnable_codebook=True, ema_update=False, **o),
    "stages": lambda **o: vq.ResidualVQ(dim=8, codebook_size=16, num_quantizers=3, **o),
    "groups": lambda **o: vq.GroupedResidualVQ(dim=8, groups=2, codebook_size=16, num_quantizers=2, **o),
    "packed": lambda: GroupedVectorQuantizer([9, 4], [5, 3], codebook_init="uniform"),
    "packed, learned": lambda: GroupedVectorQuantizer([9, 4], [5, 3], codebook_init="uniform", use_ema=False),
    "packed, k-means": lambda: GroupedVectorQuantizer([9, 4], [5, 3]),
    "original": lambda: VectorQuantizer(16, 8),
}


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


def step(module, x):
    leaf = x.clone().requires_grad_()
    torch.manual_seed(3)
    found = module(leaf)
    loss = found[2]["loss"] if isinstance(found[2], dict) else found[2].sum()
    (found[0].double().sin().sum() + loss).backward()
    return found[0], leaf.grad, loss


@pytest.mark.parametrize("input_type", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_default_dtype_does_not_change_results(kind, default, input_type, default_dtype):
    torch.manual_seed(0)
    module, other, x = KINDS[kind](), KINDS[kind](), torch.randn(60, 8).to(input_type)
    other.load_state_dict(module.state_dict())
    expected = step(module, x)
    default_dtype(default)
    found = step(other, x)
    for one, two in zip(expected, found, strict=True):
        assert one.dtype == two.dtype
    assert found[0].dtype == found[1].dtype == input_type
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("input_type", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_in_the_default_dtype(kind, default, input_type, default_dtype):
    default_dtype(default)
    torch.manual_seed(0)
    module, x = KINDS[kind](), torch.randn(60, 8, dtype=input_type)
    quantized, grad, _ = step(module, x)
    assert quantized.dtype == grad.dtype == input_type
    again = module.eval()(x)[0]
    assert again.dtype == input_type
    assert torch.isfinite(again).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cosine"])
def test_float64_computes_in_float64(kind):
    """In float32, latents this far from the origin cannot be distinguished."""
    torch.manual_seed(0)
    module, x = KINDS[kind]().double(), torch.randn(60, 8, dtype=torch.float64)
    for book in (m for m in module.modules() if hasattr(m, "embed") or hasattr(m, "embedding")):
        codes = book.embed if hasattr(book, "embed") else getattr(book.embedding, "weight", book.embedding)
        codes.data.copy_(torch.randn(codes.shape, dtype=torch.float64))
    first = next(m for m in module.modules() if hasattr(m, "embed") or hasattr(m, "embedding"))
    codes = first.embed if hasattr(first, "embed") else getattr(first.embedding, "weight", first.embedding)
    near = module.eval()(x)
    if kind not in ("groups", "stages"):
        codes.data.add_(1e4)
        far = module(x + 1e4)
        torch.testing.assert_close(far[0] - 1e4, near[0], rtol=0, atol=1e-7)
    module.train()
    quantized, grad, loss = step(module, x)
    assert quantized.dtype == grad.dtype == loss.dtype == torch.float64
    assert not torch.equal(quantized, quantized.float().double())


@pytest.mark.parametrize("kind", KINDS)
def test_float64_inputs_with_float32_codes_compute_in_float64(kind):
    torch.manual_seed(0)
    module, x = KINDS[kind](), torch.randn(60, 8, dtype=torch.float64)
    module(x)  # k-means may run here
    twin = KINDS[kind]().double()
    twin.load_state_dict(module.state_dict())
    found, expected = step(module, x), step(twin, x)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[2].double(), expected[2], rtol=1e-12, atol=1e-12)


def test_factorized_residual_vq_computes_in_float64():
    torch.manual_seed(0)
    module, x = FactorizedResidualVQ(8, [16, 16], [4, 4]).double(), torch.randn(2, 9, 8, dtype=torch.float64)
    quantized, codes, losses = module(x)
    assert quantized.dtype == losses.dtype == torch.float64
    torch.testing.assert_close(module.get_output_from_indices(codes), quantized, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: vq.VectorQuantize(8, 16, vq_bridge=torch.nn.Linear(8, 8)),
        lambda: vq.ResidualVQ(dim=8, codebook_size=16, num_quantizers=2, implicit_neural_codebook=True),
    ],
    ids=["bridge", "implicit"],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_code_networks_run_in_the_dtype_of_their_weights(make, kind, training):
    module = make().to(kind).train(training)
    x = torch.randn(2, 5, 8, dtype=kind, requires_grad=True)
    quantized, codes, loss = module(x)
    assert quantized.dtype == kind
    (quantized.sum() + loss.sum()).backward()
    torch.testing.assert_close(module.eval().get_output_from_indices(codes).shape, x.shape)
