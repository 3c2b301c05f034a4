"""`GroupedResidualVQ` of vector-quantize-pytorch: one residual quantizer per group of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spinlock_fast.dropin.residual import ResidualVQ, draw_shared_seed
from spinlock_fast.kernels._common.guard import check_dense
from spinlock_fast.quantize.activation_checkpointing import once


class GroupedResidualVQ(nn.Module):
    """One `ResidualVQ` per group of channels (Yang et al. 2023, arXiv 2305.02765).

    Takes the arguments of `ResidualVQ`, and:

    Args:
        dim: channels of the input, a multiple of `groups`.
        groups: number of groups.

    Shapes:
        x [b, n, dim] -> quantized, same shape; codes [groups, b, n, q] int64; losses [groups, q].
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        super().__init__()
        if dim % groups != 0:
            raise ValueError(f"dim must be a multiple of groups, got {dim} and {groups}")
        self.dim, self.groups, self.accept_image_fmap = dim, groups, accept_image_fmap
        self.channel_last = kwargs.get("channel_last", True)
        self.rvqs = nn.ModuleList(
            ResidualVQ(dim=dim // groups, accept_image_fmap=accept_image_fmap, **kwargs) for _ in range(groups)
        )

    def _quantizers(self) -> list[ResidualVQ]:
        return cast(list[ResidualVQ], list(self.rvqs))

    @property
    def codebooks(self) -> Tensor | tuple[tuple[Tensor, ...], ...]:
        """[groups, q, K, D], or per group a tuple of [K_q, D] if stages differ in codebook size."""
        codebooks: list[Any] = [rvq.codebooks for rvq in self._quantizers()]
        return torch.stack(codebooks) if isinstance(codebooks[0], Tensor) else tuple(codebooks)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """Processes that share updates; None for all."""
        return self._quantizers()[0].process_group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        for rvq in self._quantizers():
            rvq.process_group = group

    @property
    def split_dim(self) -> int:
        return 1 if self.accept_image_fmap or not self.channel_last else -1

    def get_codes_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """Code vectors [groups, q, b, ..., D] of indices [groups, b, ..., q], see `ResidualVQ`."""
        pairs = zip(self._quantizers(), self._check_groups(indices), strict=True)
        return torch.stack([rvq.get_codes_from_indices(index) for rvq, index in pairs])

    def get_output_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """The output of `forward` in eval mode for indices [groups, b, ..., q], see `ResidualVQ`."""
        pairs = zip(self._quantizers(), self._check_groups(indices), strict=True)
        return torch.cat([rvq.get_output_from_indices(index) for rvq, index in pairs], dim=self.split_dim)

    def _check_groups(self, indices: Tensor | Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
        if len(indices) != self.groups:
            raise ValueError(f"indices must be given for {self.groups} groups, got {len(indices)}")
        return indices

    def utilization(self) -> Tensor:
        """[groups, q], see `ResidualVQ`."""
        return torch.stack([rvq.utilization() for rvq in self._quantizers()])

    def perplexity(self) -> Tensor:
        """[groups, q], see `ResidualVQ`."""
        return torch.stack([rvq.perplexity() for rvq in self._quantizers()])

    def reset_usage(self) -> None:
        """Resets the counts behind `utilization` and `perplexity`."""
        for rvq in self._quantizers():
            rvq.reset_usage()

    def forward(
        self,
        x: Tensor,
        indices: Sequence[Tensor] | Tensor | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        """As `ResidualVQ.forward`, with results stacked over groups; `indices` are [groups, b, n, q]."""
        check_dense("the input", x)
        if x.ndim < 2 or x.shape[self.split_dim] != self.dim:
            raise ValueError(
                f"the input must have {self.dim} channels in dimension {self.split_dim}, got {list(x.shape)}"
            )
        group_indices: Sequence[Tensor | None] = [None] * self.groups
        if indices is not None and len(indices) > 0:
            group_indices = list(self._check_groups(indices))
        seed = self._draw_dropout_seed(x.device) if self.training else None
        results = [
            rvq(
                channels,
                indices=index,
                return_all_codes=return_all_codes,
                sample_codebook_temp=sample_codebook_temp,
                mask=mask,
                freeze_codebook=freeze_codebook,
                rand_quantize_dropout_fixed_seed=seed,
            )
            for rvq, channels, index in zip(
                self.rvqs, x.chunk(self.groups, dim=self.split_dim), group_indices, strict=True
            )
        ]
        quantized, *others = zip(*results, strict=True)
        output = torch.cat(quantized, dim=self.split_dim)
        if group_indices[0] is not None:
            return output, torch.stack(others[0]).sum()
        return (output, *(torch.stack(values) for values in others))

    def _draw_dropout_seed(self, device: torch.device) -> int | Tensor | None:
        """Seed of quantize_dropout that all groups share; in compiled code the number of stages as a tensor."""
        rvqs = self._quantizers()
        dropout = any(rvq.quantize_dropout for rvq in rvqs)
        if torch.compiler.is_compiling():
            return rvqs[0].draw_num_stages(device) if dropout else None
        if not dropout:
            torch.randint(0, 10_000, (), device=device)  # vector-quantize-pytorch also draws unused seeds
            return None
        return once(self, lambda: draw_shared_seed(device, rvqs[0]._processes))
