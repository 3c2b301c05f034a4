"""Initialisation of the codebooks, and of the networks by product quantization, from training rows."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.config.schema import LevelConfig
from spinlock_fast.data.host_rows import Rows
from spinlock_fast.kernels._common.single_thread import single_thread
from spinlock_fast.models.decoder_refit import decoder_output_layer, least_squares
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

_INIT_ROWS = 4096  # rows that codebooks are fitted to
# The heads are fitted to noisy copies of the rows; their targets are linear, so any row is valid.
_NOISE = 0.3
_COPIES = 8
_FITTED_ROWS = 8192  # bounds the memory of the copies
_HEAD_PENALTY = 1e-4
_UNENCODED_PENALTY = 1e-2
_DECODER_PENALTY = 1e-2
_CONSTANT = 3.0  # constant component of embeddings of length 1; keeps their LayerNorm close to linear
_RELATIVE_EPS = 1e-6
_MIN_BITS = 0.02  # components worth less are dropped
_MIN_VARIANCE = 1e-10  # features have a variance near 1; below this it is rounding error
_KMEANS_ITERATIONS = 25


def initialize_codebooks(model: CategoricalHierarchicalVQVAE, x: Rows) -> None:
    """Initialises the codebooks from random rows of x [N, F], as the model's `codebook_init` says.

    "kmeans" does nothing if no row has finite latents; "product" sets the networks as well. Draws from the default
    generators.
    """
    method = model.config.codebook_init
    if method == "uniform":
        return
    rows = torch.randperm(x.shape[0])[:_INIT_ROWS].to(x.device)
    if method == "product":
        product_quantization_init(model, x[rows])
        return
    model.eval()
    with torch.no_grad():
        latents = model.encode(x[rows])
    if bool(torch.isfinite(latents).all(1).any()):
        model.quantizer.initialize(latents)
    model.train()


@torch.no_grad()
def product_quantization_init(model: CategoricalHierarchicalVQVAE, x: Tensor) -> None:
    """Sets encoder, heads, codes and decoder from rows x [N, F], in place.

    Levels that all see the whole category tend to code the same directions. Here the principal components of a
    category are allocated to its levels, as in optimized product quantization (Ge et al. 2013): each component gets
    bits by its variance, each level as many components as its codes can hold. The heads are fitted to these components
    by least squares (plus a constant, so that LayerNorm keeps lengths), the codes by k-means, and the shared decoder
    by ridge regression. The MLPs of encoder and decoder are made linear with pairs of hidden units relu(u), relu(-u);
    random layers would lose more than quantization does. Draws from the default generators.

    Args:
        model: a newly constructed model, changed in place.
        x: [N, F] training rows, finite, on the model's device.
    """
    was_training = model.training
    model.eval()
    try:
        with single_thread(x.device):
            _init_encoder(model, x)
            _init_heads(model, x)
        model.quantizer.initialize(model.encode(x), _KMEANS_ITERATIONS)
        with single_thread(x.device):
            _init_decoder(model, x)
    finally:
        model.train(was_training)


def _init_encoder(model: CategoricalHierarchicalVQVAE, x: Tensor) -> None:
    """Makes embeddings the inputs of each category (or their leading principal components) plus a constant."""
    layers = model.encoder_layers
    weight, bias, out_weight, out_bias = (
        p for layer in (layers.first, layers.second) for p in (layer.weight, layer.bias)
    )
    H, E = out_weight.shape[1:]
    inputs = model.encoder_inputs(x).double()
    start = 0
    for c, members in enumerate(model.config.inputs.values()):
        rows = slice(start, start + len(members))
        start += len(members)
        count = min(len(members), H // 2, E - 2)
        if count < 1:
            continue
        mean = inputs[:, rows].mean(0)
        variance, directions = _principal_components(inputs[:, rows] - mean)
        directions = directions[:, :count]
        scale = variance[:count].sum().sqrt().clamp(min=_RELATIVE_EPS).reciprocal()
        basis = _random_orthonormal_rows(E, count + 1, inputs)
        _set_linear_pair(
            weight[rows].T, bias[c], out_weight[c].T, directions.T, -mean @ directions, basis[:-1].T * scale
        )
        out_bias[c] = (_CONSTANT * basis[-1]).to(out_bias.dtype)


def _set_linear_pair(
    weight: Tensor, bias: Tensor, out_weight: Tensor, first: Tensor, intercept: Tensor, second: Tensor
) -> None:
    """Makes two layers with a ReLU between them compute second @ (first @ x + intercept).

    Uses 2k hidden units; the others keep their input weights, with output weights of zero.

    Args:
        weight: [hidden, in] view, changed in place.
        bias: [hidden] view, changed in place.
        out_weight: [out, hidden] view, changed in place.
        first: [k, in].
        intercept: [k].
        second: [out, k].
    """
    k = len(first)
    weight[: 2 * k] = torch.cat([first, -first]).to(weight.dtype)
    bias[: 2 * k] = torch.cat([intercept, -intercept]).to(bias.dtype)
    out_weight.zero_()
    out_weight[:, : 2 * k] = torch.cat([second, -second], 1).to(out_weight.dtype)


def _principal_components(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Variances [n], descending, and directions [n, n] in columns, of centred rows [N, n]."""
    variance, directions = torch.linalg.eigh(centred.T @ centred / centred.shape[0])
    return variance.flip(0), directions.flip(1)


def _init_heads(model: CategoricalHierarchicalVQVAE, x: Tensor) -> None:
    copies = max(2, min(_COPIES, _FITTED_ROWS // x.shape[0]))
    noise = _NOISE * x.std(0, correction=0)
    rows = torch.cat([x, *(x + noise * torch.randn_like(x) for _ in range(copies - 1))])
    embeddings = model.category_mlp(model.encoder_inputs(rows))  # [C, N, E]
    weight, bias = model.heads[0].weight, model.heads[0].bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    predictors = _predictors_of_unencoded(x, model.feature_order)  # [sum n, unencoded features]
    first = encoded = 0
    for embedding, (name, members) in zip(embeddings, model.config.inputs.items(), strict=True):
        predictor = predictors[encoded : encoded + len(members)]
        encoded += len(members)
        clean, noisy = (values[:, members].double() for values in (x, rows))
        targets = _head_targets(
            torch.cat([clean, clean @ predictor], 1), torch.cat([noisy, noisy @ predictor], 1), model.levels[name]
        )
        weights, intercept = least_squares(embedding.double(), targets, _HEAD_PENALTY)
        last = first + targets.shape[1]
        weight[first:last] = weights.T.to(weight.dtype)
        bias[first:last] = intercept.to(bias.dtype)
        first = last


def _predictors_of_unencoded(x: Tensor, encoded: Tensor) -> Tensor:
    """[len(encoded), unencoded] ridge weights that predict the features that no encoder reads.

    A category's contribution to these predictions is coded like its own features.
    """
    unencoded = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    unencoded[encoded] = False
    return least_squares(x[:, encoded].double(), x[:, unencoded].double(), _UNENCODED_PENALTY)[0]


def _init_decoder(model: CategoricalHierarchicalVQVAE, x: Tensor) -> None:
    """Ridge regression of x on the codes, reduced to the leading directions that the hidden units can represent."""
    first, output = model.shared_decoder[0], decoder_output_layer(model)
    assert isinstance(first, torch.nn.Linear)
    codes = model.quantize(model.encode(x))[0].double()
    weights, intercept = least_squares(codes, x.double(), _DECODER_PENALTY)
    mean = codes.mean(0)
    fitted = (codes - mean) @ weights
    variance, directions = _principal_components(fitted)
    count = min(first.out_features // 2, int((variance > _RELATIVE_EPS * variance[0]).sum()))
    directions, std = directions[:, :count], variance[:count].sqrt()
    inner = weights @ directions / std
    _set_linear_pair(first.weight, first.bias, output.weight, inner.T, -mean @ inner, directions * std)
    output.bias.copy_(intercept + mean @ weights)


def _head_targets(x: Tensor, rows: Tensor, levels: list[LevelConfig]) -> Tensor:
    """Target latents [M, sum D] of a category's heads for rows [M, n]; components are those of x [N, n]."""
    mean = x.mean(0)
    centred = x - mean
    variance, directions = torch.linalg.eigh(centred.T @ centred / x.shape[0])
    bits = component_bits(variance, sum(_bits(level) for level in levels))
    blocks = []
    for level, chosen in zip(levels, allocate_components(bits.tolist(), levels), strict=True):
        D = level.latent_dim
        std = variance[chosen].sum().sqrt() if chosen else variance.new_ones(())
        scores = (rows - mean) @ directions[:, chosen] / std.clamp(min=torch.finfo(std.dtype).tiny)
        # LayerNorm maps the line of a component to an arc; a larger constant keeps it closer to a line, which a
        # component with more bits needs.
        max_bits = max((float(bits[i]) for i in chosen), default=0.0)
        constant = scores.new_full((len(scores), 1), max(1.0, 2.0 ** (max_bits / 2.0 - 1.0)))
        scores = torch.cat([scores, constant], 1)[:, : max(D - 1, 1)]
        blocks.append(scores @ _random_orthonormal_rows(D, scores.shape[1], x) * D**0.5)
    return torch.cat(blocks, 1)


def _bits(level: LevelConfig) -> float:
    return torch.tensor(float(level.num_tokens)).log2().item()


def _random_orthonormal_rows(D: int, count: int, like: Tensor) -> Tensor:
    """[count, D] random orthonormal rows of mean 0, which LayerNorm does not change; for D = 1 the mean is not 0."""
    drawn = torch.randn(D, count, dtype=like.dtype, device=like.device)
    orthonormal: Tensor = torch.linalg.qr(drawn - drawn.mean(0) if D > 1 else drawn)[0]
    return orthonormal.T


def component_bits(variance: Tensor, total: float) -> Tensor:
    """[n] bits per component that minimise the error for a sum of `total`: max(0, 1/2 log2(variance / level)).

    Reverse water-filling (Cover and Thomas, Elements of Information Theory, 10.3.3).
    """
    exponent = variance.clamp(min=_MIN_VARIANCE).log2()
    ordered = exponent.sort(descending=True).values
    count = torch.arange(1, len(ordered) + 1, dtype=ordered.dtype, device=ordered.device)
    levels = (ordered.cumsum(0) - 2.0 * total) / count  # log2 of the water level if the leading `count` get bits
    used = int((ordered > levels).sum())
    bits = (0.5 * (exponent - levels[used - 1])).clamp(min=0.0)
    return bits.where(variance > _MIN_VARIANCE, 0.0)


def allocate_components(bits: list[float], levels: list[LevelConfig]) -> list[list[int]]:
    """Components of each level: in descending order of bits, each to the level with the most unused bits and room.

    A level has room for two components fewer than its dimensions (LayerNorm removes one, the constant takes one), and
    for at least one.
    """
    unused = [_bits(level) for level in levels]
    allocated: list[list[int]] = [[] for _ in levels]
    for component in sorted(range(len(bits)), key=lambda i: -bits[i]):
        open_levels = [i for i, level in enumerate(levels) if len(allocated[i]) < max(level.latent_dim - 2, 1)]
        if bits[component] <= _MIN_BITS or not open_levels:
            break
        level = max(open_levels, key=lambda i: unused[i])
        allocated[level].append(component)
        unused[level] -= bits[component]
    return allocated
