"""Adam in one fused operation, with the rate in a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spinlock_fast.kernels._common.backend import runs_triton
from spinlock_fast.kernels._common.table_cache import TableCache

_BETAS = (0.9, 0.999)
_EPS = 1e-8


class FusedAdam:
    """Adam (Kingma and Ba 2015), or AdamW (Loshchilov and Hutter 2019) where the decay is decoupled.

    The arithmetic is that of `torch.optim.Adam(fused=True)`, and so is the form of `state_dict`. It is not used itself
    because making one imports torch's compiler, which takes longer than loading 10,000 rows.

    Parameters may get other memory (`p.data = ...`) or other strides between steps. Gradients may have any strides and,
    where a parameter's `grad_dtype` allows it, any real dtype.

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
        self._places: list[tuple[int, tuple[int, ...]]] = []
        self._dense: list[bool] = []
        self._launches: TableCache[Any] = TableCache(32)  # by the tensors' addresses, which they hold

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Moves the parameters against their gradients.

        Raises:
            RuntimeError: no parameter has a gradient.
            ValueError: a parameter has another shape, dtype or device than its moments, or a sparse gradient.
        """
        used = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        if not used:
            raise RuntimeError(
                "no parameter has a gradient; an optimizer does not follow parameters that are replaced, as by"
                " load_state_dict(assign=True): make it afterwards"
            )
        self._follow_parameters()
        gradients = [self._gradient(i) for i in used]
        if runs_triton("auto", *self.parameters) and all(self._dense[i] for i in used):
            self._move_by_triton(used, gradients)
            return
        self.count += 1
        # torch's operation reads memory entry by entry, whatever the strides: gaps are left out of what it is given.
        targets: list[Tensor] = [self.parameters[i] for i in used]
        parameters = [p if self._dense[i] else _laid_out_as(p, p) for i, p in zip(used, targets, strict=True)]
        self._move(parameters, gradients, *([ts[i] for i in used] for ts in self._moments))
        for target, moved in zip(targets, parameters, strict=True):
            if target is not moved:
                target.copy_(moved)

    def places(self) -> list[tuple[int, tuple[int, ...]]]:
        """Where every parameter lies: its address and strides."""
        return [(p.data_ptr(), p.stride()) for p in self.parameters]

    def _follow_parameters(self) -> None:
        """Gives moments the strides of parameters that have other memory than at the last step."""
        places = self.places()
        if places == self._places:
            return
        self._dense = []
        for i, p in enumerate(self.parameters):
            now, before = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (p, self.mean[i]))
            if now != before:
                raise ValueError(
                    f"parameter {i} is {now}, its moments are {before}: make an optimizer after the change"
                )
            strides = torch.empty_like(p).stride()
            self._dense.append(strides == p.stride())
            for moment in self._moments:
                if moment[i].stride() != strides:
                    moment[i] = _laid_out_as(p, moment[i])
        self._places = places

    def _gradient(self, i: int) -> Tensor:
        """The gradient of a parameter, with the dtype and strides of its moments."""
        gradient, like = self.parameters[i].grad, self.mean[i]
        assert gradient is not None
        if gradient.layout is not torch.strided:
            raise ValueError(f"the gradient of parameter {i} is sparse")
        if gradient.stride() == like.stride() and gradient.dtype == like.dtype:
            return gradient
        return _laid_out_as(like, gradient)

    def _move_by_triton(self, used: list[int], gradients: list[Tensor]) -> None:
        """The update by our kernel, in as many launches as it takes to name all tensors."""
        from spinlock_fast.kernels.adam.triton_update import MAX_TENSORS, AdamLauncher

        for first in range(0, len(used), MAX_TENSORS):
            some = used[first : first + MAX_TENSORS]
            tensors = [self.parameters[i] for i in some], [self.mean[i] for i in some], [self.square[i] for i in some]
            key = tuple(t.data_ptr() for ts in tensors for t in ts)
            make = partial(AdamLauncher, *tensors, _BETAS, _EPS, self.weight_decay, self.decoupled)
            launch = self._launches.get(key, self.count.device, make)
            launch(gradients[first : first + MAX_TENSORS], self.count, self.rate)
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
        """Copies a state into the tensors that are there; the rate stays. One without entries is that of no step.

        Raises:
            ValueError: the state is of other parameters, or of some that have made different numbers of steps. Then
                nothing has changed.
        """
        state = state_dict["state"] or {
            i: {"step": 0.0, "exp_avg": torch.zeros(()).expand_as(p), "exp_avg_sq": torch.zeros(()).expand_as(p)}
            for i, p in enumerate(self.parameters)
        }
        if set(state) != set(range(len(self.parameters))):
            raise ValueError(f"the state is of parameters {sorted(state)}, not of all {len(self.parameters)}")
        for i, parameter in enumerate(self.parameters):
            for name in ("exp_avg", "exp_avg_sq"):
                if state[i][name].shape != parameter.shape:
                    shapes = f"{tuple(state[i][name].shape)}, not {tuple(parameter.shape)}"
                    raise ValueError(f"{name} of parameter {i} has the shape {shapes}")
        if len({float(saved["step"]) for saved in state.values()}) > 1:
            raise ValueError("the parameters have made different numbers of steps")
        for i, saved in state.items():
            self.mean[i].copy_(saved["exp_avg"])
            self.square[i].copy_(saved["exp_avg_sq"])
        self.count.fill_(float(state[0]["step"]))


def _laid_out_as(like: Tensor, values: Tensor) -> Tensor:
    """Values in fresh memory with the dtype and, but for gaps, the strides of another tensor."""
    return torch.empty_like(like).copy_(values)
