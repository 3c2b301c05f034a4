"""A group of ragged codebooks that quantize side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from spinlock_fast.kernels.ema_update import ema_update, perplexity, reset_dead_codes, utilization
from spinlock_fast.kernels.layout import CodebookLayout
from spinlock_fast.kernels.vq_assign import Assignment, lookup, quantize, vq_assign
from spinlock_fast.kernels.vq_assign.reference import gather_codes
from spinlock_fast.quantize.kmeans import kmeans


class GroupedVectorQuantizer(nn.Module):
    """Quantizes packed latents with G codebooks of different sizes in batched operations.

    Args:
        num_codes: K_g of each codebook.
        dims: D_g of each codebook.
        decay: of the moving averages; 0 replaces codes by the batch means.
        commitment_weight: factor of the commitment loss.
        codebook_init: "kmeans" fits the codes to the first training batch (`initialize` does it
            beforehand), "uniform" draws them from U(-1/K_g, 1/K_g).
        use_ema: codes follow the latents by moving average (van den Oord et al. 2017). False makes
            them a parameter, moved by the gradient of mean((sg(z) - e)^2).
        rotation_trick: gradient by rotation instead of straight through (arXiv 2410.06424).
        centred: subtract each codebook's mean code before distances are formed, which keeps codes of data
            far from the origin exact. LayerNorm-ed latents do not need it.
        smoothing: "none" leaves idle codes in place, "laplace" is the rule of the 2017 paper.
        backend: "auto" or "reference".

    Shapes:
        z [..., sum D] -> quantized [..., sum D], codes [..., G] int64, loss scalar.

    A row that is not finite in a codebook gets code -1 and NaN there, counts in no average, and is
    counted in `nonfinite_rows`, a tensor on the device.

    Raises:
        ValueError: sizes that make no group, or shapes that do not fit it.
    """

    embedding: Tensor
    cluster_size: Tensor
    embedding_sum: Tensor
    initialized: Tensor
    usage: Tensor
    nonfinite_rows: Tensor

    def __init__(
        self,
        num_codes: Sequence[int],
        dims: Sequence[int],
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        codebook_init: Literal["kmeans", "uniform"] = "kmeans",
        use_ema: bool = True,
        rotation_trick: bool = False,
        smoothing: Literal["none", "laplace"] = "none",
        centred: bool = True,
        backend: Literal["auto", "reference"] = "auto",
    ) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        if codebook_init not in ("kmeans", "uniform"):
            raise ValueError(f"codebook_init must be kmeans or uniform, got {codebook_init!r}")
        if smoothing not in ("none", "laplace"):
            raise ValueError(f"smoothing must be none or laplace, got {smoothing!r}")
        if backend not in ("auto", "reference"):
            raise ValueError(f"backend must be auto or reference, got {backend!r}")
        self.layout = CodebookLayout.of(num_codes, dims)
        self.decay = decay
        self.commitment_weight = commitment_weight
        self.codebook_init = codebook_init
        self.use_ema = use_ema
        self.rotation_trick = rotation_trick
        self.smoothing = smoothing
        self.centred = centred
        self.frozen = False

        layout = self.layout
        index = layout.indices(torch.device("cpu"))
        bound = (1.0 / index.num_codes)[index.code_book][index.entry_code]
        start = (2.0 * torch.rand(layout.total_entries) - 1.0) * bound
        if use_ema:
            self.register_buffer("embedding", start)
        else:
            self.embedding = nn.Parameter(start)
        self.register_buffer("cluster_size", torch.ones(layout.total_codes))
        self.register_buffer("embedding_sum", start.clone())
        self.register_buffer("initialized", torch.tensor(codebook_init == "uniform"))
        self.register_buffer("usage", torch.zeros(layout.total_codes), persistent=False)
        self.register_buffer("nonfinite_rows", torch.zeros((), dtype=torch.int64), persistent=False)
        self._needs_init = codebook_init == "kmeans"

    @property
    def backend(self) -> str:
        """The implementation in use."""
        return "reference"

    @property
    def num_codes(self) -> tuple[int, ...]:
        return self.layout.num_codes

    @property
    def dims(self) -> tuple[int, ...]:
        return self.layout.dims

    def extra_repr(self) -> str:
        layout = self.layout
        return f"{layout.groups} codebooks, {layout.total_codes} codes, {layout.total_dims} dimensions"

    def forward(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes and, in training mode, updates the codes.

        Args:
            z: [..., sum D] latents.
            mask: [...] bool; where False a row gives code -1 and NaN and takes no part in the loss.

        Returns:
            quantized [..., sum D], codes [..., G], and the loss: the sum over codebooks of
            commitment_weight * mean((z - sg(e))^2) (with learned codes also mean((sg(z) - e)^2)).
        """
        flat = z.reshape(-1, z.shape[-1])
        rows = mask.reshape(-1) if mask is not None else None
        if self.training and self._needs_init:
            usable = torch.isfinite(flat).all(1) if rows is None else torch.isfinite(flat).all(1) & rows
            if bool(usable.any()):
                self.initialize(flat[usable])
        found = self.assign(flat, rows)
        loss = self._loss(flat, found, rows)
        quantized = quantize(flat, found.quantized, self.layout, self.rotation_trick)
        if self.training and not self.frozen:
            self._update(found, flat.shape[0], rows)
        return quantized.view(z.shape), found.codes.view(*z.shape[:-1], self.layout.groups), loss

    def assign(self, z: Tensor, mask: Tensor | None = None) -> Assignment:
        """Nearest codes of z [N, sum D] without gradient or update."""
        return vq_assign(z, self.embedding, self.layout, mask, self.centred)

    def _loss(self, z: Tensor, found: Assignment, rows: Tensor | None) -> Tensor:
        index = self.layout.indices(z.device)
        weight = (1.0 / index.dims)[index.column_book]
        z = z.to(self.embedding.dtype)

        def mean_square(difference: Tensor) -> Tensor:
            count: Tensor | int = max(z.shape[0], 1)
            if rows is not None:
                # Before the square: the gradient of NaN is NaN, even times zero.
                difference = torch.where(rows[:, None], difference, 0.0)
                count = rows.sum().clamp(min=1)
            return (difference.square().sum(0) * weight).sum() / count

        loss = self.commitment_weight * mean_square(z - found.quantized)
        if not self.use_ema:
            learned = gather_codes(found.codes, self.embedding, self.layout)
            loss = loss + mean_square(z.detach() - learned)
        return loss

    @torch.no_grad()
    def _update(self, found: Assignment, rows: int, mask: Tensor | None) -> None:
        expected = rows if mask is None else mask.sum()
        self.nonfinite_rows += expected - (found.codes >= 0).all(1).sum()
        self.usage += found.counts
        if self.use_ema:
            ema_update(
                self.embedding,
                self.cluster_size,
                self.embedding_sum,
                found.counts,
                found.sums,
                self.layout,
                self.decay,
                self.smoothing,
            )
        else:
            self.cluster_size.mul_(self.decay).add_(found.counts, alpha=1.0 - self.decay)

    @torch.no_grad()
    def initialize(self, z: Tensor, iterations: int = 10, generator: torch.Generator | None = None) -> None:
        """Fits the codes to rows z [N, sum D] by k-means; moving counts start as the rows of each code."""
        codebook, counts = kmeans(z.detach(), self.layout, iterations, generator)
        index = self.layout.indices(z.device)
        self.embedding.data.copy_(codebook)
        self.cluster_size.copy_(counts)
        self.embedding_sum.copy_(codebook * counts[index.entry_code])
        self.initialized.fill_(True)
        self._needs_init = False

    def codebook(self, g: int) -> Tensor:
        """Codes of codebook g [K_g, D_g], a view."""
        layout = self.layout
        if not 0 <= g < layout.groups:
            raise IndexError(f"codebook {g} of {layout.groups}")
        return self.embedding[layout.entry_slice(g)].view(layout.num_codes[g], layout.dims[g])

    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors [..., sum D] of indices [..., G]; raises IndexError outside a codebook."""
        flat = lookup(codes.reshape(-1, codes.shape[-1]), self.embedding, self.layout)
        return flat.view(*codes.shape[:-1], self.layout.total_dims)

    def freeze(self, frozen: bool = True) -> None:
        """Stops (or restarts) updates of the codes in training mode."""
        self.frozen = frozen

    def utilization(self) -> Tensor:
        """[G] share of codes used in training since `reset_usage`, at most 1."""
        return utilization(self.usage, self.layout)

    def perplexity(self) -> Tensor:
        """[G] exp of the entropy of code use in training since `reset_usage`."""
        return perplexity(self.usage, self.layout)

    def reset_usage(self) -> None:
        """Starts a new window for `utilization` and `perplexity`."""
        self.usage.zero_()

    def reset_dead_codes(
        self,
        threshold: float = 0.05,
        strategy: Literal["perturb", "sample"] = "perturb",
        max_fraction: float = 0.25,
        latents: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Replaces codes used less than `threshold` of their codebook's mean; [G] how many.

        Args:
            strategy: "perturb" copies often used codes with noise, "sample" takes rows of `latents`.
            max_fraction: largest share of a codebook that is replaced.
            latents: [N, sum D].
        """
        return reset_dead_codes(
            self.embedding.data,
            self.cluster_size,
            self.embedding_sum,
            self.layout,
            threshold,
            strategy,
            max_fraction,
            latents,
            generator=generator,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._needs_init = not bool(self.initialized)
