"""Residual quantizers of audio codecs that `ResidualVQ` does not cover: Mimi and DAC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spinlock_fast.dropin.input_layout import at_least_float32
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.vq_assign import vq_assign


class SplitResidualVQ(nn.Module):
    """A semantic and an acoustic ResidualVQ applied to the same latents (Mimi, arXiv 2410.00037).

    The quantized vectors are added. Indices, losses and codes of the acoustic quantizer follow those of the semantic
    quantizer.

    Args:
        semantic: a ResidualVQ.
        acoustic: a ResidualVQ; None quantizes with the semantic quantizer only.

    Shapes:
        x [b, n, dim] -> quantized [b, n, dim], indices [b, n, q] int64, losses [q].
    """

    def __init__(self, semantic: nn.Module, acoustic: nn.Module | None = None) -> None:
        super().__init__()
        self.semantic = semantic
        self.acoustic = acoustic

    @property
    def parts(self) -> list[Any]:
        """The semantic quantizer and, if present, the acoustic one."""
        return [self.semantic] if self.acoustic is None else [self.semantic, self.acoustic]

    @property
    def num_quantizers(self) -> int:
        return sum(part.num_quantizers for part in self.parts)

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """[K, D] of each quantizer."""
        return tuple(codebook for part in self.parts for codebook in part.codebooks)

    def forward(self, x: Tensor, return_all_codes: bool = False, **options: Any) -> tuple[Tensor, ...]:
        """Quantizes as ResidualVQ does; `options` (mask, freeze_codebook, ...) are passed to both quantizers.

        Returns:
            quantized, indices, losses and, with `return_all_codes`, codes [q, b, n, D].
        """
        if options.get("indices") is not None:
            raise NotImplementedError("indices (a cross entropy loss) are not supported by SplitResidualVQ")
        results = [part(x, return_all_codes=return_all_codes, **options) for part in self.parts]
        quantized, indices, losses, *codes = zip(*results, strict=True)
        returned = (sum(quantized[1:], quantized[0]), torch.cat(indices, dim=-1), torch.cat(losses, dim=-1))
        return (*returned, torch.cat(codes[0])) if return_all_codes else returned

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Code vectors [q, b, n, D] of indices [b, n, q]; -1 gives zeros."""
        return torch.cat([part.get_codes_from_indices(part_indices) for part, part_indices in self._split(indices)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Quantized vectors [b, n, dim] of indices [b, n, q], for the first q quantizers."""
        outputs = [part.get_output_from_indices(part_indices) for part, part_indices in self._split(indices)]
        return torch.stack(outputs).sum(0)

    def _split(self, indices: Tensor) -> list[tuple[Any, Tensor]]:
        """Pairs of a quantizer and its indices, without quantizers that have none."""
        semantic, total, q = self.parts[0].num_quantizers, self.num_quantizers, indices.shape[-1]
        if not semantic <= q <= total:
            raise ValueError(f"indices must have from {semantic} to {total} quantizers in the last dimension, got {q}")
        pairs = zip(self.parts, indices.split([semantic, q - semantic], dim=-1), strict=False)
        return [(part, part_indices) for part, part_indices in pairs if part_indices.shape[-1]]


class FactorizedVQ(nn.Module):
    """One stage of DAC: low-dimensional codes, selected by cosine similarity (arXiv 2306.06546, 2110.04627).

    Args:
        dim: dimension of the latents.
        codebook_size: number of codes K.
        codebook_dim: dimension of the codes D, to which the latents are projected.
    """

    def __init__(self, dim: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, codebook_dim)
        self.out_proj = nn.Linear(codebook_dim, dim)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)
        self._layout = CodebookLayout.of([codebook_size], [codebook_dim])

    def nearest(self, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """[N] index of the code with the largest cosine similarity to each row [N, D]; -1 if masked or not finite."""
        directions = F.normalize(at_least_float32(self.codebook.weight.detach()))
        assignment = vq_assign(
            F.normalize(at_least_float32(latents.detach())),
            directions.flatten(),
            self._layout,
            mask,
            centred=False,
            with_sums=False,
        )
        return assignment.codes[:, 0]

    def codes_of(self, indices: Tensor) -> Tensor:
        """Code vectors [..., D] of indices [...], not normalised; 0 for index -1."""
        codes: Tensor = self.codebook(indices.clamp(min=0))
        return codes * (indices >= 0)[..., None]

    def decode(self, indices: Tensor) -> Tensor:
        """Output of this stage [..., dim] for indices [...]; 0 for index -1."""
        output: Tensor = self.out_proj(self.codes_of(indices))
        return output * (indices >= 0)[..., None]


class FactorizedResidualVQ(nn.Module):
    """Residual quantizer of DAC (arXiv 2306.06546): each stage projects the latents, quantizes and projects back.

    Unlike in `ResidualVQ`, residuals are computed in latent space, after each stage's output projection. Codes are
    learned by gradient, as in DAC.

    Args:
        dim: dimension of the latents.
        codebook_sizes: K of each stage.
        codebook_dims: D of each stage.
        commitment_weight: factor of mean((z - sg(e))^2) in the loss of a stage.
        codebook_weight: factor of mean((sg(z) - e)^2) in the loss of a stage.

    Shapes:
        x [b, n, dim] -> quantized [b, n, dim], indices [b, n, q] int64, losses [q].
    """

    def __init__(
        self,
        dim: int,
        codebook_sizes: Sequence[int],
        codebook_dims: Sequence[int],
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
    ) -> None:
        super().__init__()
        sizes = zip(codebook_sizes, codebook_dims, strict=True)
        self.layers = nn.ModuleList(FactorizedVQ(dim, size, width) for size, width in sizes)
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight

    @property
    def num_quantizers(self) -> int:
        return len(self.layers)

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """[K, D] of each stage."""
        return tuple(stage.codebook.weight.detach() for stage in self._stages())

    def _stages(self) -> list[FactorizedVQ]:
        return [stage for stage in self.layers if isinstance(stage, FactorizedVQ)]

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        freeze_codebook: bool = False,
    ) -> tuple[Tensor, ...]:
        """Quantizes stage by stage.

        Args:
            x: [b, n, dim].
            mask: [b, n] bool; rows where it is False have output 0 and indices -1 and are not in the loss.
            return_all_codes: appends the output of each stage [q, b, n, dim].
            freeze_codebook: the loss has no gradient to the codes.

        Returns:
            quantized (straight-through gradient), indices, and the loss of each stage (0 in eval mode).
        """
        residual = x
        outputs, indices, losses = [], [], []
        for stage in self._stages():
            latents = stage.in_proj(residual)
            rows = None if mask is None else mask.flatten()
            chosen = stage.nearest(latents.flatten(0, -2), rows).view(x.shape[:-1])
            codes = stage.codes_of(chosen).to(latents.dtype)
            losses.append(self._loss(latents, codes, mask, freeze_codebook))
            # latents - latents is 0, but NaN in rows that are not finite: these have no code.
            output = stage.out_proj(codes.detach() + (latents - latents.detach()))
            if mask is not None:
                output = output.masked_fill(~mask[..., None], 0.0)
            residual = residual - output
            outputs.append(output)
            indices.append(chosen)
        returned = (torch.stack(outputs).sum(0), torch.stack(indices, dim=-1), torch.stack(losses))
        return (*returned, torch.stack(outputs)) if return_all_codes else returned

    def _loss(self, latents: Tensor, codes: Tensor, mask: Tensor | None, freeze_codebook: bool) -> Tensor:
        if not self.training:
            return at_least_float32(latents.new_zeros(()))
        latents, codes = at_least_float32(latents), at_least_float32(codes)
        error = self.commitment_weight * (latents - codes.detach()).square()
        if not freeze_codebook:
            error = error + self.codebook_weight * (latents.detach() - codes).square()
        rows = error.mean(-1)
        return rows.mean() if mask is None else torch.where(mask, rows, 0.0).sum() / mask.sum().clamp(min=1)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Output of each stage [q, b, n, dim] for indices [b, n, q]; 0 for index -1. Their sum is the output."""
        q, total = indices.shape[-1], self.num_quantizers
        if not 1 <= q <= total:
            raise ValueError(f"indices must have from 1 to {total} quantizers in the last dimension, got {q}")
        stages = zip(self._stages(), indices.unbind(-1), strict=False)
        return torch.stack([stage.decode(index) for stage, index in stages])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Quantized vectors [b, n, dim] of indices [b, n, q], for the first q stages."""
        return self.get_codes_from_indices(indices).sum(0)
