"""`compat.VectorQuantizer` against the update rules of the original project."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from spinlock_fast.compat import VectorQuantizer

K, D = 7, 5


def make(use_ema: bool = True) -> VectorQuantizer:
    torch.manual_seed(0)
    vq = VectorQuantizer(K, D, commitment_cost=0.3, decay=0.9, epsilon=1e-5, use_ema=use_ema)
    vq.embedding.weight.data.normal_()
    if use_ema:
        vq.ema_w.copy_(vq.embedding.weight.detach())
        vq.ema_cluster_size.fill_(1.0)
    return vq


@pytest.mark.parametrize("use_ema", [True, False])
def test_state_dict_has_original_keys(use_ema: bool) -> None:
    expected = {"embedding.weight"} | ({"ema_cluster_size", "ema_w"} if use_ema else set())
    assert set(VectorQuantizer(K, D, use_ema=use_ema).state_dict()) == expected


@pytest.mark.parametrize("shape", [(11, D), (3, 4, D), (2, 3, 2, D)])
def test_shapes_and_values(shape: tuple[int, ...]) -> None:
    vq = make().eval()
    z = torch.randn(shape, requires_grad=True)
    quantized, encodings, losses = vq(z)
    codes = torch.cdist(z.reshape(-1, D).double(), vq.embedding.weight.double()).argmin(1)
    assert torch.equal(encodings.argmax(-1).flatten(), codes)
    assert encodings.shape == (*shape[:-1], K)
    assert torch.equal(encodings.sum(-1), torch.ones(shape[:-1]))
    assert torch.equal(quantized, vq.get_codebook_entry(codes).view(shape))
    error = F.mse_loss(vq.embedding.weight[codes].view(shape), z)
    assert losses["loss"].item() == pytest.approx(1.3 * error.item())
    quantized.sum().backward()
    assert torch.equal(z.grad, torch.ones(shape))


def test_moving_averages_follow_the_laplace_rule() -> None:
    vq = make().train()
    n, s, e = vq.ema_cluster_size.double(), vq.ema_w.double(), vq.embedding.weight.detach().double()
    for _ in range(10):
        z = torch.randn(40, D)
        codes = torch.cdist(z.double(), e).argmin(1)
        one_hot = F.one_hot(codes, K).double()
        vq(z)
        n = 0.9 * n + 0.1 * one_hot.sum(0)
        total = n.sum()
        n = (n + 1e-5) / (total + K * 1e-5) * total
        s = 0.9 * s + 0.1 * one_hot.t() @ z.double()
        e = s / n[:, None]
    torch.testing.assert_close(vq.ema_cluster_size.double(), n, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vq.embedding.weight.detach().double(), e, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_two_losses() -> None:
    vq = make(use_ema=False)
    z = torch.randn(40, D, requires_grad=True)
    _, encodings, losses = vq(z)
    losses["loss"].backward()
    chosen = encodings @ vq.embedding.weight.detach()
    torch.testing.assert_close(z.grad, 2 * (z.detach() - chosen) / z.numel())
    torch.testing.assert_close(vq.embedding.weight.grad, 0.3 * 2 * encodings.t() @ (chosen - z.detach()) / z.numel())


def test_losses_backward_after_the_codebook_update() -> None:
    vq = make().train()
    z = torch.randn(40, D, requires_grad=True)
    before = vq.embedding.weight.detach().clone()
    _, encodings, losses = vq(z)
    losses["loss"].backward()
    torch.testing.assert_close(z.grad, 2 * (z.detach() - encodings @ before) / z.numel())


def test_wrong_dimension_raises() -> None:
    with pytest.raises(ValueError, match="must be"):
        make()(torch.randn(3, D + 1))


def test_row_that_is_not_finite_has_no_code() -> None:
    z = torch.randn(4, D)
    z[2, 1] = torch.nan
    quantized, encodings, losses = make()(z)
    assert encodings[2].sum() == 0
    assert quantized[2].isnan().all()
    assert losses["loss"].isnan()
