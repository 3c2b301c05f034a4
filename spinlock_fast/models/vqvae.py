"""The categorical hierarchical VQ-VAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from spinlock_fast.data.input_arrays import to_real_tensor
from spinlock_fast.errors import DataError
from spinlock_fast.kernels._common.dropout import BatchSlice
from spinlock_fast.kernels._common.guard import check_dense
from spinlock_fast.kernels._common.ragged import Ragged
from spinlock_fast.kernels._common.snapshot import snapshot
from spinlock_fast.kernels.code_decoders import Decoders
from spinlock_fast.kernels.grouped_mlp import grouped_mlp
from spinlock_fast.kernels.latent_projection import project
from spinlock_fast.models.code_search import Search, TokenSearch, joint_codes
from spinlock_fast.models.eval_mode import eval_mode
from spinlock_fast.models.layers import (
    GroupedLayerNorm,
    GroupedLinear,
    RaggedInputLinear,
    RaggedLayerNorm,
    RaggedOutputLinear,
)
from spinlock_fast.models.token_decoder import TokenDecoder
from spinlock_fast.models.vqvae_config import PARTIAL_HIDDEN, SHARED_HIDDEN
from spinlock_fast.models.vqvae_config import CategoricalVQVAEConfig as CategoricalVQVAEConfig
from spinlock_fast.quantize import GroupedVectorQuantizer, commitment_weight
from spinlock_fast.quantize.buffers import TransientBuffers


class EncoderLayers(NamedTuple):
    """The layers of the encoder and the heads, in order."""

    first: RaggedInputLinear
    hidden_dropout: nn.Dropout
    second: GroupedLinear
    norm: GroupedLayerNorm
    head: RaggedOutputLinear
    dropout: nn.Dropout
    head_norm: RaggedLayerNorm


def _dropout_rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def _outputs(
    tokens: Tensor, vq_loss: Tensor, latents: Tensor, quantized: Tensor, codebook: Tensor
) -> dict[str, Tensor]:
    """The outputs of the encoder and the quantizer, by name."""
    return {"tokens": tokens, "vq_loss": vq_loss, "latents": latents, "quantized": quantized, "codebook": codebook}


_RELATIVE_EPS = 1e-6  # rounding error of a float32 mean


class CategoricalHierarchicalVQVAE(TransientBuffers):
    """Categorical hierarchical VQ-VAE: features [B, F] to G tokens and back.

    Each category has an MLP encoder (n -> hidden -> embedding, LayerNorm); each of its codebooks a linear head with
    LayerNorm, quantized to the nearest code. A shared decoder reads the codes of all codebooks; partial decoders, one
    per codebook, enter the training loss. A model with a `token_decoder` decodes tokens by that in eval mode.

    Tokens are ordered by category, then level: cluster_1 L0, L1, L2, cluster_2 L0, ...
    """

    feature_order: Tensor
    input_mean: Tensor
    input_scale: Tensor
    error_weight: Tensor

    def __init__(self, config: CategoricalVQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.levels = config.resolved_levels()
        self.categories = list(config.group_indices)
        levels = [level for name in self.categories for level in self.levels[name]]
        num_codes = [level.num_tokens for level in levels]
        dims = [level.latent_dim for level in levels]
        inputs = config.inputs
        sizes = [len(members) for members in inputs.values()]
        category_dims = [sum(level.latent_dim for level in self.levels[name]) for name in self.categories]
        total = sum(dims)
        F, E, H = config.input_dim, config.group_embedding_dim, config.group_hidden_dim

        if config.extra_inputs:
            self.register_buffer("input_mean", torch.zeros(sum(sizes)))
            self.register_buffer("input_scale", torch.ones(sum(sizes)))
        self.register_transient_buffers()
        self.category_mlp = nn.Sequential(
            RaggedInputLinear(sizes, H),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            GroupedLinear(len(sizes), H, E),
            GroupedLayerNorm(len(sizes), E),
        )
        self.heads = nn.Sequential(
            RaggedOutputLinear(E, category_dims), nn.Dropout(config.dropout), RaggedLayerNorm(dims)
        )
        self.quantizer = GroupedVectorQuantizer(
            num_codes,
            dims,
            decay=config.decay,
            commitment_weight=commitment_weight(config.commitment_cost, levels, F),
            codebook_init="uniform" if config.codebook_init == "uniform" else "kmeans",
            use_ema=config.use_ema,
            rotation_trick=config.rotation_trick,
            centred=False,  # LayerNorm bounds the latents
        )
        self.shared_decoder = nn.Sequential(
            nn.Linear(total, SHARED_HIDDEN),
            nn.ReLU(),
            nn.Dropout(config.dropout if config.decoder_dropout is None else config.decoder_dropout),
            nn.Linear(SHARED_HIDDEN, F),
        )
        self.partial_decoders = nn.Sequential(
            RaggedInputLinear(dims, PARTIAL_HIDDEN), nn.ReLU(), GroupedLinear(len(dims), PARTIAL_HIDDEN, F)
        )
        self.token_decoder: TokenDecoder | None = None

    def transient_buffers(self) -> dict[str, Tensor]:
        order = [i for members in self.config.inputs.values() for i in members]
        values = {"feature_order": torch.tensor(order, device="cpu")}
        if self.config.extra_inputs:
            values["error_weight"] = torch.ones(self.config.input_dim, device="cpu")
        return values

    @property
    def num_codebooks(self) -> int:
        return self.quantizer.layout.groups

    @property
    def codebook_names(self) -> list[str]:
        """ "<category>/L<level>" of every token."""
        return [f"{name}/L{level}" for name in self.categories for level in range(len(self.levels[name]))]

    def category_slice(self, category: str) -> slice:
        """Positions of a category's tokens; raises KeyError listing the categories."""
        if category not in self.levels:
            raise KeyError(f"no category {category!r}; there are {', '.join(self.categories)}")
        start = sum(len(self.levels[name]) for name in self.categories[: self.categories.index(category)])
        return slice(start, start + len(self.levels[category]))

    def encode(self, x: Tensor, batch: BatchSlice | None = None) -> Tensor:
        """Features [B, F] -> latents [B, sum D]; dropout draws random numbers per row of `batch`, if given."""
        check_dense("x", x)
        if x.ndim != 2 or x.shape[1] != self.config.input_dim:
            raise ValueError(f"x must be [B, {self.config.input_dim}], got {list(x.shape)}")
        layers = self.encoder_layers
        embedding = grouped_mlp(
            self.encoder_inputs(x),
            layers.first.weight,
            layers.first.bias,
            layers.second.weight,
            layers.second.bias,
            layers.first.inputs,
            _dropout_rate(layers.hidden_dropout),
            batch=batch,
        )  # [C, B, E]
        norm, head, head_norm = layers.norm, layers.head, layers.head_norm
        return project(
            embedding,
            norm.weight,
            norm.bias,
            head.weight,
            head.bias,
            head_norm.weight,
            head_norm.bias,
            head.outputs,
            head_norm.segments,
            norm.eps,
            head_norm.eps,
            _dropout_rate(layers.dropout),
            batch=batch,
        )

    def encoder_inputs(self, x: Tensor) -> Tensor:
        """Features [B, F] -> packed encoder inputs [B, sum n], by category; extra inputs are standardised."""
        ordered = x[:, self.feature_order]
        return (ordered - self.input_mean) * self.input_scale if self.config.extra_inputs else ordered

    @torch.no_grad()
    def fit_extra_inputs(self, mean: Tensor, std: Tensor) -> None:
        """Sets the standardisation of the extra inputs from mean [F] and std [F] of the training rows.

        Also sets `error_weight` [F]: the squared error of an extra input with standard deviation s > 1 is weighted by
        1 / s in training, so that features of large scale do not dominate the loss.
        """
        extra = [i for members in self.config.extra_inputs.values() for i in members]
        if not extra:
            return
        shift, scale = torch.zeros_like(mean), torch.ones_like(std)
        shift[extra] = mean[extra]
        scale[extra] = torch.where(std > _RELATIVE_EPS * mean.abs(), std, 1.0)[extra]  # 1 for constant features
        order = self.feature_order.cpu()
        self.input_mean.copy_(shift[order])
        self.input_scale.copy_(scale[order].reciprocal())
        self.error_weight.copy_(scale.clamp(min=1.0).reciprocal())

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, sum D] -> quantized [B, sum D], tokens [B, G], commitment loss."""
        quantized, tokens, loss = self.quantizer(latents)
        return quantized, tokens, loss

    def decode(self, quantized: Tensor, batch: BatchSlice | None = None) -> Tensor:
        """Quantized latents [B, sum D] -> features [B, F]; `batch` as in `encode`."""
        first, _, dropout, second = cast(tuple[nn.Linear, nn.ReLU, nn.Dropout, nn.Linear], tuple(self.shared_decoder))
        features = grouped_mlp(
            quantized,
            first.weight.t(),
            first.bias[None],
            second.weight.t()[None],
            second.bias[None],
            Ragged.of([first.in_features]),
            _dropout_rate(dropout),
            batch=batch,
        )
        return features.squeeze(0)  # not [0], whose gradient copies into a zero tensor

    def add_token_decoder(self) -> TokenDecoder:
        """Adds a decoder of tokens with the reconstructions of the shared decoder, or sets it back to these."""
        if self.token_decoder is None:
            decoder = TokenDecoder(self.quantizer.layout, SHARED_HIDDEN, self.config.input_dim)
            self.token_decoder = decoder.to(self.encoder_layers.first.weight)
        self.token_decoder.copy_from(self.quantizer.embedding, self.shared_decoder)
        return self.token_decoder

    def reconstruct(self, quantized: Tensor, tokens: Tensor) -> Tensor:
        """Quantized latents [B, sum D] and their tokens [B, G] -> features [B, F].

        In eval mode by the token decoder, if there is one; then without a gradient to the latents.
        """
        if self.token_decoder is None or self.training:
            return self.decode(quantized)
        return cast(Tensor, self.token_decoder(tokens))

    @property
    def code_decoders(self) -> Decoders:
        """Parameters of the partial decoders."""
        first, _, second = cast(tuple[RaggedInputLinear, nn.ReLU, GroupedLinear], tuple(self.partial_decoders))
        return Decoders(first.weight, first.bias, second.weight, second.bias)

    @property
    def encoder_layers(self) -> EncoderLayers:
        """Layers of the encoder and the heads."""
        layers: list[Any] = [*self.category_mlp, *self.heads]
        first, _, hidden_dropout, second, norm, head, dropout, head_norm = layers
        return EncoderLayers(first, hidden_dropout, second, norm, head, dropout, head_norm)

    def partial_reconstructions(self, quantized: Tensor) -> Tensor:
        """Features from each codebook alone: [B, sum D] -> [G, B, F]."""
        features: Tensor = self.partial_decoders(quantized)
        return features

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Encodes, quantizes and decodes features [B, F]; in training mode, also updates the codes.

        Returns:
            reconstruction [B, F], tokens [B, G], vq_loss (scalar), latents and quantized [B, sum D], and codebook
            [sum K D]: the codes that the tokens index, before the update of this call.
        """
        out, apply_ema = self.encode_and_quantize(x)
        apply_ema()
        return {"reconstruction": self.reconstruct(out["quantized"], out["tokens"]), **out}

    def encode_and_quantize(
        self, x: Tensor, batch: BatchSlice | None = None
    ) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """`forward` without the reconstruction, and a function that updates the codes (outside training: nothing)."""
        latents = self.encode(x, batch)
        quantized, tokens, vq_loss, codebook, apply_ema = self.quantizer.quantize_with_codebook(latents)
        out = _outputs(tokens, vq_loss, latents, quantized, snapshot(codebook) if self.training else codebook)
        return out, apply_ema

    def encode_with_statistics(self, x: Tensor, batch: BatchSlice | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """`encode_and_quantize` with the statistics of the code update, see `GroupedVectorQuantizer`, for ranks."""
        latents = self.encode(x, batch)
        quantized, tokens, vq_loss, codebook, statistics = self.quantizer.quantize_with_statistics(latents)
        return _outputs(tokens, vq_loss, latents, quantized, snapshot(codebook)), statistics

    @torch.no_grad()
    def get_tokens(
        self,
        x: Tensor | ArrayLike,
        search: Search = "nearest",
        sweeps: int = 2,
        search_weight: float = 0.0,
        perturbations: int = 0,
    ) -> Tensor:
        """Features [B, F] -> tokens [B, G] int64, without dropout, gradients or code updates.

        Args:
            x: real numbers of any dtype, torch or numpy, on any device.
            search: "nearest": the code nearest to each latent. "joint": from there, one codebook after the other takes
                the code that minimises |reconstruction - x|^2 + w |latents - codes|^2 of the row; never a larger error.
            sweeps: passes of the joint search over the codebooks.
            search_weight: w; with larger ones, tokens stay closer to the features of their own categories.
            perturbations: how often two codes are moved, with `sweeps` more sweeps each, to leave a local minimum.

        Raises:
            DataError: the dtype of x is not real.
            ValueError: another `search`, or a number out of range.
        """
        token_search = TokenSearch(search, sweeps, search_weight, perturbations).check()
        with eval_mode(self):
            rows = to_real_tensor(x, "x").to(self.encoder_layers.first.weight)
            latents = self.encode(rows)
            codes = self.quantizer.assign(latents).codes
            if search == "nearest":
                return codes
            decoder = self.shared_decoder if self.token_decoder is None else self.token_decoder
            return joint_codes(rows, latents, codes, self.quantizer, decoder, token_search)

    @torch.no_grad()
    def decode_from_tokens(self, tokens: Tensor | ArrayLike) -> Tensor:
        """Tokens [B, G], torch or numpy -> features [B, F], without dropout.

        Raises:
            DataError: the tokens are not integers.
            IndexError: a token is out of range.
        """
        index = to_real_tensor(tokens, "tokens")
        if index.is_floating_point():
            raise DataError(f"tokens: expected integers, got {index.dtype}")
        with eval_mode(self):
            index = index.to(self.feature_order)
            return self.reconstruct(self.quantizer.lookup(index), index)

    def get_category_tokens(self, tokens: Tensor, category: str) -> Tensor:
        """The tokens [..., L] of one category out of [..., G]."""
        return tokens[..., self.category_slice(category)]

    def reset_dead_codes(
        self,
        threshold: float = 0.05,
        strategy: Literal["perturb", "sample"] = "perturb",
        max_fraction: float = 0.25,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Replaces dead codes; returns their number per codebook [G]. See `GroupedVectorQuantizer.reset_dead_codes`."""
        return self.quantizer.reset_dead_codes(threshold, strategy, max_fraction, latents)

    def num_parameters(self) -> tuple[int, int]:
        """Number of trainable parameters other than codes, and of code entries."""
        codes, learned = self.quantizer.layout.total_entries, not self.quantizer.use_ema
        return sum(p.numel() for p in self.parameters() if p.requires_grad) - learned * codes, codes
