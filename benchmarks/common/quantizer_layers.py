"""Quantizer layers under test, those of other packages, and checks that their codes are right before they are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.benchmark import SEED_FEATURES
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.vq_assign import vq_assign
from spinlock_fast.quantize import GroupedVectorQuantizer, resolve_levels

DECAY = 0.99


def seed_layout() -> CodebookLayout:
    """The 33 codebooks of the 100K run."""
    levels = resolve_levels({f"c{i}": n for i, n in enumerate(SEED_FEATURES)}, [], "0.5:1:1.5")
    codebooks = [codebook for level in levels.values() for codebook in level]
    return CodebookLayout.of([c.num_tokens for c in codebooks], [c.latent_dim for c in codebooks])


# Rows, codes and dimensions of each codebook. The large shapes need a GPU.
SHAPES: dict[str, tuple[int, Sequence[int], Sequence[int]]] = {
    "seed": (512, seed_layout().num_codes, seed_layout().dims),
    "medium": (8192, [1024], [64]),
    "wide": (65536, [1024], [256]),
    "tall": (1 << 20, [8192], [64]),
}
LARGE = ("wide", "tall")


def random_inputs(
    rows: int, num_codes: Sequence[int], dims: Sequence[int], device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Latents [rows, sum D] and codes [K_g, D_g] of each codebook, standard normal."""
    generator = torch.Generator(device).manual_seed(0)
    z = torch.randn(rows, sum(dims), device=device, generator=generator)
    return z, [torch.randn(K, D, device=device, generator=generator) for K, D in zip(num_codes, dims, strict=True)]


def grouped_quantizer(codes: Sequence[Tensor], backend: Any = "auto") -> GroupedVectorQuantizer:
    """A `GroupedVectorQuantizer` in training mode with the given codes."""
    num_codes, dims = [len(code) for code in codes], [code.shape[1] for code in codes]
    layer = GroupedVectorQuantizer(num_codes, dims, DECAY, codebook_init="uniform", backend=backend).to(codes[0].device)
    packed = torch.cat([code.flatten() for code in codes])
    layer.embedding.copy_(packed)
    layer.embedding_sum.copy_(packed)
    return layer.train()


def peer_quantizers(codes: Sequence[Tensor]) -> Iterator[tuple[str, Any]]:
    """Names and layers of other packages, where installed, with the given codes."""
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        return
    layers = []
    for code in codes:
        K, D = code.shape
        layer = VectorQuantize(dim=D, codebook_size=K, decay=DECAY, commitment_weight=0.25, learnable_codebook=False)
        layer = layer.to(code.device).train()
        layer._codebook.embed.data.copy_(code)
        layer._codebook.embed_avg.data.copy_(code)
        layers.append(layer)

    def one_layer_per_codebook(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        columns = z.split([code.shape[1] for code in codes], 1)
        results = [layer(part) for layer, part in zip(layers, columns, strict=True)]
        quantized, indices, losses = zip(*results, strict=True)
        return torch.cat(quantized, 1), torch.stack(indices, 1), torch.stack([loss.sum() for loss in losses]).sum()

    yield "vector-quantize-pytorch", one_layer_per_codebook


def quantizer_step(layer: Callable[[Tensor], Any], z: Tensor) -> None:
    """Forward pass, backward pass and codebook update."""
    leaf = z.detach().requires_grad_()
    quantized, _, loss = layer(leaf)
    (quantized.sum() + loss.sum()).backward()


def check_nearest(z: Tensor, codebook: Tensor, layout: CodebookLayout, backend: str) -> None:
    """Raises AssertionError unless the codes of the first rows are the nearest in float64."""
    assignment = vq_assign(z, codebook, layout, backend=backend)
    assert float(assignment.counts.sum()) == z.shape[0] * layout.groups
    for g in range(layout.groups):
        rows = z[:512, layout.column_slice(g)].double()
        codes = codebook[layout.entry_slice(g)].view(layout.num_codes[g], -1).double()
        distance = torch.cdist(rows, codes).square()
        chosen = distance.gather(1, assignment.codes[:512, g : g + 1])[:, 0]
        scale = rows.square().sum(1) + codes.square().sum(1).max()
        bound = 4 * layout.dims[g] ** 0.5 * torch.finfo(torch.float32).eps * scale
        assert bool((chosen - distance.min(1).values <= bound).all()), f"codebook {g}"


def check_same_codes(expected: Tensor, actual: Tensor) -> None:
    """Raises AssertionError unless almost all codes are equal: packages may differ where two codes are equally near."""
    assert float((expected != actual).double().mean()) < 1e-3, "the codes differ"
