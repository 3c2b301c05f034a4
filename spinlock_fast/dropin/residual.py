"""`ResidualVQ` of vector-quantize-pytorch: all stages in one operator where that serves."""

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
from spinlock_fast.dropin.arguments import check_mask, warn_reference
from spinlock_fast.dropin.decoding import checked_indices, code_vectors, hide_missing
from spinlock_fast.dropin.implicit import CodeNetwork
from spinlock_fast.dropin.shapes import InputShape, projected
from spinlock_fast.dropin.stages import by_beam, by_stages, fused, stages_fuse, with_cross_entropy
from spinlock_fast.dropin.usage import perplexity, utilization
from spinlock_fast.dropin.vector_quantize import VectorQuantize
from spinlock_fast.quantize.activation_checkpointing import once
from spinlock_fast.quantize.buffers import TransientBuffers
from spinlock_fast.quantize.process_group import Processes


class ResidualVQ(TransientBuffers):
    """Quantizes vectors, then what each stage leaves over (Zeghidour et al. 2021, algorithm 1).

    Arguments, `forward` and returns are those of vector-quantize-pytorch 1.32 and documented there; docs/drop-in.md
    says how each is served. Further arguments, `corrections` and `process_group` among them, are those of
    `VectorQuantize`.

    Shapes:
        x [b, n, dim] (or [b, dim]; images [b, dim, h, w]) -> quantized like x; codes [b, n, q] int64, -1 where masked
        or dropped out; losses [q].

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
        self.dim = dim
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.has_projections = self.codebook_dim != dim
        self.project_in: nn.Module = nn.Linear(dim, self.codebook_dim) if self.has_projections else nn.Identity()
        self.project_out: nn.Module = nn.Linear(self.codebook_dim, dim) if self.has_projections else nn.Identity()
        self.accept_image_fmap, self.channel_last = accept_image_fmap, vq_kwargs.get("channel_last", True)
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.implicit_neural_codebook, self.diveq, self.shared_codebook = (
            implicit_neural_codebook,
            diveq,
            shared_codebook,
        )
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
                CodeNetwork(dim=self.codebook_dim, l2norm_output=unit_codes, **(mlp_kwargs or {}))
                for _ in range(self.num_quantizers - 1)
            )
        self._say_what_is_slow()
        if shared_codebook:
            if not self.uniform_codebook_size:
                raise ValueError("shared_codebook needs codebooks of one size")
            for layer in self.layers:
                layer._codebook = self.layer(0)._codebook

    def transient_buffers(self) -> dict[str, Tensor]:
        return {"beam_score_weights": torch.tensor(self._score_weights, device="cpu")}

    def layer(self, q: int) -> VectorQuantize:
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
    def process_group(self) -> dist.ProcessGroup | None:
        """The processes that share updates; None for all."""
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
        """[q, K, D], or [K_q, D] of each stage where they differ in size."""
        books = tuple(self.layer(q)._codebook.embed[0] for q in range(self.num_quantizers))
        return torch.stack(books) if self.uniform_codebook_size else books

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Code vectors [q, b, ..., D] of indices [b, ..., q]; 0 where an index is -1 or its stage is not given.

        Raises:
            ValueError: indices that are not integers, or of another number of stages.
            IndexError: an index outside its codebook, on a CPU.
        """
        indices, given = checked_indices(indices), indices.shape[-1]
        if given > self.num_quantizers:
            raise ValueError(f"indices must be of at most {self.num_quantizers} stages, got {given}")
        if given < self.num_quantizers:
            if not self.quantize_dropout:
                raise ValueError(f"without quantize_dropout, indices are of {self.num_quantizers} stages, got {given}")
            indices = F.pad(indices, (0, self.num_quantizers - given), value=-1)
        flat = indices.reshape(indices.shape[0], -1, self.num_quantizers)  # [b, n, q]
        codes: list[Tensor] = []
        for q, index in enumerate(flat.unbind(-1)):
            book = self.layer(q).codes_in_use()[0]
            network = self.mlps[q - 1] if q > 0 else None
            if network is None:
                codes.append(code_vectors(book, index))
                continue
            own = network(book, condition=torch.stack(codes).sum(0))  # [b, n, K, D]
            at = index.clamp(min=0)[..., None, None].expand(*index.shape, 1, own.shape[-1])
            codes.append(own.gather(2, at)[:, :, 0].masked_fill((index == -1)[..., None], 0.0))
        return torch.stack(codes).view(self.num_quantizers, *indices.shape[:-1], -1)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` returns in eval mode for these codes, channels where the input has them; 0 where masked.

        Raises:
            ValueError: indices that are not integers, or of another number of stages.
            IndexError: an index outside its codebook, on a CPU.
        """
        output = projected(self.project_out, self.get_codes_from_indices(indices).sum(0))
        output = hide_missing(output, indices == -1)
        return output if self.channel_last and not self.accept_image_fmap else output.movedim(-1, 1)

    def utilization(self) -> Tensor:
        """[q] share of codes used in training since `reset_usage`; nothing waits for the device."""
        return torch.stack([utilization(self.layer(q)._codebook.usage[0]) for q in range(self.num_quantizers)])

    def perplexity(self) -> Tensor:
        """[q] exp of the entropy of code use in training since `reset_usage`."""
        return torch.stack([perplexity(self.layer(q)._codebook.usage[0]) for q in range(self.num_quantizers)])

    def reset_usage(self) -> None:
        """Starts a new window for `utilization` and `perplexity`."""
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
        """Quantizes and, in training mode, updates the codes.

        Args:
            x: see the class.
            mask: [b, n] bool; where False a row gives codes -1 and 0 and takes no part.
            indices: [b, n, q] codes whose cross entropy is returned instead: (quantized, loss).
            return_all_codes: append the code vectors of each stage, [q, b, n, D].
            sample_codebook_temp: of `stochastic_sample_codes`.
            freeze_codebook: no update.
            beam_size: candidates a row, in place of that of the constructor.
            rand_quantize_dropout_fixed_seed: of the number of stages that dropout leaves; a tensor is that number.
        """
        shape = InputShape.of(x, self.dim, self.channel_last, self.accept_image_fmap, False)
        if mask is not None and shape.layout in ("token", "image"):
            raise ValueError(f"mask does not go with an input of shape {list(x.shape)}")
        origin = shape.rows(x)
        check_mask(mask, origin)
        rows = projected(self.project_in, origin)
        if indices is not None:
            given = torch.stack(indices) if isinstance(indices, list) else indices
            total, loss = with_cross_entropy(self, shape, rows, given, mask, sample_codebook_temp, freeze_codebook)
            return shape.restore(self._masked(projected(self.project_out, total), origin, mask)), loss
        beam = beam_size or (self.beam_size if self.training else self.eval_beam_size) or 1
        plain = beam == 1 and once(self, lambda: stages_fuse(self, mask))
        seed, limit, stages = rand_quantize_dropout_fixed_seed, None, self.num_quantizers
        if self.training and self.quantize_dropout:
            if isinstance(seed, Tensor) or (plain and seed is None and torch.compiler.is_compiling()):
                limit = seed if isinstance(seed, Tensor) else self.draw_stages(x.device)
            else:
                stages = self._stages(x.device, seed)
        if beam > 1:
            found = by_beam(self, rows, mask, stages, beam, sample_codebook_temp, freeze_codebook)
        elif plain:
            found = fused(self, rows, mask, stages, freeze_codebook, limit)
        else:
            found = by_stages(self, shape, rows, mask, stages, sample_codebook_temp, freeze_codebook)
        quantized, codes, loss = found
        missing = self.num_quantizers - stages
        codes, loss = F.pad(codes, (0, missing), value=-1), F.pad(loss, (0, missing))
        loss = losses.with_backward(loss) if self.training else loss
        if self.diveq:
            quantized = losses.step_in_direction(rows, quantized)
        output = self._masked(projected(self.project_out, quantized).to(x.dtype), origin, mask)
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
        seed = once(self, lambda: shared_seed(device, self._processes)) if seed is None else seed
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(ceil((last + 1) / multiple) * multiple, self.num_quantizers)

    def draw_stages(self, device: torch.device) -> Tensor:
        """As `_stages`, as a tensor that a compiled graph can draw: on the CPU, where reading it waits for nothing."""
        shared = self._processes.size() > 1
        place = device if shared else torch.device("cpu")
        last = torch.randint(self.quantize_dropout_cutoff_index, self.num_quantizers, (), device=place)
        if shared:
            self._processes.max_(last)
        multiple = self.quantize_dropout_multiple_of
        return ((last // multiple + 1) * multiple).clamp(max=self.num_quantizers)


def shared_seed(device: torch.device, processes: Processes) -> int:
    """A random number that all processes share."""
    seed = torch.randint(0, 10_000, (), device=device)
    if processes.size() > 1:
        processes.sum_(seed)
    return int(seed)


def skip_seed(device: torch.device) -> None:
    """Leaves the generator as `shared_seed` does: the original draws a seed that it does not need."""
    if not torch.compiler.is_compiling():
        torch.randint(0, 10_000, (), device=device)
