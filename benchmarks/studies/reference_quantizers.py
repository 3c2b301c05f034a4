"""Quantizers to compare a model with at equal bits: those of faiss, finite scalars, and a neural residual quantizer.

Each `fit(x, bits, option, training)` is fitted to rows x [N, F] and returns a function that encodes and decodes rows.
`option` is chosen by the error of validation rows, see `rate_distortion.py`. faiss is in the extra `study`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray[Any, np.dtype[Any]]
Coder = Callable[[Array], Array]  # rows [B, F] -> reconstructed rows [B, F]

_HIDDEN = 512  # of the autoencoder around finite scalars
_STEP_HIDDEN = 64  # of a step of the neural residual quantizer
_BEAM = 16  # of the neural residual quantizer


class Training(NamedTuple):
    """Effort of a fit: epochs and rows per step of the neural quantizers, beam of residual quantization's training."""

    epochs: int = 100
    batch_size: int = 128
    beam: int = 32
    seed: int = 0


def code_sizes(bits: int, code_bits: int) -> list[int]:
    """Bits of each codebook: `code_bits`, and the remainder for the last one."""
    remainder = bits % code_bits
    return [code_bits] * (bits // code_bits) + ([remainder] if remainder else [])


def product(x: Array, bits: int, code_bits: int, training: Training) -> Coder:
    """Product quantization of groups of neighbouring columns (Jegou et al. 2011)."""
    return _product(x, bits // code_bits, code_bits, rotate=False)


def rotated_product(x: Array, bits: int, code_bits: int, training: Training) -> Coder:
    """Optimised product quantization: product quantization after a learned rotation (Ge et al. 2013)."""
    return _product(x, bits // code_bits, code_bits, rotate=True)


def _product(x: Array, parts: int, code_bits: int, rotate: bool) -> Coder:
    import faiss

    F = x.shape[1]
    width = -(-F // parts) * parts  # columns of zeros fill the last group
    quantizer = faiss.ProductQuantizer(width, parts, code_bits)
    quantizer.cp.min_points_per_centroid = 1  # no warning per codebook
    rotation = faiss.OPQMatrix(width, parts, width)
    rotation.pq = quantizer  # else the rotation is optimised for 256 codes

    def rotated(rows: Array) -> Array:
        padded = np.pad(rows, ((0, 0), (0, width - F)))
        return np.asarray(rotation.apply(padded)) if rotate else padded

    if rotate:
        rotation.train(np.pad(x, ((0, 0), (0, width - F))))
    quantizer.train(rotated(x))

    def code(rows: Array) -> Array:
        decoded = quantizer.decode(quantizer.compute_codes(rotated(rows)))
        return np.asarray(rotation.reverse_transform(decoded) if rotate else decoded)[:, :F]

    return code


def residual(x: Array, bits: int, code_bits: int, training: Training) -> Coder:
    """Residual quantization of whole rows, encoded with a beam of 32 (Chen et al. 2010; Liu et al. 2015)."""
    return _coder(_residual(x, bits, code_bits, training.beam))


def _residual(x: Array, bits: int, code_bits: int, train_beam: int) -> Any:
    import faiss

    sizes = faiss.UInt64Vector()
    for size in code_sizes(bits, code_bits):
        sizes.push_back(size)
    quantizer = faiss.ResidualQuantizer(x.shape[1], sizes)
    quantizer.cp.min_points_per_centroid = 1
    quantizer.max_beam_size = train_beam
    quantizer.train(x)
    quantizer.max_beam_size = 32
    return quantizer


def local_search(x: Array, bits: int, code_bits: int, training: Training) -> Coder:
    """Additive quantization with iterated local search, LSQ++ (Martinez et al. 2018)."""
    import faiss

    quantizer = faiss.LocalSearchQuantizer(x.shape[1], bits // code_bits, code_bits)
    quantizer.random_seed = training.seed
    quantizer.train(x)
    return _coder(quantizer)


def _coder(quantizer: Any) -> Coder:
    return lambda rows: np.asarray(quantizer.decode(quantizer.compute_codes(rows)))


def _fit(model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor, training: Training, rate: float) -> None:
    """Trains with Adam and a cosine schedule, 5 % of it warm-up."""
    batch = min(training.batch_size, len(x))
    steps = training.epochs * -(-len(x) // batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    random = torch.Generator().manual_seed(training.seed)
    for _ in range(training.epochs):
        for rows in torch.randperm(len(x), generator=random).split(batch):
            optimizer.zero_grad()
            loss(x[rows]).backward()
            optimizer.step()
            schedule.step()


class FiniteScalars(nn.Module):
    """Autoencoder whose latents are rounded to one of a few levels each (Mentzer et al. 2023).

    Encoder and decoder are a linear layer plus an MLP of one hidden layer. The linear layers start as a projection on
    principal components, the MLPs at zero.
    """

    def __init__(self, x: Tensor, levels: list[int]) -> None:
        super().__init__()
        F, d = x.shape[1], len(levels)
        self.encoder, self.decoder = nn.Linear(F, d), nn.Linear(d, F)
        self.encoder_mlp = nn.Sequential(nn.Linear(F, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, d))
        self.decoder_mlp = nn.Sequential(nn.Linear(d, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, F))
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32))
        variance, directions = torch.linalg.eigh(torch.cov(x.T))
        scale = variance[-d:].flip(0).clamp(min=1e-8).sqrt()
        basis = directions[:, -d:].flip(1)
        with torch.no_grad():
            self.encoder.weight.copy_((basis * (1.5 / scale)).T)
            self.decoder.weight.copy_(basis * 1.5 * scale)
            for layer in (self.encoder_mlp[2], self.decoder_mlp[2]):
                layer.weight.zero_()
            for bias in (self.encoder.bias, self.decoder.bias, self.encoder_mlp[2].bias, self.decoder_mlp[2].bias):
                bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        steps = self.levels - 1.0
        scaled = torch.sigmoid(self.encoder(x) + self.encoder_mlp(x)) * steps
        rounded = scaled + (scaled.round() - scaled).detach()
        z = 2.0 * rounded / steps - 1.0
        return self.decoder(z) + self.decoder_mlp(z)


def scalar_levels(bits: int, width: int, most: int) -> list[int]:
    """At most `width` numbers of levels, the largest first, of `bits` bits at most: `most`, and what is left."""
    count = min(int(bits / math.log2(most)), width)
    left = int(2 ** (bits - count * math.log2(most)))
    return [most] * count + ([left] if left >= 2 and count < width else [])


def finite_scalars(x: Array, bits: int, levels: int, training: Training) -> Coder:
    """Finite scalar quantization in a trained autoencoder."""
    torch.manual_seed(training.seed)
    rows = torch.from_numpy(x)
    model = FiniteScalars(rows, scalar_levels(bits, x.shape[1], levels))
    _fit(model, lambda batch: nn.functional.mse_loss(model(batch), batch), rows, training, 2e-3)
    return _no_grad(model)


class NeuralResidual(nn.Module):
    """Residual quantizer whose codes depend on what is decoded so far, after QINCo (Huijben et al. 2024).

    Code k of step m is c_mk + W relu(U c_mk + V xhat + b), with the reconstruction xhat of the steps before. Starts as
    the residual quantizer of faiss (W = 0). Smaller than in the paper: one hidden layer of 64 units per step.
    """

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        M, _, F = codes.shape
        self.codes = nn.Parameter(codes.clone())
        self.from_code = nn.Parameter(torch.randn(M, F, _STEP_HIDDEN) / F**0.5)
        self.from_decoded = nn.Parameter(torch.randn(M, F, _STEP_HIDDEN) / F**0.5)
        self.bias = nn.Parameter(torch.zeros(M, 1, _STEP_HIDDEN))
        self.out = nn.Parameter(torch.zeros(M, _STEP_HIDDEN, F))

    def _codes(self, m: int, chosen: Tensor, decoded: Tensor) -> Tensor:
        """Codes [B, F] of step m for code numbers [B] and reconstructions [B, F]."""
        table = (self.codes[m] @ self.from_code[m])[chosen]
        hidden = torch.relu(table + decoded @ self.from_decoded[m] + self.bias[m])
        return self.codes[m][chosen] + hidden @ self.out[m]

    @torch.no_grad()
    def _candidates(self, m: int, decoded: Tensor) -> Tensor:
        """All codes [B, K, F] of step m after reconstructions [B, F]."""
        table = self.codes[m] @ self.from_code[m]
        hidden = torch.relu(table + (decoded @ self.from_decoded[m] + self.bias[m])[:, None])
        return self.codes[m] + hidden @ self.out[m]

    def loss(self, x: Tensor) -> Tensor:
        """Mean over steps of the squared error after the step; codes are chosen greedily."""
        decoded, total = torch.zeros_like(x), x.new_zeros(())
        for m in range(len(self.codes)):
            target = (x - decoded).detach()
            chosen = (self._candidates(m, decoded.detach()) - target[:, None]).square().sum(2).argmin(1)
            decoded = decoded + self._codes(m, chosen, decoded)
            total = total + (decoded - x).square().mean()
        return total / len(self.codes)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction [B, F] by beam search."""
        beams = torch.zeros_like(x)[:, None]  # [B, W, F]
        for m in range(len(self.codes)):
            B, W, F = beams.shape
            nodes = (beams[:, :, None] + self._candidates(m, beams.flatten(0, 1)).view(B, W, -1, F)).flatten(1, 2)
            errors = (nodes - x[:, None]).square().sum(2)
            best = errors.topk(min(_BEAM, errors.shape[1]), largest=False, sorted=True).indices
            beams = nodes.gather(1, best[:, :, None].expand(-1, -1, F))
        return beams[:, 0]


def neural_residual(x: Array, bits: int, code_bits: int, training: Training) -> Coder:
    """A small neural residual quantizer, see `NeuralResidual`."""
    torch.manual_seed(training.seed)
    steps = bits // code_bits
    start = _residual(x, steps * code_bits, code_bits, 5)
    import faiss

    codes = faiss.vector_to_array(start.codebooks).reshape(steps, 2**code_bits, x.shape[1])
    model = NeuralResidual(torch.from_numpy(codes))
    _fit(model, model.loss, torch.from_numpy(x), training, 1e-3)
    return _no_grad(model)


def _no_grad(model: nn.Module) -> Coder:
    model.eval()

    def code(rows: Array) -> Array:
        with torch.no_grad():
            return np.concatenate([model(block).numpy() for block in torch.from_numpy(rows).split(256)])

    return code


class Reference(NamedTuple):
    """A kind of quantizer: how it is fitted, its options, and the largest number of bits that it is fitted for."""

    fit: Callable[[Array, int, int, Training], Coder]
    options: tuple[int, ...]
    most_bits: int = 320


REFERENCES = {
    "product": Reference(product, (4, 5, 8)),
    "rotated_product": Reference(rotated_product, (4, 5, 8)),
    "residual": Reference(residual, (4, 5, 6, 8)),
    "local_search": Reference(local_search, (4, 8), 120),
    "finite_scalars": Reference(finite_scalars, (3, 4, 8, 16)),
    "neural_residual": Reference(neural_residual, (4,), 160),
}
