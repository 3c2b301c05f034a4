"""A start from product quantization: networks that are linear, and levels that each code a part of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.config.schema import LevelConfig
from spinlock_fast.kernels._common.single_thread import single_thread
from spinlock_fast.models.decoder_refit import decoder_output, least_squares
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

# The heads are fitted on rows with noise around them: their targets are linear, so any row can serve.
_NOISE = 0.3
_COPIES = 8
_FITTED_ROWS = 8192  # about as many; more would take memory and change nothing
_HEAD_PENALTY = 1e-4
_SHARE_PENALTY = 1e-2
_DECODER_PENALTY = 1e-2
_CONSTANT = 3.0  # beside embeddings of length 1: LayerNorm then changes them little
_ROUNDING = 1e-6
_LEAST_BITS = 0.02  # a component that is worth less is left out
_LEAST_VARIANCE = 1e-10  # features have a variance near 1; a constant one is noise of the arithmetic
_ITERATIONS = 25


@torch.no_grad()
def product_start(model: CategoricalHierarchicalVQVAE, x: Tensor) -> None:
    """Sets encoder, heads, codes and decoder from rows x [N, F], in place.

    Levels that all see the whole category tend to code the same directions. Here the principal components of a
    category are dealt out among its levels, as optimised product quantization does (Ge et al. 2013): a component gets
    the bits that its variance deserves, a level as many of them as its codes can hold. Least squares makes the heads
    give these components (with one constant, so that LayerNorm loses no length), k-means the codes, and ridge
    regression the shared decoder. Pairs of hidden units, relu(u) and relu(-u), make the MLPs of encoder and decoder
    linear: features pass through random layers with an error that is above that of the codes.
    Draws from the default generators.

    Args:
        model: as constructed; changed.
        x: training rows, finite, on the model's device.
    """
    was_training = model.training
    model.eval()
    try:
        with single_thread(x.device):
            _fit_encoder(model, x)
            _fit_heads(model, x)
        model.quantizer.initialize(model.encode(x), _ITERATIONS)
        with single_thread(x.device):
            _fit_decoder(model, x)
    finally:
        model.train(was_training)


def _fit_encoder(model: CategoricalHierarchicalVQVAE, x: Tensor) -> None:
    """Embeddings are the inputs of a category (their principal components, where they are too many) and a constant."""
    layers = model.encoder_layers
    weight, bias, out_weight, out_bias = (
        p for layer in (layers.first, layers.second) for p in (layer.weight, layer.bias)
    )
    H, E = out_weight.shape[1:]
    inputs = model.encoder_inputs(x).double()
    first = 0
    for c, members in enumerate(model.config.inputs.values()):
        rows = slice(first, first + len(members))
        first += len(members)
        count = min(len(members), H // 2, E - 2)
        if count < 1:
            continue
        centre = inputs[:, rows].mean(0)
        variance, directions = _principal(inputs[:, rows] - centre)
        directions = directions[:, :count]
        scale = variance[:count].sum().sqrt().clamp(min=_ROUNDING).reciprocal()
        frame = _frame(E, count + 1, inputs)
        _put_linear(weight[rows].T, bias[c], out_weight[c].T, directions.T, -centre @ directions, frame[:-1].T * scale)
        out_bias[c] = (_CONSTANT * frame[-1]).to(out_bias.dtype)


def _put_linear(
    weight: Tensor, bias: Tensor, out_weight: Tensor, first: Tensor, constant: Tensor, second: Tensor
) -> None:
    """Makes second @ (first @ x + constant) of two layers with ReLU: first [k, in], second [out, k], 2k hidden units.

    The weights [hidden, in] and [out, hidden] are views that are changed; other units keep what they read and
    give nothing yet.
    """
    k = len(first)
    weight[: 2 * k] = torch.cat([first, -first]).to(weight.dtype)
    bias[: 2 * k] = torch.cat([constant, -constant]).to(bias.dtype)
    out_weight.zero_()
    out_weight[:, : 2 * k] = torch.cat([second, -second], 1).to(out_weight.dtype)


def _principal(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Variances [n], descending, and directions [n, n] of centred rows [N, n]."""
    variance, directions = torch.linalg.eigh(centred.T @ centred / centred.shape[0])
    return variance.flip(0), directions.flip(1)


def _fit_heads(model: CategoricalHierarchicalVQVAE, x: Tensor) -> None:
    copies = max(2, min(_COPIES, _FITTED_ROWS // x.shape[0]))
    noise = _NOISE * x.std(0, correction=0)
    rows = torch.cat([x, *(x + noise * torch.randn_like(x) for _ in range(copies - 1))])
    embeddings = model.category_mlp(model.encoder_inputs(rows))  # [C, N, E]
    weight, bias = model.heads[0].weight, model.heads[0].bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    shares = _shares_of_others(x, model.feature_order)  # [sum n, features that no encoder reads]
    first = encoded = 0
    for embedding, (name, members) in zip(embeddings, model.config.inputs.items(), strict=True):
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
    """[len(encoded), others] weights that predict the features that no encoder reads from the others.

    The part that a category adds to the prediction is worth coding as much as a feature of its own.
    """
    others = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    others[encoded] = False
    return least_squares(x[:, encoded].double(), x[:, others].double(), _SHARE_PENALTY)[0]


def _fit_decoder(model: CategoricalHierarchicalVQVAE, x: Tensor) -> None:
    """Ridge regression from the codes, as the pairs of hidden units allow: its leading directions."""
    first, last = model.shared_decoder[0], decoder_output(model)
    assert isinstance(first, torch.nn.Linear)
    codes = model.quantize(model.encode(x))[0].double()
    solved, constant = least_squares(codes, x.double(), _DECODER_PENALTY)
    centre = codes.mean(0)
    fitted = (codes - centre) @ solved
    variance, directions = _principal(fitted)
    count = min(first.out_features // 2, int((variance > _ROUNDING * variance[0]).sum()))
    directions, spread = directions[:, :count], variance[:count].sqrt()
    inner = solved @ directions / spread
    _put_linear(first.weight, first.bias, last.weight, inner.T, -centre @ inner, directions * spread)
    last.bias.copy_(constant + centre @ solved)


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
        # LayerNorm bends the line of a component to an arc: the more bits it has, the less it may.
        most = max((float(bits[i]) for i in chosen), default=0.0)
        constant = parts.new_full((len(parts), 1), max(1.0, 2.0 ** (most / 2.0 - 1.0)))
        parts = torch.cat([parts, constant], 1)[:, : max(D - 1, 1)]
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
