"""Residual quantizers of audio codecs: shapes, masks, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from spinlock_fast import ResidualVQ
from spinlock_fast.compat.codecs import FactorizedResidualVQ, SplitResidualVQ

DIM, STAGES = 8, 3


def factorized() -> FactorizedResidualVQ:
    return FactorizedResidualVQ(DIM, [6, 7, 5], [3, 3, 2])


def split() -> SplitResidualVQ:
    options: dict[str, Any] = {"dim": DIM, "codebook_size": 6, "codebook_dim": 4}
    acoustic = ResidualVQ(num_quantizers=STAGES - 1, quantize_dropout=True, **options)
    return SplitResidualVQ(ResidualVQ(num_quantizers=1, **options), acoustic)


@pytest.fixture(params=[factorized, split])
def vq(request: pytest.FixtureRequest) -> Any:
    return request.param().eval()


def test_output_shapes(vq: Any) -> None:
    x = torch.randn(2, 5, DIM)
    quantized, indices, losses, codes = vq(x, return_all_codes=True)
    assert quantized.shape == x.shape
    assert indices.shape == (2, 5, STAGES)
    assert indices.dtype == torch.int64
    assert torch.equal(losses, torch.zeros(STAGES))
    assert len(vq.codebooks) == vq.num_quantizers == STAGES
    assert torch.equal(vq(x)[0], quantized)
    torch.testing.assert_close(vq.get_codes_from_indices(indices), codes)
    torch.testing.assert_close(vq.get_output_from_indices(indices), quantized)


def test_masked_rows_have_output_zero_and_code_minus_one(vq: Any) -> None:
    x = torch.randn(2, 5, DIM)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    quantized, indices, _ = vq(x, mask=mask)
    assert torch.equal(quantized[~mask], torch.zeros(3, DIM))
    assert torch.equal(quantized[mask], vq(x)[0][mask])
    assert torch.equal(indices[mask], vq(x)[1][mask])


@pytest.mark.parametrize("given", [0, STAGES + 1])
def test_wrong_number_of_indices_raises(vq: Any, given: int) -> None:
    with pytest.raises(ValueError, match=f"got {given}"):
        vq.get_output_from_indices(torch.zeros(2, 5, given, dtype=torch.int64))


def test_index_minus_one_decodes_to_zero(vq: Any) -> None:
    indices = torch.randint(0, 5, (2, 5, STAGES))
    indices[..., -1] = -1
    torch.testing.assert_close(vq.get_output_from_indices(indices), vq.get_output_from_indices(indices[..., :-1]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("training", [True, False])
def test_factorized_compiles_fullgraph(training: bool) -> None:
    torch._dynamo.reset()
    vq = factorized().train(training)
    x = torch.randn(2, 5, DIM)
    torch.testing.assert_close(torch.compile(vq, fullgraph=True, backend="aot_eager")(x), vq(x))


def test_gradient_reaches_the_input(vq: Any) -> None:
    x = torch.randn(2, 5, DIM, requires_grad=True)
    quantized, _, losses = vq.train()(x)
    assert losses.shape == (STAGES,)
    (quantized.sum() + losses.sum()).backward()
    assert x.grad is not None
    assert (x.grad != 0).any()


def test_factorized_losses_ignore_masked_rows() -> None:
    vq = factorized().train()
    x = torch.randn(2, 5, DIM)
    mask = torch.tensor([[True] * 5, [False] * 5])
    _, indices, losses = vq(x, mask=mask)
    torch.testing.assert_close(losses, vq(x[:1])[2])
    assert torch.equal(indices[1], torch.full((5, STAGES), -1))


def test_factorized_codes_are_selected_by_cosine_similarity() -> None:
    vq = factorized()
    stage = vq.layers[0]
    latents = torch.randn(20, 3)
    cosine = F.normalize(latents) @ F.normalize(stage.codebook.weight).t()
    nearest = stage.nearest(latents)
    assert torch.equal(nearest, cosine.argmax(1))
    assert torch.equal(nearest, stage.nearest(100.0 * latents))
    assert torch.equal(stage.codes_of(nearest), stage.codebook.weight[nearest])


def test_frozen_codebook_has_no_gradient() -> None:
    vq = factorized().train()
    quantized, _, losses = vq(torch.randn(2, 5, DIM), freeze_codebook=True)
    (quantized.sum() + losses.sum()).backward()
    for stage in vq.layers:
        assert stage.codebook.weight.grad is None or not stage.codebook.weight.grad.any()
        assert stage.in_proj.weight.grad.any()


def test_row_that_is_not_finite_has_no_code() -> None:
    x = torch.randn(1, 4, DIM)
    x[0, 2, 1] = torch.nan
    quantized, indices, _ = factorized().eval()(x)
    assert torch.equal(indices[0, 2], torch.full((STAGES,), -1))
    assert quantized[0, 2].isnan().all()
    assert not quantized[0, [0, 1, 3]].isnan().any()


def test_factorized_under_autocast() -> None:
    vq = factorized().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized, indices, losses = vq(torch.randn(2, 5, DIM))
    assert indices.shape == (2, 5, STAGES)
    assert losses.dtype == torch.float32
    assert quantized.isfinite().all()


def test_split_with_indices_raises() -> None:
    with pytest.raises(NotImplementedError, match="indices"):
        split()(torch.randn(2, 5, DIM), indices=torch.zeros(2, 5, STAGES, dtype=torch.int64))


def test_split_without_acoustic_quantizers() -> None:
    whole = split().eval()
    alone = SplitResidualVQ(whole.semantic).eval()
    x = torch.randn(2, 5, DIM)
    assert torch.equal(alone(x)[1], whole(x)[1][..., :1])
    assert torch.equal(alone(x)[0], whole.semantic(x)[0])
