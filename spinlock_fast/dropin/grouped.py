"""`GroupedResidualVQ` of vector-quantize-pytorch: a residual quantizer for each share of the channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spinlock_fast.dropin.residual import ResidualVQ, shared_seed, skip_seed
from spinlock_fast.kernels._common.guard import check_dense
from spinlock_fast.quantize.activation_checkpointing import once


class GroupedResidualVQ(nn.Module):
    """Splits channels into groups, each with a `ResidualVQ` of its own (Yang et al. 2023, arXiv 2305.02765).

    Arguments are those of `ResidualVQ`, and:

    Args:
        dim: of the input, a multiple of `groups`.
        groups: number of shares.

    Shapes:
        x [b, n, dim] -> quantized like x; codes [groups, b, n, q] int64; losses [groups, q].
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

    @property
    def codebooks(self) -> Tensor | tuple[tuple[Tensor, ...], ...]:
        """[groups, q, K, D], or [K_q, D] of each group and stage where stages differ in size."""
        books: list[Any] = [rvq.codebooks for rvq in self.rvqs]
        return torch.stack(books) if isinstance(books[0], Tensor) else tuple(books)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The processes that share updates; None for all."""
        group: dist.ProcessGroup | None = self.rvqs[0].process_group  # type: ignore[assignment]
        return group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        for rvq in self.rvqs:
            rvq.process_group = group  # type: ignore[assignment]

    @property
    def split_dim(self) -> int:
        return 1 if self.accept_image_fmap or not self.channel_last else -1

    def get_codes_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """Code vectors [groups, q, b, ..., D] of indices [groups, b, ..., q], see `ResidualVQ`."""
        pairs = zip(self.rvqs, self._of_groups(indices), strict=True)
        return torch.stack([rvq.get_codes_from_indices(index) for rvq, index in pairs])  # type: ignore[operator]

    def get_output_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """What `forward` returns in eval mode for these codes: of all groups, side by side. See `ResidualVQ`."""
        pairs = zip(self.rvqs, self._of_groups(indices), strict=True)
        outputs = [rvq.get_output_from_indices(index) for rvq, index in pairs]  # type: ignore[operator]
        return torch.cat(outputs, dim=self.split_dim)

    def _of_groups(self, indices: Tensor | Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
        if len(indices) != self.groups:
            raise ValueError(f"indices must be given for {self.groups} groups, got {len(indices)}")
        return indices

    def utilization(self) -> Tensor:
        """[groups, q], see `ResidualVQ`."""
        return torch.stack([rvq.utilization() for rvq in self.rvqs])  # type: ignore[operator]

    def perplexity(self) -> Tensor:
        """[groups, q], see `ResidualVQ`."""
        return torch.stack([rvq.perplexity() for rvq in self.rvqs])  # type: ignore[operator]

    def reset_usage(self) -> None:
        """Starts a new window."""
        for rvq in self.rvqs:
            rvq.reset_usage()  # type: ignore[operator]

    def forward(
        self,
        x: Tensor,
        indices: Sequence[Tensor] | Tensor | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        """As `ResidualVQ.forward`, with results stacked over groups; `indices` are those of each group."""
        check_dense("the input", x)
        if x.ndim < 2 or x.shape[self.split_dim] != self.dim:
            raise ValueError(
                f"the input must have {self.dim} channels in dimension {self.split_dim}, got {list(x.shape)}"
            )
        given: Sequence[Tensor | None] = [None] * self.groups
        if indices is not None and len(indices) > 0:
            given = list(indices)
        if len(given) != self.groups:
            raise ValueError(f"indices must be given for {self.groups} groups, got {len(given)}")
        dropped = self.training and any(rvq.quantize_dropout for rvq in self.rvqs)
        seed: int | Tensor | None = None
        if dropped:
            first = self.rvqs[0]
            assert isinstance(first, ResidualVQ)
            if torch.compiler.is_compiling():
                seed = first.draw_stages(x.device)
            else:
                seed = once(self, lambda: shared_seed(x.device, first._processes))
        if self.training and not dropped:
            skip_seed(x.device)
        results = [
            rvq(
                part,
                indices=index,
                return_all_codes=return_all_codes,
                sample_codebook_temp=sample_codebook_temp,
                mask=mask,
                freeze_codebook=freeze_codebook,
                rand_quantize_dropout_fixed_seed=seed,
            )
            for rvq, part, index in zip(self.rvqs, x.chunk(self.groups, dim=self.split_dim), given, strict=True)
        ]
        quantized, *rest = zip(*results, strict=True)
        joined = torch.cat(quantized, dim=self.split_dim)
        if given[0] is not None:
            return joined, torch.stack(rest[0]).sum()
        return (joined, *(torch.stack(part) for part in rest))
