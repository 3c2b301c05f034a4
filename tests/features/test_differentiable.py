"""The gradient of clipped features."""

from __future__ import annotations

import torch

from spinlock_fast.features.differentiable import inward_clamp


def test_the_gradient_of_the_clamp_leads_inward() -> None:
    x = torch.tensor([-3.0, -3.0, 0.5, 3.0, 3.0], requires_grad=True)
    low, high = torch.full((5,), -1.0), torch.full((5,), 1.0)
    out = inward_clamp(x, low, high)
    assert torch.equal(out, x.detach().clamp(-1.0, 1.0))
    (grad,) = torch.autograd.grad(out, x, torch.tensor([-2.0, 2.0, 5.0, 2.0, -2.0]))
    assert grad.tolist() == [-2.0, 0.0, 5.0, 2.0, 0.0]
