"""Residual quantizers of audio codecs that a plain ResidualVQ cannot express."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spinlock_fast.dropin.shapes import widened
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.vq_assign import vq_assign


class SplitResidualVQ(nn.Module):
    """Two ResidualVQ side by side on the same latents: a semantic one and an acoustic one (Mimi, arXiv 2410.00037).

    The quantized vectors of the two are added; indices, losses and codes are those of the semantic
    quantizer followed by those of the acoustic one.

    Args:
        semantic: the first quantizers, a ResidualVQ.
        acoustic: the others, a ResidualVQ; None keeps the semantic ones alone.

    Shapes:
        x [b, n, dim] -> quantized [b, n, dim], indices [b, n, q] int64, losses [q].
    """

    def __init__(self, semantic: nn.Module, acoustic: nn.Module | None = None) -> None:
        super().__init__()
        self.semantic = semantic
        self.acoustic = acoustic

    @property
    def parts(self) -> list[Any]:
        """The quantizers that there are, semantic first."""
        return [self.semantic] if self.acoustic is None else [self.semantic, self.acoustic]

    @property
    def num_quantizers(self) -> int:
        return sum(part.num_quantizers for part in self.parts)

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """[K, D] of each quantizer."""
        return tuple(codebook for part in self.parts for codebook in part.codebooks)

    def forward(self, x: Tensor, return_all_codes: bool = False, **options: Any) -> tuple[Tensor, ...]:
        """Quantizes as ResidualVQ does; further options (mask, freeze_codebook, ...) go to both quantizers.

        Returns:
            quantized, indices, losses and, with `return_all_codes`, codes [q, b, n, D].
        """
        if options.get("indices") is not None:
            raise NotImplementedError("indices (a cross entropy loss) are not supported by SplitResidualVQ")
        found = [part(x, return_all_codes=return_all_codes, **options) for part in self.parts]
        quantized, indices, losses, *codes = zip(*found, strict=True)
        first = (sum(quantized[1:], quantized[0]), torch.cat(indices, dim=-1), torch.cat(losses, dim=-1))
        return (*first, torch.cat(codes[0])) if return_all_codes else first

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Code vectors [q, b, n, D] of indices [b, n, q]; -1 gives zeros."""
        return torch.cat([part.get_codes_from_indices(own) for part, own in self._divide(indices)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Quantized vectors [b, n, dim] of indices [b, n, q], where q may be fewer than there are quantizers."""
        outputs = [part.get_output_from_indices(own) for part, own in self._divide(indices)]
        return torch.stack(outputs).sum(0)

    def _divide(self, indices: Tensor) -> list[tuple[Any, Tensor]]:
        """Each part with its own indices; a part that gets none is left out."""
        least, most = self.parts[0].num_quantizers, self.num_quantizers
        given = indices.shape[-1]
        if not least <= given <= most:
            raise ValueError(f"indices must have from {least} to {most} quantizers in the last dimension, got {given}")
        divided = indices.split([least, given - least], dim=-1)
        return [(part, own) for part, own in zip(self.parts, divided, strict=False) if own.shape[-1]]


class FactorizedVQ(nn.Module):
    """One stage of DAC: codes of few dimensions, found by their direction (arXiv 2306.06546, 2110.04627).

    Args:
        dim: of the latents.
        codebook_size: K.
        codebook_dim: D, to which the latents are projected.
    """

    def __init__(self, dim: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, codebook_dim)
        self.out_proj = nn.Linear(codebook_dim, dim)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)
        self._layout = CodebookLayout.of([codebook_size], [codebook_dim])
        # Cached properties take a lock when they are first read, which Python 3.11 cannot trace.
        _ = self._layout.total_dims, self._layout.total_entries

    def nearest(self, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """[N] index of the code with the greatest cosine to each row of [N, D]; -1 where masked or not finite."""
        directions = F.normalize(widened(self.codebook.weight.detach()))
        found = vq_assign(
            F.normalize(widened(latents.detach())),
            directions.flatten(),
            self._layout,
            mask,
            centred=False,
            with_sums=False,
        )
        return found.codes[:, 0]

    def codes_of(self, indices: Tensor) -> Tensor:
        """Code vectors [..., D] of indices [...], as long as they were learned; -1 gives zeros."""
        codes: Tensor = self.codebook(indices.clamp(min=0))
        return codes * (indices >= 0)[..., None]

    def decode(self, indices: Tensor) -> Tensor:
        """What this stage adds to the output [..., dim] for indices [...]; -1 gives zeros."""
        output: Tensor = self.out_proj(self.codes_of(indices))
        return output * (indices >= 0)[..., None]


class FactorizedResidualVQ(nn.Module):
    """The residual quantizer of DAC (arXiv 2306.06546): each stage projects, looks up and projects back.

    The residual is formed in the space of the latents, after each stage's output projection, which
    ResidualVQ does not do. Codes are learned by their gradient, as in DAC.

    Args:
        dim: of the latents.
        codebook_sizes: K of each stage.
        codebook_dims: D of each stage.
        commitment_weight: factor of mean((z - sg(e))^2) in a stage's loss.
        codebook_weight: factor of mean((sg(z) - e)^2) in it.

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
            mask: [b, n] bool; where False the output is 0, the indices are -1 and no loss is counted.
            return_all_codes: also return what each stage adds [q, b, n, dim].
            freeze_codebook: codes get no gradient from the loss.

        Returns:
            quantized with the straight-through gradient, indices, and the loss of each stage (0 in eval mode).
        """
        residual = x
        outputs, indices, losses = [], [], []
        for stage in self._stages():
            latents = stage.in_proj(residual)
            rows = None if mask is None else mask.flatten()
            chosen = stage.nearest(latents.flatten(0, -2), rows).view(x.shape[:-1])
            codes = stage.codes_of(chosen).to(latents.dtype)
            losses.append(self._loss(latents, codes, mask, freeze_codebook))
            # A row without a code, since it is not finite, stays so: latents - latents is NaN there.
            output = stage.out_proj(codes.detach() + (latents - latents.detach()))
            if mask is not None:
                output = output.masked_fill(~mask[..., None], 0.0)
            residual = residual - output
            outputs.append(output)
            indices.append(chosen)
        found = (torch.stack(outputs).sum(0), torch.stack(indices, dim=-1), torch.stack(losses))
        return (*found, torch.stack(outputs)) if return_all_codes else found

    def _loss(self, latents: Tensor, codes: Tensor, mask: Tensor | None, frozen: bool) -> Tensor:
        if not self.training:
            return widened(latents.new_zeros(()))
        latents, codes = widened(latents), widened(codes)
        error = self.commitment_weight * (latents - codes.detach()).square()
        if not frozen:
            error = error + self.codebook_weight * (latents.detach() - codes).square()
        rows = error.mean(-1)
        return rows.mean() if mask is None else torch.where(mask, rows, 0.0).sum() / mask.sum().clamp(min=1)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """What each stage adds [q, b, n, dim] for indices [b, n, q]; their sum is the output. -1 gives zeros."""
        given = indices.shape[-1]
        if not 1 <= given <= self.num_quantizers:
            raise ValueError(
                f"indices must have from 1 to {self.num_quantizers} quantizers in the last dimension, got {given}"
            )
        stages = zip(self._stages(), indices.unbind(-1), strict=False)
        return torch.stack([stage.decode(own) for stage, own in stages])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Quantized vectors [b, n, dim] of indices [b, n, q], where q may be fewer than there are stages."""
        return self.get_codes_from_indices(indices).sum(0)
