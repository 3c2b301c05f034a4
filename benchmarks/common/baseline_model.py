"""The model and its training step in plain PyTorch: the baseline of `train_step.py` and `equal_quality.py`.

The same mathematics as `spinlock_fast`, in the structure of the original project: a module per category, codebook and
decoder, called in Python loops; one-hot matrices for look-up and moving averages; partial decoders on every sample;
`cdist` for distances. Nothing is slowed down on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spinlock_fast import CategoricalHierarchicalVQVAE


class CategoryMLP(nn.Module):
    """[B, n] -> [B, embedding]."""

    def __init__(self, features: int, hidden: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(features, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, embedding),
            nn.LayerNorm(embedding),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Codebook(nn.Module):
    """Vector quantizer with moving averages (van den Oord et al. 2017, appendix A.1); unused codes do not change."""

    embedding: Tensor
    cluster_size: Tensor
    embedding_sum: Tensor

    def __init__(self, num_codes: int, dim: int, decay: float, commitment_cost: float) -> None:
        super().__init__()
        self.num_codes, self.decay, self.commitment_cost = num_codes, decay, commitment_cost
        self.register_buffer("embedding", torch.randn(num_codes, dim))
        self.register_buffer("cluster_size", torch.ones(num_codes))
        self.register_buffer("embedding_sum", self.embedding.clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        distances = z.square().sum(1, keepdim=True) + self.embedding.square().sum(1) - 2.0 * z @ self.embedding.t()
        codes = distances.argmin(1)
        encodings = torch.zeros(z.shape[0], self.num_codes, device=z.device, dtype=z.dtype)
        encodings.scatter_(1, codes[:, None], 1.0)
        quantized = encodings @ self.embedding
        if self.training:
            with torch.no_grad():
                self._update(encodings, z)
        loss = self.commitment_cost * nn.functional.mse_loss(z, quantized.detach())
        return z + (quantized - z).detach(), loss

    def _update(self, encodings: Tensor, z: Tensor) -> None:
        self.cluster_size.mul_(self.decay).add_(encodings.sum(0), alpha=1.0 - self.decay)
        self.embedding_sum.mul_(self.decay).add_(encodings.t() @ z, alpha=1.0 - self.decay)
        used = self.cluster_size > 1e-5 * self.cluster_size.mean()
        means = self.embedding_sum / torch.where(used, self.cluster_size, 1.0)[:, None]
        self.embedding.copy_(torch.where(used[:, None], means, self.embedding))


class BaselineModel(nn.Module):
    """Features [B, F] -> reconstruction, latents and quantized latents per codebook, commitment loss."""

    def __init__(self, like: CategoricalHierarchicalVQVAE) -> None:
        super().__init__()
        config, levels = like.config, like.levels
        p, F = config.dropout, config.input_dim
        self.members = list(config.group_indices.values())
        self.mlps = nn.ModuleList(
            CategoryMLP(len(members), config.group_hidden_dim, config.group_embedding_dim, p)
            for members in self.members
        )
        self.heads = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(
                    nn.Linear(config.group_embedding_dim, level.latent_dim),
                    nn.Dropout(p),
                    nn.LayerNorm(level.latent_dim),
                )
                for level in levels[name]
            )
            for name in like.categories
        )
        codebooks = [level for name in like.categories for level in levels[name]]
        self.codebooks = nn.ModuleList(
            Codebook(c.num_tokens, c.latent_dim, config.decay, config.commitment_cost) for c in codebooks
        )
        total = sum(c.latent_dim for c in codebooks)
        self.shared_decoder = nn.Sequential(nn.Linear(total, 256), nn.ReLU(), nn.Dropout(p), nn.Linear(256, F))
        self.partial_decoders = nn.ModuleList(
            nn.Sequential(nn.Linear(c.latent_dim, 128), nn.ReLU(), nn.Linear(128, F)) for c in codebooks
        )

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        latents = []
        for members, mlp, heads in zip(self.members, self.mlps, self.heads, strict=True):
            embedding = mlp(x[:, members])
            latents += [head(embedding) for head in heads]
        quantized, losses = zip(
            *(codebook(z) for codebook, z in zip(self.codebooks, latents, strict=True)), strict=True
        )
        reconstruction = self.shared_decoder(torch.cat(quantized, 1))
        return reconstruction, latents, list(quantized), torch.stack(losses).sum()

    def loss(self, x: Tensor, topo_samples: int) -> Tensor:
        """The total loss with the default weights."""
        reconstruction, latents, quantized, vq = self(x)
        info = torch.stack(
            [nn.functional.mse_loss(decoder(e), x) for decoder, e in zip(self.partial_decoders, quantized, strict=True)]
        ).mean()
        ortho = torch.stack([_orthogonality(codebook.embedding) for codebook in self.codebooks]).mean()
        topo = _topographic(
            x[:topo_samples], [z[:topo_samples] for z in latents], [e[:topo_samples] for e in quantized]
        )
        return nn.functional.mse_loss(reconstruction, x) + vq + 0.1 * ortho + 0.1 * info + 0.3 * topo


def _orthogonality(codes: Tensor) -> Tensor:
    unit = nn.functional.normalize(codes, dim=1)
    cosine = unit @ unit.t()
    off_diagonal = ~torch.eye(len(codes), dtype=torch.bool, device=codes.device)
    return cosine[off_diagonal].square().mean()


def _topographic(x: Tensor, latents: Sequence[Tensor], quantized: Sequence[Tensor]) -> Tensor:
    upper = torch.triu_indices(len(x), len(x), 1, device=x.device).unbind()
    d_x = torch.cdist(x, x)[upper]
    d_z = sum(torch.cdist(z, z) for z in latents)[upper] / len(latents)  # type: ignore[index]
    d_e = sum(torch.cdist(e, e) for e in quantized)[upper] / len(quantized)  # type: ignore[index]
    return 0.3 * (1.0 - _pearson(d_x, d_z)) + 0.7 * (1.0 - _pearson(d_z, d_e))


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.norm() * b.norm())


def baseline_of(model: CategoricalHierarchicalVQVAE) -> BaselineModel:
    """A baseline with the parameters and codes of `model`."""
    baseline = BaselineModel(model).to(model.feature_order.device, model.quantizer.embedding.dtype)
    baseline.load_state_dict(translate(model, {**dict(model.named_parameters()), **dict(model.named_buffers())}))
    return baseline


@torch.no_grad()
def translate(model: CategoricalHierarchicalVQVAE, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors of `model` (parameters, buffers or gradients) to those of its baseline."""
    layout = model.quantizer.layout
    out: dict[str, Tensor] = {}

    def put(name: str, key: str, pick: object = ..., transpose: bool = False) -> None:
        if key in values:
            value = values[key][pick]  # type: ignore[index]
            out[name] = (value.t() if transpose else value).clone()

    start, g = 0, 0
    for c, (name, members) in enumerate(model.config.group_indices.items()):
        rows = slice(start, start + len(members))
        start += len(members)
        put(f"mlps.{c}.net.0.weight", "category_mlp.0.weight", rows, transpose=True)
        put(f"mlps.{c}.net.0.bias", "category_mlp.0.bias", c)
        put(f"mlps.{c}.net.3.weight", "category_mlp.3.weight", c, transpose=True)
        put(f"mlps.{c}.net.3.bias", "category_mlp.3.bias", c)
        for kind in ("weight", "bias"):
            put(f"mlps.{c}.net.4.{kind}", f"category_mlp.4.{kind}", c)
        for level in range(len(model.levels[name])):
            columns = layout.column_slice(g)
            for kind in ("weight", "bias"):
                put(f"heads.{c}.{level}.0.{kind}", f"heads.0.{kind}", columns)
                put(f"heads.{c}.{level}.2.{kind}", f"heads.2.{kind}", columns)
            put(f"partial_decoders.{g}.0.weight", "partial_decoders.0.weight", columns, transpose=True)
            put(f"partial_decoders.{g}.0.bias", "partial_decoders.0.bias", g)
            put(f"partial_decoders.{g}.2.weight", "partial_decoders.2.weight", g, transpose=True)
            put(f"partial_decoders.{g}.2.bias", "partial_decoders.2.bias", g)
            for key in ("embedding", "embedding_sum"):
                put(f"codebooks.{g}.{key}", f"quantizer.{key}", layout.entry_slice(g))
                if f"codebooks.{g}.{key}" in out:
                    out[f"codebooks.{g}.{key}"] = out[f"codebooks.{g}.{key}"].view(layout.num_codes[g], layout.dims[g])
            put(f"codebooks.{g}.cluster_size", "quantizer.cluster_size", layout.code_slice(g))
            g += 1
    for layer in (0, 3):
        for kind in ("weight", "bias"):
            put(f"shared_decoder.{layer}.{kind}", f"shared_decoder.{layer}.{kind}")
    return out
