"""Quantizers from pretrained weights: audio codecs, VQGANs, and checkpoints of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from spinlock_fast.compat.codecs import FactorizedResidualVQ, SplitResidualVQ
from spinlock_fast.compat.weights import Format, Weights, read_weights
from spinlock_fast.dropin import ResidualVQ, VectorQuantize
from spinlock_fast.errors import DataError
from spinlock_fast.messages import one_line
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.quantize import GroupedVectorQuantizer

# Arguments that follow from the weights, or that would change the codes.
_FIXED_OPTIONS = {
    "dim", "codebook_size", "codebook_dim", "heads", "separate_codebook_per_head", "use_cosine_sim", "shared_codebook",
    "implicit_neural_codebook", "affine_param", "vq_bridge", "layernorm_after_project_in", "kmeans_init",
}  # fmt: skip

# Training settings of EnCodec and Mimi.
_CODEC_TRAINING = {"decay": 0.99, "rotation_trick": False, "quantize_dropout": True}


def from_pretrained_codebook(
    state_dict: Mapping[str, Any] | str | Path,
    format: Format | None = None,
    *,
    num_quantizers: int | None = None,
    **options: Any,
) -> nn.Module:
    """A quantizer in eval mode that gives the same codes and quantized vectors as that of a pretrained model.

    | format | source | result | latents |
    |---|---|---|---|
    | encodec | EnCodec of `transformers`, `encodec` or `audiocraft` | ResidualVQ | [b, n, d] |
    | mimi | Mimi of `transformers` or `moshi` | SplitResidualVQ of two ResidualVQ | [b, n, d] |
    | dac | DAC of `transformers` or `descript-audio-codec` | FactorizedResidualVQ | [b, n, d] |
    | taming | VQGAN of `taming-transformers`, latent diffusion | VectorQuantize | [b, d, h, w] |
    | diffusers | VQModel of `diffusers` | VectorQuantize | [b, d, h, w] |
    | spinlock | this package or the original project | GroupedVectorQuantizer | [..., sum D] |

    The audio codecs have channels before time: transpose their latents. Codes are [b, n, q].

    Args:
        state_dict: state dict of the model or of its quantizer, or the path of a safetensors file, of a torch file
            (loaded without executing code) or of a checkpoint directory (spinlock, or written by `save_pretrained`).
        format: the format; None detects it from the keys.
        num_quantizers: number of stages of a residual quantizer to keep, for a lower bandwidth; for Mimi, semantic
            and acoustic stages together.
        options: arguments of the quantizer's class for further training: decay, commitment_weight,
            learnable_codebook, ... For packed spinlock weights without configuration, num_codes and dims.

    Raises:
        DataError: the file cannot be read, or a key is missing or has the wrong shape; the message names the nearest
            key.
        ValueError: an unknown format, or an option that follows from the weights.
    """
    if format is not None and format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
    payload = read_weights(Path(state_dict), format) if isinstance(state_dict, (str, Path)) else state_dict
    weights = Weights(payload, format)
    build = _BUILDERS[weights.format]
    if num_quantizers is not None:
        if weights.format not in ("encodec", "mimi", "dac"):
            raise ValueError(f"num_quantizers is for residual quantizers, and format {weights.format!r} has no stages")
        if num_quantizers < 1:
            raise ValueError(f"num_quantizers must be at least 1, got {num_quantizers}")
    fixed = sorted(_FIXED_OPTIONS & options.keys())
    if fixed:
        raise ValueError(f"{fixed[0]} cannot be given: it follows from the weights")
    return build(weights, num_quantizers, options).eval()


def _load(quantizer: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Loads `values` over the state dict of the quantizer; raises DataError if shapes differ."""
    try:
        quantizer.load_state_dict({**quantizer.state_dict(), **values})
    except RuntimeError as error:
        raise DataError(f"weights do not match each other: {one_line(error, 200)}") from None
    return quantizer


def _codebook(embed: Tensor, counts: Tensor | None = None, sums: Tensor | None = None) -> dict[str, Tensor]:
    """State dict entries of `_codebook`: codes [K, D], moving counts [K] and moving sums [K, D].

    Without counts, or if all are 0, each code has a count of 1, as in a new codebook.
    """
    if counts is None or sums is None or not bool(counts.sum() > 0):
        counts, sums = torch.ones(embed.shape[0]), embed
    return {
        "_codebook.initted": torch.tensor(True),
        "_codebook.cluster_size": counts.reshape(1, -1),
        "_codebook.embed_avg": sums[None],
        "_codebook.embed": embed[None],
    }


def _residual_vq(codebooks: list[dict[str, Tensor]], dim: int | None, options: Mapping[str, Any]) -> nn.Module:
    """A ResidualVQ with the given codebooks; `dim` is the dimension of the latents if they are projected."""
    sizes = [codebook["_codebook.embed"].shape[1] for codebook in codebooks]
    codebook_dim = codebooks[0]["_codebook.embed"].shape[2]
    quantizer = ResidualVQ(
        dim=codebook_dim if dim is None else dim,
        codebook_dim=codebook_dim,
        num_quantizers=len(codebooks),
        codebook_size=sizes[0] if len(set(sizes)) == 1 else tuple(sizes),
        **options,
    )
    values = {f"layers.{q}.{key}": value for q, codebook in enumerate(codebooks) for key, value in codebook.items()}
    return _load(quantizer, values)


def _encodec(weights: Weights, num_quantizers: int | None, options: Mapping[str, Any]) -> nn.Module:
    prefix = weights.prefix("layers.0.codebook.embed")
    stages = weights.num_stages(f"{prefix}layers.", ".codebook.embed", num_quantizers)
    codebooks, dim = [], None
    for q in range(stages):
        layer = f"{prefix}layers.{q}"
        if f"{layer}.project_in.weight" in weights.tensors:
            raise DataError(f"{layer}.project_in: EnCodec with projections in its stages is not supported")
        embed = weights.matrix(f"{layer}.codebook.embed", dim)
        dim = embed.shape[1]
        _check_initialized(weights, f"{layer}.codebook.inited")
        averages = [weights.optional(f"{layer}.codebook.{name}") for name in ("cluster_size", "embed_avg")]
        codebooks.append(_codebook(embed, *averages))
    return _residual_vq(codebooks, None, {**_CODEC_TRAINING, **options})


def _check_initialized(weights: Weights, name: str) -> None:
    if name in weights.tensors and not bool(weights.tensors[name].all()):
        raise DataError(f"{weights.names[name]!r} is 0: this codebook was never initialised")


def _mimi(weights: Weights, num_quantizers: int | None, options: Mapping[str, Any]) -> nn.Module:
    semantic, acoustic = "semantic_residual_vector_quantizer.", "acoustic_residual_vector_quantizer."
    prefix, leaf = weights.prefix(f"{semantic}layers.0.codebook.embed_sum"), ".codebook.embed_sum"
    num_semantic = weights.num_stages(f"{prefix}{semantic}layers.", leaf, None)
    if num_quantizers is not None and num_quantizers < num_semantic:
        raise DataError(f"num_quantizers is {num_quantizers}, but there are {num_semantic} semantic quantizers")
    remaining = None if num_quantizers is None else num_quantizers - num_semantic
    num_acoustic = weights.num_stages(f"{prefix}{acoustic}layers.", leaf, remaining)
    if num_quantizers is None and num_acoustic == 0:
        raise weights.missing(f"{prefix}{acoustic}layers.0.codebook.embed_sum")
    training = {**_CODEC_TRAINING, **options}
    return SplitResidualVQ(
        _mimi_part(weights, prefix + semantic, num_semantic, {**training, "quantize_dropout": False}),
        _mimi_part(weights, prefix + acoustic, num_acoustic, training) if num_acoustic else None,
    )


def _mimi_part(weights: Weights, prefix: str, stages: int, options: Mapping[str, Any]) -> nn.Module:
    codebooks, dim = [], None
    for q in range(stages):
        name = f"{prefix}layers.{q}.codebook"
        _check_initialized(weights, f"{name}.initialized")
        embed_sum = weights.matrix(f"{name}.embed_sum", dim)
        usage = weights.get(f"{name}.cluster_usage")
        dim = embed_sum.shape[1]
        # Mimi stores sums and counts, and divides with this lower bound.
        codebooks.append(_codebook(embed_sum / usage.clamp(min=1e-5)[:, None], usage, embed_sum))
    if f"{prefix}input_proj.weight" not in weights.tensors:
        return _residual_vq(codebooks, None, options)
    project_in = weights.matrix(f"{prefix}input_proj.weight")
    project_out = weights.matrix(f"{prefix}output_proj.weight", project_in.shape[0])
    quantizer = _residual_vq(codebooks, project_in.shape[1], options)
    values = {"project_in.weight": project_in, "project_out.weight": project_out}
    for name, parameter in quantizer.named_parameters():
        # Mimi's projections have no bias: these are set to 0 and not trained.
        if name in ("project_in.bias", "project_out.bias"):
            values[name] = torch.zeros_like(parameter)
            parameter.requires_grad_(False)
    return _load(quantizer, values)


def _dac(weights: Weights, num_quantizers: int | None, options: Mapping[str, Any]) -> nn.Module:
    prefix = weights.prefix("quantizers.0.codebook.weight")
    stages = weights.num_stages(f"{prefix}quantizers.", ".codebook.weight", num_quantizers)
    values: dict[str, Tensor] = {}
    for q in range(stages):
        source, target = f"{prefix}quantizers.{q}", f"layers.{q}"
        codes = weights.matrix(f"{source}.codebook.weight")
        values[f"{target}.codebook.weight"] = codes
        for name, columns in (("in_proj", None), ("out_proj", codes.shape[1])):
            values[f"{target}.{name}.weight"] = _convolution(weights, f"{source}.{name}", columns)
            values[f"{target}.{name}.bias"] = weights.get(f"{source}.{name}.bias")
    sizes = [values[f"layers.{q}.codebook.weight"].shape for q in range(stages)]
    dim = values["layers.0.in_proj.weight"].shape[1]
    quantizer = FactorizedResidualVQ(dim, [K for K, _ in sizes], [D for _, D in sizes], **options)
    return _load(quantizer, values)


def _convolution(weights: Weights, name: str, columns: int | None) -> Tensor:
    """Weight [out, in] of a convolution of width 1, with weight normalisation (direction v, length g) applied."""
    if f"{name}.weight_v" not in weights.tensors:
        return weights.matrix(f"{name}.weight", columns)
    direction = weights.matrix(f"{name}.weight_v", columns)
    norm: Tensor = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    return direction * (weights.matrix(f"{name}.weight_g", 1) / norm)


def _vqgan(weights: Weights, num_quantizers: int | None, options: Mapping[str, Any]) -> nn.Module:
    if weights.prefixes("quantize.embed.weight"):
        raise DataError("quantize.embed.weight: a Gumbel quantizer selects codes by logits, not by distance")
    prefix = weights.prefix_in("quantize.", "embedding.weight")
    if f"{prefix}used" in weights.tensors:
        raise DataError(f"{prefix}used: renumbered codes (remap) are not supported")
    embed = weights.matrix(f"{prefix}embedding.weight")
    averages = [weights.optional(f"{prefix}embedding.{name}") for name in ("cluster_size", "embed_avg")]
    quantizer = VectorQuantize(
        dim=embed.shape[1],
        codebook_size=embed.shape[0],
        **{"accept_image_fmap": True, "rotation_trick": False, **options},
    )
    return _load(quantizer, _codebook(embed, *averages))


def _spinlock(weights: Weights, num_quantizers: int | None, options: Mapping[str, Any]) -> nn.Module:
    if weights.prefixes("vq_layers.0.embedding.weight"):
        return _spinlock_original(weights, options)
    prefix = weights.prefix_in("quantizer.", "embedding")
    arguments = {"centred": False, **_spinlock_arguments(weights.payload), **options}
    if "num_codes" not in arguments or "dims" not in arguments:
        raise DataError("packed codes without their sizes: give a checkpoint directory, or num_codes and dims")
    quantizer = GroupedVectorQuantizer(**arguments)
    values = {}
    for name, entry in quantizer.state_dict().items():
        value = weights.stored(f"{prefix}{name}")
        if value.shape != entry.shape:
            raise DataError(f"{prefix}{name} is {list(value.shape)}, but num_codes and dims make {list(entry.shape)}")
        values[name] = value
    return _load(quantizer, values)


def _spinlock_arguments(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the quantizer in a checkpoint of this package; empty without `model_config`."""
    config = payload.get("model_config")
    if not isinstance(config, Mapping):
        return {}
    try:
        quantizer = CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(**config)).quantizer
    except ValueError as error:
        raise DataError(f"model_config: {one_line(error, 200)}") from None
    names = ("num_codes", "dims", "decay", "commitment_weight", "use_ema", "rotation_trick")
    return {name: getattr(quantizer, name) for name in names}


def _spinlock_original(weights: Weights, options: Mapping[str, Any]) -> nn.Module:
    prefix = weights.prefix("vq_layers.0.embedding.weight")
    num_codebooks = weights.num_stages(f"{prefix}vq_layers.", ".embedding.weight", None)
    layers = [f"{prefix}vq_layers.{g}." for g in range(num_codebooks)]
    codes = [weights.matrix(f"{layer}embedding.weight") for layer in layers]
    use_ema = f"{layers[0]}ema_w" in weights.tensors
    arguments = {"centred": False, "use_ema": use_ema, **options}
    quantizer = GroupedVectorQuantizer([len(code) for code in codes], [code.shape[1] for code in codes], **arguments)
    values = {"embedding": torch.cat([code.flatten() for code in codes]), "initialized": torch.tensor(True)}
    if use_ema:
        values["cluster_size"] = torch.cat([weights.get(f"{layer}ema_cluster_size") for layer in layers])
        values["embedding_sum"] = torch.cat([weights.get(f"{layer}ema_w").flatten() for layer in layers])
    else:
        values["embedding_sum"] = values["embedding"]
    return _load(quantizer, values)


_BUILDERS: dict[Format, Callable[[Weights, int | None, Mapping[str, Any]], nn.Module]] = {
    "encodec": _encodec,
    "mimi": _mimi,
    "dac": _dac,
    "taming": _vqgan,
    "diffusers": _vqgan,
    "spinlock": _spinlock,
}
