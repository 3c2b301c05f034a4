"""A start for the encoder: each level codes a part of its category of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.config import LevelConfig
from spinlock_fast.model import CategoricalHierarchicalVQVAE
from spinlock_fast.refit import decoder_inputs, decoder_output, least_squares

# The heads are fitted on rows with noise around them: their targets are linear, so any row can serve.
_NOISE = 0.3
_COPIES = 8
_FITTED_ROWS = 8192  # about as many; more would take memory and change nothing
_HEAD_PENALTY = 1e-4
_SHARE_PENALTY = 1e-2
_DECODER_PENALTY = 1e-1
_LEAST_BITS = 0.02  # a component that is worth less is left out
_LEAST_VARIANCE = 1e-10  # features have a variance near 1; a constant one is noise of the arithmetic
_ITERATIONS = 25


@torch.no_grad()
def product_start(model: CategoricalHierarchicalVQVAE, x: Tensor) -> None:
    """Sets heads, codes and the last layer of the decoder from rows x [N, F], in place.

    Levels that all see the whole category tend to code the same directions. Here the principal components of a
    category are dealt out among its levels, as optimised product quantization does (Ge et al. 2013): a component gets
    the bits that its variance deserves, a level as many of them as its codes can hold. Least squares makes the heads
    give these components (with one constant, so that LayerNorm loses no length), k-means the codes, and ridge
    regression the last layer of the shared decoder. Draws from the default generators.

    Args:
        model: as constructed; changed.
        x: training rows, finite, on the model's device.
    """
    was_training = model.training
    model.eval()
    try:
        _fit_heads(model, x)
        model.quantizer.initialize(model.encode(x), _ITERATIONS)
        _fit_decoder(model, x)
    finally:
        model.train(was_training)


def _fit_heads(model: CategoricalHierarchicalVQVAE, x: Tensor) -> None:
    copies = max(2, min(_COPIES, _FITTED_ROWS // x.shape[0]))
    rows = torch.cat([x, *(x + _NOISE * torch.randn_like(x) for _ in range(copies - 1))])
    embeddings = model.category_mlp(rows[:, model.feature_order])  # [C, N, E]
    weight, bias = model.heads[0].weight, model.heads[0].bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    shares = _shares_of_others(x, model.feature_order)  # [sum n, features in no category]
    first = encoded = 0
    for embedding, (name, members) in zip(embeddings, model.config.group_indices.items(), strict=True):
        share = shares[encoded : encoded + len(members)]
        encoded += len(members)
        known, noisy = (values[:, members].double() for values in (x, rows))
        targets = _targets(
            torch.cat([known, known @ share], 1), torch.cat([noisy, noisy @ share], 1), model.levels[name]
        )
        solved, constant = least_squares(embedding.double(), targets, _HEAD_PENALTY)
        last = first + targets.shape[1]
        weight[first:last] = solved.T.to(weight.dtype)
        bias[first:last] = constant.to(bias.dtype)
        first = last


def _shares_of_others(x: Tensor, encoded: Tensor) -> Tensor:
    """[len(encoded), others] weights that predict the features in no category from those that are encoded.

    The part that a category adds to the prediction is worth coding as much as a feature of its own.
    """
    others = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    others[encoded] = False
    return least_squares(x[:, encoded].double(), x[:, others].double(), _SHARE_PENALTY)[0]


def _fit_decoder(model: CategoricalHierarchicalVQVAE, x: Tensor) -> None:
    last = decoder_output(model)
    solved, constant = least_squares(decoder_inputs(model, x).double(), x.double(), _DECODER_PENALTY)
    last.weight.copy_(solved.T)
    last.bias.copy_(constant)


def _targets(x: Tensor, rows: Tensor, levels: list[LevelConfig]) -> Tensor:
    """What the heads of a category should give for rows [M, n]: [M, sum D]; x [N, n] decides on the components."""
    centre = x.mean(0)
    centred = x - centre
    variance, directions = torch.linalg.eigh(centred.T @ centred / x.shape[0])
    bits = component_bits(variance, sum(torch.tensor(float(level.num_tokens)).log2().item() for level in levels))
    blocks = []
    for level, chosen in zip(levels, deal(bits.tolist(), levels), strict=True):
        D = level.latent_dim
        spread = variance[chosen].sum().sqrt() if chosen else variance.new_ones(())
        parts = (rows - centre) @ directions[:, chosen] / spread.clamp(min=torch.finfo(spread.dtype).tiny)
        parts = torch.cat([parts, parts.new_ones(len(parts), 1)], 1)[:, : max(D - 1, 1)]
        blocks.append(parts @ _frame(D, parts.shape[1], x) * D**0.5)
    return torch.cat(blocks, 1)


def _frame(D: int, vectors: int, like: Tensor) -> Tensor:
    """[vectors, D] random orthonormal rows of mean 0, which LayerNorm leaves as they are; of one dimension any."""
    drawn = torch.randn(D, vectors, dtype=like.dtype, device=like.device)
    orthonormal: Tensor = torch.linalg.qr(drawn - drawn.mean(0) if D > 1 else drawn)[0]
    return orthonormal.T


def component_bits(variance: Tensor, total: float) -> Tensor:
    """[n] bits of each component so that their sum is `total` and the error least: 1/2 log2(variance / level) >= 0.

    Reverse water-filling (Cover and Thomas, Elements of Information Theory, 10.3.3).
    """
    exponent = variance.clamp(min=_LEAST_VARIANCE).log2()
    ordered = exponent.sort(descending=True).values
    count = torch.arange(1, len(ordered) + 1, dtype=ordered.dtype, device=ordered.device)
    levels = (ordered.cumsum(0) - 2.0 * total) / count  # log2 of the level if the first so many get bits
    used = int((ordered > levels).sum())
    bits = (0.5 * (exponent - levels[used - 1])).clamp(min=0.0)
    return bits.where(variance > _LEAST_VARIANCE, 0.0)


def deal(bits: list[float], levels: list[LevelConfig]) -> list[list[int]]:
    """Components of each level: the largest first, each to the level with the most bits left and room for it.

    A level has room for two components fewer than its dimensions (LayerNorm takes one, the constant one), at least 1.
    """
    left = [torch.tensor(float(level.num_tokens)).log2().item() for level in levels]
    dealt: list[list[int]] = [[] for _ in levels]
    for component in sorted(range(len(bits)), key=lambda i: -bits[i]):
        open_levels = [i for i, level in enumerate(levels) if len(dealt[i]) < max(level.latent_dim - 2, 1)]
        if bits[component] <= _LEAST_BITS or not open_levels:
            break
        taker = max(open_levels, key=lambda i: left[i])
        dealt[taker].append(component)
        left[taker] -= bits[component]
    return dealt
