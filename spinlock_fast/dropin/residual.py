"""`ResidualVQ` of vector-quantize-pytorch: all stages in one fused operator where the arguments permit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from spinlock_fast.dropin import losses
from spinlock_fast.dropin.arguments import check_mask, warn_unfused
from spinlock_fast.dropin.decoding import check_indices, code_vectors, zero_missing
from spinlock_fast.dropin.gradient_estimators import directional_reparam
from spinlock_fast.dropin.implicit_codebook import ImplicitCodebook
from spinlock_fast.dropin.input_layout import InputLayout, apply_projection
from spinlock_fast.dropin.residual_stages import ResidualStages
from spinlock_fast.dropin.vector_quantize import VectorQuantize
from spinlock_fast.quantize.activation_checkpointing import once
from spinlock_fast.quantize.process_group import Processes


class ResidualVQ(ResidualStages):
    """Residual vector quantization: each stage quantizes the error of the stages before (Zeghidour et al. 2021).

    Arguments, `forward` and returns are those of vector-quantize-pytorch 1.32 and documented there; docs/drop-in.md
    lists how each is implemented. Further arguments, including `corrections` and `process_group`, are those of
    `VectorQuantize`.

    Shapes:
        x [b, n, dim] (or [b, dim]; images [b, dim, h, w]) -> quantized, same shape; codes [b, n, q] int64, -1 where
        masked or dropped out; losses [q].

    Raises:
        ValueError: incompatible arguments, or an input of the wrong shape or dtype.
    """

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
        self.dim = dim
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.has_projections = self.codebook_dim != dim
        self.project_in: nn.Module = nn.Linear(dim, self.codebook_dim) if self.has_projections else nn.Identity()
        self.project_out: nn.Module = nn.Linear(self.codebook_dim, dim) if self.has_projections else nn.Identity()
        self.accept_image_fmap, self.channel_last = accept_image_fmap, vq_kwargs.get("channel_last", True)
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.implicit_neural_codebook = implicit_neural_codebook
        self.diveq, self.shared_codebook = diveq, shared_codebook
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
        self.vq_is_ema_updating = self.layer(0).ema_update
        if diveq and self.vq_is_ema_updating:
            raise ValueError("diveq does not go with ema_update")
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac
        self.beam_size = beam_size
        self.eval_beam_size = beam_size if eval_beam_size is None else eval_beam_size
        weights = [1.0] * self.num_quantizers if beam_score_quantizer_weights is None else beam_score_quantizer_weights
        if len(weights) != self.num_quantizers:
            raise ValueError(f"beam_score_quantizer_weights must be {self.num_quantizers} numbers, got {len(weights)}")
        self._score_weights = tuple(float(weight) for weight in weights)
        self.register_transient_buffers()
        self.mlps: nn.ModuleList | tuple[None, ...] = (None,) * (self.num_quantizers - 1)
        if implicit_neural_codebook:
            unit_codes = self.layer(0).use_cosine_sim
            self.mlps = nn.ModuleList(
                ImplicitCodebook(dim=self.codebook_dim, l2norm_output=unit_codes, **(mlp_kwargs or {}))
                for _ in range(self.num_quantizers - 1)
            )
        self._warn_unfused_arguments()
        if shared_codebook:
            if not self.uniform_codebook_size:
                raise ValueError("shared_codebook needs codebooks of one size")
            for layer in self.layers:
                layer._codebook = self.layer(0)._codebook

    def transient_buffers(self) -> dict[str, Tensor]:
        return {"beam_score_weights": torch.tensor(self._score_weights, device="cpu")}

    def _warn_unfused_arguments(self) -> None:
        for name in ("diveq", "implicit_neural_codebook", "beam_size"):
            if getattr(self, name):
                warn_unfused(name)
        if self.quant_grad_frac > 0.0 and not self.diveq:
            warn_unfused("quant_grad_frac", "runs one operator per stage")

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """Processes that share updates; None for all."""
        return self._processes.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        for q in range(self.num_quantizers):
            self.layer(q).process_group = group

    @property
    def _processes(self) -> Processes:
        return self.layer(0)._codebook.processes

    @property
    def codebook_size(self) -> int:
        return self.layer(0).codebook_size

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """[q, K, D], or a tuple of [K_q, D] if stages differ in codebook size."""
        codebooks = tuple(self.layer(q)._codebook.embed[0] for q in range(self.num_quantizers))
        return torch.stack(codebooks) if self.uniform_codebook_size else codebooks

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Code vectors [q, b, ..., D] of indices [b, ..., q]; 0 where an index is -1 or its stage is missing.

        Raises:
            ValueError: indices that are not integers, or of the wrong number of stages.
            IndexError: an index outside its codebook, on a CPU.
        """
        indices, stages = check_indices(indices), indices.shape[-1]
        if stages > self.num_quantizers:
            raise ValueError(f"indices must be of at most {self.num_quantizers} stages, got {stages}")
        if stages < self.num_quantizers:
            if not self.quantize_dropout:
                raise ValueError(f"without quantize_dropout, indices are of {self.num_quantizers} stages, got {stages}")
            indices = F.pad(indices, (0, self.num_quantizers - stages), value=-1)
        flat = indices.reshape(indices.shape[0], -1, self.num_quantizers)  # [b, n, q]
        vectors: list[Tensor] = []
        for q, index in enumerate(flat.unbind(-1)):
            codebook = self.layer(q).effective_codes()[0]
            network = self._implicit_codebook(q)
            if network is None:
                vectors.append(code_vectors(codebook, index))
                continue
            row_codebooks = network(codebook, condition=torch.stack(vectors).sum(0))  # [b, n, K, D]
            at = index.clamp(min=0)[..., None, None].expand(*index.shape, 1, row_codebooks.shape[-1])
            vectors.append(row_codebooks.gather(2, at)[:, :, 0].masked_fill((index == -1)[..., None], 0.0))
        return torch.stack(vectors).view(self.num_quantizers, *indices.shape[:-1], -1)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output of `forward` in eval mode for these codes; 0 where masked (-1).

        Raises:
            ValueError: indices that are not integers, or of the wrong number of stages.
            IndexError: an index outside its codebook, on a CPU.
        """
        output = apply_projection(self.project_out, self.get_codes_from_indices(indices).sum(0))
        output = zero_missing(output, indices == -1)
        return output if self.channel_last and not self.accept_image_fmap else output.movedim(-1, 1)

    def utilization(self) -> Tensor:
        """[q] fraction of codes used in training since `reset_usage`, without host synchronisation."""
        return torch.stack([self.layer(q).utilization() for q in range(self.num_quantizers)])

    def perplexity(self) -> Tensor:
        """[q] exp of the entropy of code use in training since `reset_usage`."""
        return torch.stack([self.layer(q).perplexity() for q in range(self.num_quantizers)])

    def reset_usage(self) -> None:
        """Resets the counts behind `utilization` and `perplexity`."""
        for q in range(self.num_quantizers):
            self.layer(q).reset_usage()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
    ) -> Any:
        """Quantizes x and, in training mode, updates the codebooks.

        Args:
            x: input, see the class for shapes.
            mask: [b, n] bool; rows where it is False are ignored and get codes -1 and output 0.
            indices: codes [b, n, q]; returns (quantized, cross entropy of these codes) instead.
            return_all_codes: appends the code vectors of each stage, [q, b, n, D], to the result.
            sample_codebook_temp: temperature of `stochastic_sample_codes`.
            freeze_codebook: no update.
            beam_size: overrides the constructor's `beam_size`.
            rand_quantize_dropout_fixed_seed: seed of the number of stages that dropout keeps; a tensor is that number.
        """
        layout = InputLayout.of(x, self.dim, self.channel_last, self.accept_image_fmap, False)
        if mask is not None and layout.layout in ("token", "image"):
            raise ValueError(f"mask does not go with an input of shape {list(x.shape)}")
        origin = layout.to_rows(x)
        check_mask(mask, origin)
        rows = apply_projection(self.project_in, origin)
        if indices is not None:
            codes = torch.stack(indices) if isinstance(indices, list) else indices
            quantized, loss = self._quantize_with_cross_entropy(
                layout, rows, codes, mask, sample_codebook_temp, freeze_codebook
            )
            output = self._apply_padding(apply_projection(self.project_out, quantized), origin, mask)
            return layout.from_rows(output), loss
        beam_size = beam_size or (self.beam_size if self.training else self.eval_beam_size) or 1
        fused = beam_size == 1 and once(self, lambda: self._is_fusable(mask))
        seed, active_stages, stages = rand_quantize_dropout_fixed_seed, None, self.num_quantizers
        if self.training and self.quantize_dropout:
            if isinstance(seed, Tensor) or (fused and seed is None and torch.compiler.is_compiling()):
                active_stages = seed if isinstance(seed, Tensor) else self.draw_num_stages(x.device)
            else:
                stages = self._num_stages_from_seed(x.device, seed)
        if beam_size > 1:
            results = self._quantize_by_beam(rows, mask, stages, beam_size, sample_codebook_temp, freeze_codebook)
        elif fused:
            results = self._quantize_fused(rows, mask, stages, freeze_codebook, active_stages)
        else:
            results = self._quantize_by_stage(layout, rows, mask, stages, sample_codebook_temp, freeze_codebook)
        quantized, codes, loss = results
        dropped = self.num_quantizers - stages
        if dropped:
            codes, loss = F.pad(codes, (0, dropped), value=-1), F.pad(loss, (0, dropped))
        loss = losses.ensure_backward(loss) if self.training else loss
        if self.diveq:
            quantized = directional_reparam(rows, quantized)
        output = self._apply_padding(apply_projection(self.project_out, quantized).to(x.dtype), origin, mask)
        codes = layout.unflatten_positions(codes)
        returned = layout.from_rows(output), codes, loss
        return (*returned, self.get_codes_from_indices(codes)) if return_all_codes else returned

    def _apply_padding(self, output: Tensor, origin: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return output
        padding = torch.zeros_like(output) if self.return_zeros_for_masked_padding else origin
        return torch.where(mask[..., None], output, padding)

    def _num_stages_from_seed(self, device: torch.device, seed: int | None) -> int:
        """Random number of stages that dropout keeps, the same in all processes."""
        seed = once(self, lambda: draw_shared_seed(device, self._processes)) if seed is None else seed
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(ceil((last + 1) / multiple) * multiple, self.num_quantizers)

    def draw_num_stages(self, device: torch.device) -> Tensor:
        """Random number of stages that dropout keeps, as a tensor for compiled graphs; on the CPU with one process,
        where reading it needs no device synchronisation."""
        distributed = self._processes.size() > 1
        draw_device = device if distributed else torch.device("cpu")
        last = torch.randint(self.quantize_dropout_cutoff_index, self.num_quantizers, (), device=draw_device)
        if distributed:
            self._processes.copy_first_(last)
        multiple = self.quantize_dropout_multiple_of
        return ((last // multiple + 1) * multiple).clamp(max=self.num_quantizers)


def draw_shared_seed(device: torch.device, processes: Processes) -> int:
    """A random seed, equal in all processes."""
    seed = torch.randint(0, 10_000, (), device=device)
    if processes.size() > 1:
        processes.copy_first_(seed)
    return int(seed)
