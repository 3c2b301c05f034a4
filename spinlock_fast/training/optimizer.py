"""Fused Adam and AdamW whose learning rate is a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spinlock_fast.kernels.backend import runs_triton
from spinlock_fast.kernels.table_cache import TableCache

_BETAS = (0.9, 0.999)
_EPS = 1e-8


class FusedAdam:
    """Adam (Kingma and Ba 2015), or AdamW (Loshchilov and Hutter 2019) with decoupled weight decay.

    Computes what `torch.optim.Adam(fused=True)` does, with the same `state_dict`. That class is not used because its
    constructor imports torch's compiler, which takes longer than loading 10,000 rows. On CUDA all parameters are
    updated by one Triton kernel.

    Parameters may change their memory (`p.data = ...`) or strides between steps. Gradients may have any strides and,
    if the parameter's `grad_dtype` allows it, any real dtype.

    Args:
        parameters: to be optimized; those without a gradient are left unchanged.
        rate: learning rate, a tensor of one element that is read at every step, on the device if that is CUDA.
        weight_decay: L2 penalty of Adam, decay per unit of learning rate of AdamW.
        decoupled: True for AdamW.
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
        self.count = torch.zeros((), device=self.parameters[0].device)  # steps taken
        self._layout: list[tuple[int, tuple[int, ...]]] = []
        self._dense: list[bool] = []
        self._launches: TableCache[Any] = TableCache(32)  # keyed by the addresses of the tensors

    def zero_grad(self) -> None:
        """Sets the gradients to None."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Updates the parameters that have a gradient.

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
        self._match_parameter_layout()
        gradients = [self._gradient(i) for i in used]
        if runs_triton("auto", *self.parameters) and all(self._dense[i] for i in used):
            self._triton_update(used, gradients)
            return
        self.count += 1
        # torch's operation ignores strides and reads memory in order, so parameters with gaps are copied.
        targets: list[Tensor] = [self.parameters[i] for i in used]
        parameters = [p if self._dense[i] else _with_layout_of(p, p) for i, p in zip(used, targets, strict=True)]
        self._torch_update(parameters, gradients, *([ts[i] for i in used] for ts in self._moments))
        for target, updated in zip(targets, parameters, strict=True):
            if target is not updated:
                target.copy_(updated)

    def memory_layout(self) -> list[tuple[int, tuple[int, ...]]]:
        """Address and strides of every parameter."""
        return [(p.data_ptr(), p.stride()) for p in self.parameters]

    def _match_parameter_layout(self) -> None:
        """Copies moments to the strides of their parameters, if a parameter's memory changed since the last step."""
        layout = self.memory_layout()
        if layout == self._layout:
            return
        self._dense = []
        for i, p in enumerate(self.parameters):
            parameter, moments = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (p, self.mean[i]))
            if parameter != moments:
                raise ValueError(
                    f"parameter {i} is {parameter}, its moments are {moments}: make an optimizer after the change"
                )
            strides = torch.empty_like(p).stride()
            self._dense.append(strides == p.stride())
            for moment in self._moments:
                if moment[i].stride() != strides:
                    moment[i] = _with_layout_of(p, moment[i])
        self._layout = layout

    def _gradient(self, i: int) -> Tensor:
        """The gradient of a parameter, with the dtype and strides of its moments."""
        gradient, like = self.parameters[i].grad, self.mean[i]
        assert gradient is not None
        if gradient.layout is not torch.strided:
            raise ValueError(f"the gradient of parameter {i} is sparse")
        if gradient.stride() == like.stride() and gradient.dtype == like.dtype:
            return gradient
        return _with_layout_of(like, gradient)

    def _triton_update(self, used: list[int], gradients: list[Tensor]) -> None:
        """The update by the Triton kernel, in launches of at most `TENSORS` tensors."""
        from spinlock_fast.kernels.adam.triton import TENSORS, Adam

        for first in range(0, len(used), TENSORS):
            part = used[first : first + TENSORS]
            tensors = [self.parameters[i] for i in part], [self.mean[i] for i in part], [self.square[i] for i in part]
            key = tuple(t.data_ptr() for ts in tensors for t in ts)
            make = partial(Adam, *tensors, _BETAS, _EPS, self.weight_decay, self.decoupled)
            launch = self._launches.get(key, self.count.device, make)
            launch(gradients[first : first + TENSORS], self.count, self.rate)
        self.count += 1

    def _torch_update(
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
        """The state dict of `torch.optim.Adam`; later steps change its tensors in place."""
        state = {
            i: {"step": self.count, "exp_avg": mean, "exp_avg_sq": square}
            for i, (mean, square) in enumerate(zip(self.mean, self.square, strict=True))
        }
        group = {"lr": self.rate, "betas": _BETAS, "eps": _EPS, "weight_decay": self.weight_decay}
        return {"state": state, "param_groups": [{**group, "params": list(state)}]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copies a state into the existing tensors; the learning rate stays. An empty state resets the moments.

        Raises:
            ValueError: the state has other parameters, or parameters with different numbers of steps. Nothing is
                changed then.
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
            raise ValueError("the parameters have different numbers of steps")
        for i, saved in state.items():
            self.mean[i].copy_(saved["exp_avg"])
            self.square[i].copy_(saved["exp_avg_sq"])
        self.count.fill_(float(state[0]["step"]))


def _with_layout_of(like: Tensor, values: Tensor) -> Tensor:
    """A dense copy of `values` with the dtype and the order of strides of `like`."""
    return torch.empty_like(like).copy_(values)
