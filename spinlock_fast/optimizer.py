"""Adam in one fused operation, with the rate in a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_BETAS = (0.9, 0.999)
_EPS = 1e-8


class FusedAdam:
    """Adam (Kingma and Ba 2015), or AdamW (Loshchilov and Hutter 2019) where the decay is decoupled.

    The arithmetic is that of `torch.optim.Adam(fused=True)`, and so is the form of `state_dict`. It is not used itself
    because making one imports torch's compiler, which takes longer than loading 10,000 rows.

    Args:
        parameters: to be moved; those without a gradient stay.
        rate: learning rate, a tensor of one element that is read at every step, on the device if that is CUDA.
        weight_decay: L2 penalty, or the share of a weight that goes with each step at rate 1.
        decoupled: AdamW.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], rate: Tensor, weight_decay: float = 0.0, decoupled: bool = False
    ) -> None:
        self.parameters = list(parameters)
        self.rate = rate
        self.weight_decay = weight_decay
        self.decoupled = decoupled
        self.mean = [torch.zeros_like(p, memory_format=torch.preserve_format) for p in self.parameters]
        self.square = [torch.zeros_like(p, memory_format=torch.preserve_format) for p in self.parameters]
        self.count = torch.zeros((), device=self.parameters[0].device)  # steps done, of all parameters

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Moves the parameters against their gradients."""
        self.count += 1
        gradients = {i: p.grad for i, p in enumerate(self.parameters) if p.grad is not None}
        fused = torch._fused_adamw_ if self.decoupled else torch._fused_adam_
        fused(
            [self.parameters[i] for i in gradients],
            list(gradients.values()),
            [self.mean[i] for i in gradients],
            [self.square[i] for i in gradients],
            [],
            [self.count] * len(gradients),
            lr=self.rate,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            weight_decay=self.weight_decay,
            eps=_EPS,
            amsgrad=False,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Adam` gives it; the tensors go on changing."""
        state = {
            i: {"step": self.count, "exp_avg": mean, "exp_avg_sq": square}
            for i, (mean, square) in enumerate(zip(self.mean, self.square, strict=True))
        }
        group = {"lr": self.rate, "betas": _BETAS, "eps": _EPS, "weight_decay": self.weight_decay}
        return {"state": state, "param_groups": [{**group, "params": list(state)}]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copies a state into the tensors that are there; the rate stays."""
        for i, saved in state_dict["state"].items():
            self.mean[i].copy_(saved["exp_avg"])
            self.square[i].copy_(saved["exp_avg_sq"])
            self.count.copy_(saved["step"])
