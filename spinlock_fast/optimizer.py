"""Adam in one fused operation, with the rate in a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_BETAS = (0.9, 0.999)
_EPS = 1e-8

# torch's CUDA kernel gives 65,536 entries of a tensor to one block of threads, so a model of millions of parameters
# keeps a few dozen blocks busy, on a device with room for hundreds. Handed over in pieces it is spread.
_PIECES = 190  # of the whole; every tensor ends in a smaller one besides
_PIECE_MULTIPLE = 2048  # what a block moves at a time: a smaller piece would leave threads idle


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
        self._streams: list[torch.cuda.Stream] = []

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Moves the parameters against their gradients."""
        self.count += 1
        gradients = {i: p.grad for i, p in enumerate(self.parameters) if p.grad is not None}
        lists: list[list[Tensor]] = [
            [self.parameters[i] for i in gradients],
            list(gradients.values()),
            [self.mean[i] for i in gradients],
            [self.square[i] for i in gradients],
        ]
        most = _tensors_per_launch(self.count.device)
        if most is None:
            self._move(lists)
            return
        pieces = _in_pieces(lists)
        starts = range(0, len(pieces[0]), most)
        self._side_by_side([[part[first : first + most] for part in pieces] for first in starts])

    def _move(self, lists: list[list[Tensor]]) -> None:
        """The update of parameters, by gradients, means and squares."""
        parameters, gradients, means, squares = lists
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

    def _side_by_side(self, groups: list[list[list[Tensor]]]) -> None:
        """Each group on a stream of its own, for none fills a device. A capture follows them."""
        device = self.count.device
        while len(self._streams) < len(groups) - 1:
            self._streams.append(torch.cuda.Stream(device))
        mine = torch.cuda.current_stream(device)
        others = list(zip(self._streams, groups[1:], strict=False))
        for stream, group in others:
            stream.wait_stream(mine)
            with torch.cuda.stream(stream):
                self._move(group)
        for group in groups[:1]:
            self._move(group)
        for stream, _ in others:
            mine.wait_stream(stream)

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


def _tensors_per_launch(device: torch.device) -> int | None:
    """How many tensors fit into the arguments of torch's fused CUDA kernel; None where there is no such kernel."""
    cuda = torch.version.cuda
    if device.type != "cuda" or cuda is None:
        return None
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return 252 if version >= (2, 13) and int(cuda.split(".")[0]) >= 13 else 36


def _in_pieces(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    """Views of all tensors, the same parts of the first, second, ... tensor of every list."""
    total = sum(tensor.numel() for tensor in lists[0])
    size = -(-total // (_PIECES * _PIECE_MULTIPLE)) * _PIECE_MULTIPLE
    whole = [not all(tensor.is_contiguous() for tensor in tensors) for tensors in zip(*lists, strict=True)]
    return [
        [
            piece
            for tensor, keep in zip(tensors, whole, strict=True)
            for piece in ((tensor,) if keep or tensor.numel() <= size else tensor.view(-1).split(size))
        ]
        for tensors in lists
    ]
