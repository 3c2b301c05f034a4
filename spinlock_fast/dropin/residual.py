"""`ResidualVQ` of vector-quantize-pytorch: all stages in one operator where that serves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from spinlock_fast.dropin import losses
from spinlock_fast.dropin.arguments import warn_reference
from spinlock_fast.dropin.beam import beam_search, update_stages
from spinlock_fast.dropin.codebook import Piece, update
from spinlock_fast.dropin.implicit import CodeNetwork
from spinlock_fast.dropin.search import gradient_mode
from spinlock_fast.dropin.shapes import InputShape
from spinlock_fast.dropin.usage import perplexity, utilization
from spinlock_fast.dropin.vector_quantize import VectorQuantize
from spinlock_fast.kernels.residual_vq import ResidualAssignment, residual_vq


class ResidualVQ(nn.Module):
    """Quantizes vectors, then what each stage leaves over (Zeghidour et al. 2021, algorithm 1).

    Arguments, `forward` and returns are those of vector-quantize-pytorch 1.32 and documented there; docs/drop-in.md
    says how each is served. Further arguments, `corrections` among them, are those of `VectorQuantize`.

    Shapes:
        x [b, n, dim] (or [b, dim]; images [b, dim, h, w]) -> quantized like x; codes [b, n, q] int64, -1 where masked or
        dropped out; losses [q].

    Raises:
        ValueError: arguments that contradict each other, or an input that does not fit.
    """

    beam_score_weights: Tensor

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: dict[str, Any] | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: Sequence[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_kwargs: Any,
    ) -> None:
        super().__init__()
        sizes = codebook_size if isinstance(codebook_size, tuple) else (codebook_size,) * (num_quantizers or 0)
        self.num_quantizers = len(sizes) if num_quantizers is None else num_quantizers
        if heads != 1:
            raise ValueError("residual quantizers have one head")
        if not sizes or len(sizes) != self.num_quantizers:
            raise ValueError(f"num_quantizers={num_quantizers} does not fit codebook_size={codebook_size}")
        if quantize_dropout_cutoff_index < 0:
            raise ValueError(f"quantize_dropout_cutoff_index must be 0 or more, got {quantize_dropout_cutoff_index}")
        if eval_beam_size is not None and beam_size is None:
            raise ValueError("eval_beam_size needs beam_size")
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.has_projections = self.codebook_dim != dim
        self.project_in: nn.Module = nn.Linear(dim, self.codebook_dim) if self.has_projections else nn.Identity()
        self.project_out: nn.Module = nn.Linear(self.codebook_dim, dim) if self.has_projections else nn.Identity()
        self.accept_image_fmap, self.channel_last = accept_image_fmap, vq_kwargs.get("channel_last", True)
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.implicit_neural_codebook, self.diveq, self.shared_codebook = implicit_neural_codebook, diveq, shared_codebook
        vq_kwargs = {**vq_kwargs, "return_zeros_for_masked_padding": return_zeros_for_masked_padding}
        if implicit_neural_codebook:
            vq_kwargs |= {"learnable_codebook": True, "ema_update": False}
        if shared_codebook:
            vq_kwargs |= {"manual_ema_update": True, "manual_in_place_optimizer_update": True}
        if diveq:
            vq_kwargs |= {"ema_update": False, "learnable_codebook": True, "route_gradients_to_input": False}
            vq_kwargs["commitment_weight"] = 0.0
        self.codebook_sizes = tuple(sizes)
        self.uniform_codebook_size = len(set(sizes)) == 1
        self.layers = nn.ModuleList(
            VectorQuantize(
                dim=self.codebook_dim,
                codebook_size=size,
                codebook_dim=self.codebook_dim,
                accept_image_fmap=accept_image_fmap,
                **vq_kwargs,
            )
            for size in sizes
        )
        self.quantize_dropout = quantize_dropout and self.num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.vq_is_ema_updating = self._layer(0).ema_update
        if diveq and self.vq_is_ema_updating:
            raise ValueError("diveq does not go with ema_update")
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac
        self.beam_size = beam_size
        self.eval_beam_size = beam_size if eval_beam_size is None else eval_beam_size
        weights = [1.0] * self.num_quantizers if beam_score_quantizer_weights is None else beam_score_quantizer_weights
        if len(weights) != self.num_quantizers:
            raise ValueError(f"beam_score_quantizer_weights must be {self.num_quantizers} numbers, got {len(weights)}")
        self.register_buffer("beam_score_weights", torch.tensor(weights), persistent=False)
        self.mlps: nn.ModuleList | tuple[None, ...] = (None,) * (self.num_quantizers - 1)
        if implicit_neural_codebook:
            unit_codes = self._layer(0).use_cosine_sim
            self.mlps = nn.ModuleList(
                CodeNetwork(dim=self.codebook_dim, l2norm_output=unit_codes, **(mlp_kwargs or {}))
                for _ in range(self.num_quantizers - 1)
            )
        self._say_what_is_slow()
        if shared_codebook:
            if not self.uniform_codebook_size:
                raise ValueError("shared_codebook needs codebooks of one size")
            for layer in self.layers:
                layer._codebook = self._layer(0)._codebook

    def _layer(self, q: int) -> VectorQuantize:
        layer = self.layers[q]
        assert isinstance(layer, VectorQuantize)
        return layer

    def _say_what_is_slow(self) -> None:
        for name in ("diveq", "implicit_neural_codebook", "beam_size"):
            if getattr(self, name):
                warn_reference(name)
        if self.quant_grad_frac > 0.0 and not self.diveq:
            warn_reference("quant_grad_frac", "takes one operator a stage")

    @property
    def codebook_size(self) -> int:
        return self._layer(0).codebook_size

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """[q, K, D], or [K_q, D] of each stage where they differ in size."""
        books = tuple(self._layer(q)._codebook.embed[0] for q in range(self.num_quantizers))
        return torch.stack(books) if self.uniform_codebook_size else books

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Code vectors [q, b, ..., D] of indices [b, ..., q]; 0 where an index is -1 or its stage is not given."""
        given, device = indices.shape[-1], indices.device
        if given < self.num_quantizers:
            if not self.quantize_dropout:
                raise ValueError(f"indices must be of {self.num_quantizers} stages without quantize_dropout, got {given}")
            indices = F.pad(indices, (0, self.num_quantizers - given), value=-1)
        missing = (indices == -1).movedim(-1, 0)[..., None]  # [q, b, ..., 1]
        indices = indices.clamp(min=0)
        codebooks = self.codebooks
        if isinstance(codebooks, Tensor) and not self.implicit_neural_codebook:
            stage = torch.arange(self.num_quantizers, device=device)
            codes = codebooks[stage, indices].movedim(-2, 0)
        else:
            codes = torch.stack(self._codes_by_stage(codebooks, indices))
        return codes.masked_fill(missing, 0.0)

    def _codes_by_stage(self, codebooks: Tensor | Sequence[Tensor], indices: Tensor) -> list[Tensor]:
        flat = indices.flatten(1, -2)  # [b, n, q]
        codes: list[Tensor] = []
        total = torch.zeros((), device=indices.device)
        for q, (book, index) in enumerate(zip(codebooks, flat.unbind(-1), strict=True)):
            network = self.mlps[q - 1] if q > 0 else None
            if network is None:
                chosen = book[index]
            else:
                own = network(book, condition=total)  # [b, n, K, D]
                chosen = own.gather(2, index[..., None, None].expand(*index.shape, 1, own.shape[-1]))[:, :, 0]
            codes.append(chosen)
            total = total + chosen
        return [code.reshape(*indices.shape[:-1], -1) for code in codes]

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """[b, ..., dim] what the codes stand for."""
        output: Tensor = self.project_out(self.get_codes_from_indices(indices).sum(0))
        return output

    def utilization(self) -> Tensor:
        """[q] share of codes used in training since `reset_usage`; nothing waits for the device."""
        return torch.stack([utilization(self._layer(q)._codebook.usage[0]) for q in range(self.num_quantizers)])

    def perplexity(self) -> Tensor:
        """[q] exp of the entropy of code use in training since `reset_usage`."""
        return torch.stack([perplexity(self._layer(q)._codebook.usage[0]) for q in range(self.num_quantizers)])

    def reset_usage(self) -> None:
        """Starts a new window for `utilization` and `perplexity`."""
        for q in range(self.num_quantizers):
            self._layer(q).reset_usage()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> Any:
        """Quantizes and, in training mode, updates the codes.

        Args:
            x: see the class.
            mask: [b, n] bool; where False a row gives codes -1 and 0 and takes no part.
            indices: [b, n, q] codes whose cross entropy is returned instead: (quantized, loss).
            return_all_codes: append the code vectors of each stage, [q, b, n, D].
            sample_codebook_temp: of `stochastic_sample_codes`.
            freeze_codebook: no update.
            beam_size: candidates a row, in place of that of the constructor.
            rand_quantize_dropout_fixed_seed: of the number of stages that dropout leaves.
        """
        shape = InputShape.of(x, self.channel_last, self.accept_image_fmap, False)
        if mask is not None and shape.layout in ("token", "image"):
            raise ValueError(f"mask does not go with an input of shape {list(x.shape)}")
        origin = shape.rows(x)
        rows = self.project_in(origin)
        if indices is not None:
            return self._with_cross_entropy(shape, rows, indices, mask, sample_codebook_temp, freeze_codebook)
        stages = self._stages(x.device, rand_quantize_dropout_fixed_seed)
        beam = beam_size or (self.beam_size if self.training else self.eval_beam_size) or 1
        if beam > 1:
            found = self._by_beam(rows, mask, stages, beam, sample_codebook_temp, freeze_codebook)
        elif self._is_plain(mask):
            found = self._fused(rows, mask, stages, freeze_codebook)
        else:
            found = self._by_stages(shape, rows, mask, stages, sample_codebook_temp, freeze_codebook)
        quantized, codes, loss = found
        missing = self.num_quantizers - stages
        codes, loss = F.pad(codes, (0, missing), value=-1), F.pad(loss, (0, missing))
        if self.diveq:
            quantized = losses.step_in_direction(rows, quantized)
        output = self._masked(self.project_out(quantized.to(rows.dtype)), origin, mask)
        codes = shape.restore_positions(codes)
        result = shape.restore(output), codes, loss
        return (*result, self.get_codes_from_indices(codes)) if return_all_codes else result

    def _masked(self, output: Tensor, origin: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return output
        hidden = torch.zeros_like(output) if self.return_zeros_for_masked_padding else origin
        return torch.where(mask[..., None], output, hidden)

    def _stages(self, device: torch.device, seed: int | None) -> int:
        """Stages that take part: a random number of them under dropout, the same in all processes."""
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers
        seed = shared_seed(device) if seed is None else seed
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(ceil((last + 1) / multiple) * multiple, self.num_quantizers)

    def _is_plain(self, mask: Tensor | None) -> bool:
        """Whether one operator serves all stages."""
        layers = [self._layer(q) for q in range(self.num_quantizers)]
        first = layers[0]
        raw_loss = mask is not None and first.use_cosine_sim and "masked_commitment" not in first.corrections
        replaced_between = self.shared_codebook and self.training and first._codebook.has_dead_code_replacement
        return (
            all(layer.is_plain and not layer._codebook.needs_start for layer in layers)
            and not (self.implicit_neural_codebook or self.diveq or replaced_between)
            and not (self.training and raw_loss and first.has_commitment_loss)
            and self.quant_grad_frac <= 0.0
        )

    def _fused(
        self, rows: Tensor, mask: Tensor | None, stages: int, frozen: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        layers = [self._layer(q) for q in range(stages)]
        first, flat = layers[0], rows.reshape(-1, rows.shape[-1]).float()
        row_mask = None if mask is None else mask.flatten()
        frozen = frozen or first.freeze_codebook
        updating = self.training and not frozen
        found = residual_vq(
            flat,
            [layer._codebook.embed[0] for layer in layers],
            row_mask,
            cosine=first.use_cosine_sim,
            gradient=gradient_mode(first, rows.requires_grad),
            with_sums=updating,
        )
        valid = flat.shape[0] if row_mask is None else row_mask.sum()
        weight = first.commitment_weight if self.training and first.has_commitment_loss else 0.0
        loss = found.errors * (weight / (valid * flat.shape[1])) if weight else torch.zeros_like(found.errors)
        if updating:
            self._learn(layers, flat.detach(), found, row_mask)
        return found.quantized.view(rows.shape), found.codes.view(*rows.shape[:-1], stages), loss

    def _learn(
        self, layers: list[VectorQuantize], rows: Tensor, found: ResidualAssignment, row_mask: Tensor | None
    ) -> None:
        """Updates the stages' codebooks; rows for dead codes are formed again from the codes as they were."""
        sizes = [layer.codebook_size for layer in layers]
        counts, sums, books = found.counts.split(sizes), found.sums.split(sizes), found.codebook.split(sizes)

        def take(q: int, _: int, index: Tensor) -> Tensor:
            residual, codes = rows[index], found.codes[index].clamp(min=0)
            for s in range(q):
                residual = residual - books[s][codes[:, s]]
            return layers[q]._codebook.transform_input(residual)

        update(
            [
                Piece(layer._codebook, counts[q][None], sums[q][None], partial(take, q), len(rows), row_mask)
                for q, layer in enumerate(layers)
            ]
        )
        if self.shared_codebook and self.vq_is_ema_updating:
            layers[0]._codebook.update_ema()

    def _by_stages(
        self,
        shape: InputShape,
        rows: Tensor,
        mask: Tensor | None,
        stages: int,
        temperature: float | None,
        frozen: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        residual, total = rows, torch.zeros_like(rows)
        codes, loss, inputs = [], [], []
        for q in range(stages):
            network = self.mlps[q - 1] if q > 0 else None
            inputs.append(residual.detach())
            found, code, error = self._layer(q)(
                shape.restore(residual),
                mask=mask,
                sample_codebook_temp=temperature,
                freeze_codebook=frozen or None,
                codebook_transform_fn=None if network is None else partial(network, condition=total),
            )
            found = shape.rows(found)
            fraction = self.quant_grad_frac
            passed = found.detach() if fraction <= 0 else fraction * found + (1.0 - fraction) * found.detach()
            residual, total = residual - passed, total + found
            codes.append(shape.flatten_positions(code))
            loss.append(error)
        self._finish_shared(torch.cat(inputs, 1), mask, stages, frozen)
        return total, torch.stack(codes, -1), torch.stack(loss)

    def _finish_shared(self, inputs: Tensor, mask: Tensor | None, stages: int, frozen: bool) -> None:
        """One update of a codebook that all stages moved the averages of; inputs [b, stages * n, D]."""
        first = self._layer(0)
        if not (self.training and self.shared_codebook) or frozen or first.freeze_codebook:
            return
        if self.vq_is_ema_updating:
            first._codebook.update_ema()
            first.update_in_place_optimizer()
        first.expire_codes_(inputs, None if mask is None else mask.repeat(1, stages))

    def _by_beam(
        self,
        rows: Tensor,
        mask: Tensor | None,
        stages: int,
        size: int,
        temperature: float | None,
        frozen: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        b, n, D = rows.shape

        def stage(candidates: Tensor, q: int, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            j = candidates.shape[2]
            network = self.mlps[q - 1] if q > 0 else None
            found = self._layer(q).choose_several(
                candidates.flatten(1, 2),
                size,
                mask=None if mask is None else mask.repeat_interleave(j, 1),
                temperature=temperature,
                transform=None if network is None else partial(network, condition=total.flatten(1, 2)),
            )
            return tuple(part.unflatten(1, (n, j)) for part in found)  # type: ignore[return-value]

        quantized, codes, errors, inputs = beam_search(
            rows, stage, stages, size, self.beam_score_weights, self.quant_grad_frac
        )
        if mask is not None:
            codes = codes.masked_fill(~mask[..., None], -1)
            loss = errors.masked_fill(~mask[..., None], 0.0).sum((0, 1)) / mask.sum().clamp(min=1e-4)
        else:
            loss = errors.mean((0, 1))
        if self.training and not frozen:
            learning = stages if "beam_update" in self._layer(0).corrections else 1
            update_stages([self._layer(q) for q in range(learning)], inputs.detach(), codes, mask)
        self._finish_shared(inputs.detach().transpose(1, 2).flatten(1, 2), mask, stages, frozen)
        return quantized, codes, loss

    def _with_cross_entropy(
        self,
        shape: InputShape,
        rows: Tensor,
        indices: Tensor | list[Tensor],
        mask: Tensor | None,
        temperature: float | None,
        frozen: bool,
    ) -> tuple[Tensor, Tensor]:
        indices = torch.stack(indices) if isinstance(indices, list) else indices
        if self.accept_image_fmap:
            raise ValueError("indices do not go with accept_image_fmap")
        if bool((indices == -1).any()):
            raise ValueError("some indices were dropped out: take those of eval mode")
        residual, total, errors = rows, torch.zeros_like(rows), []
        for q in range(self.num_quantizers):
            network = self.mlps[q - 1] if q > 0 else None
            found, error = self._layer(q)(
                shape.restore(residual),
                mask=mask,
                indices=indices[..., q],
                sample_codebook_temp=temperature,
                freeze_codebook=frozen or None,
                codebook_transform_fn=None if network is None else partial(network, condition=total),
            )
            found = found.view(rows.shape)
            residual, total = residual - found.detach(), total + found
            errors.append(error)
        output = self._masked(self.project_out(total), shape.restore(rows), mask)
        return shape.restore(output), torch.stack(errors).sum()


def shared_seed(device: torch.device) -> int:
    """A random number that all processes share."""
    seed = torch.randint(0, 10_000, (), device=device)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(seed)
    return int(seed)


def skip_seed(device: torch.device) -> None:
    """Leaves the generator as `shared_seed` does: the original draws a seed that it does not need."""
    if not torch.compiler.is_compiling():
        torch.randint(0, 10_000, (), device=device)
