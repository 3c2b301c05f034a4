"""Adam in one fused operation, with the rate in a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spinlock_fast.kernels.backend import runs_triton

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
        self._launches: dict[tuple[int, ...], Any] = {}  # by the parameters that have a gradient

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Moves the parameters against their gradients."""
        used = tuple(i for i, p in enumerate(self.parameters) if p.grad is not None)
        if used and runs_triton("auto", *self.parameters) and all(_dense(self.parameters[i]) for i in used):
            self._move_by_triton(used)
            return
        self.count += 1
        parameters: list[Tensor] = [self.parameters[i] for i in used]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._move(parameters, gradients, *([ts[i] for i in used] for ts in self._moments))

    def _move_by_triton(self, used: tuple[int, ...]) -> None:
        """The update by our kernel, in as many launches as it takes to name all tensors."""
        from spinlock_fast.kernels.adam.triton import TENSORS, Adam

        for first in range(0, len(used), TENSORS):
            some = used[first : first + TENSORS]
            parameters = [self.parameters[i] for i in some]
            if some not in self._launches:
                means, squares = ([moment[i] for i in some] for moment in self._moments)
                self._launches[some] = Adam(parameters, means, squares, _BETAS, _EPS, self.weight_decay, self.decoupled)
            gradients = [
                p.grad if p.grad.stride() == p.stride() else torch.empty_like(p).copy_(p.grad)
                for p in parameters
                if p.grad is not None
            ]
            self._launches[some](gradients, self.count, self.rate)
        self.count += 1

    def _move(
        self, parameters: list[Tensor], gradients: list[Tensor], means: list[Tensor], squares: list[Tensor]
    ) -> None:
        """The update by torch's fused operation."""
        fused = torch._fused_adamw_ if self.decoupled else torch._fused_adam_
        fused(
            parameters,
            gradients,
            means,
            squares,
            [],
            [self.count] * len(parameters),
            lr=self.rate,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            weight_decay=self.weight_decay,
            eps=_EPS,
            amsgrad=False,
            maximize=False,
        )

    @property
    def _moments(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.mean, self.square

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


def _dense(tensor: Tensor) -> bool:
    """Whether fresh memory can have its strides: then its entries lie one after the other."""
    return torch.empty_like(tensor).stride() == tensor.stride()
