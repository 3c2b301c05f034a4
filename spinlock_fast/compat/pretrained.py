"""Quantizers from the weights of other projects' models: audio codecs, VQGANs, and this package's own."""

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

# What the weights decide, or what would give other codes than the source model's.
_FIXED = {
    "dim", "codebook_size", "codebook_dim", "heads", "separate_codebook_per_head", "use_cosine_sim", "shared_codebook",
    "implicit_neural_codebook", "affine_param", "vq_bridge", "layernorm_after_project_in", "kmeans_init",
}  # fmt: skip

# EnCodec and Mimi train so.
_CODEC_TRAINING = {"decay": 0.99, "rotation_trick": False, "quantize_dropout": True}


def from_pretrained_codebook(
    state_dict: Mapping[str, Any] | str | Path,
    format: Format | None = None,
    *,
    num_quantizers: int | None = None,
    **options: Any,
) -> nn.Module:
    """A quantizer, in eval mode, with the codes and the quantized vectors of another model's.

    | format | source | result | latents |
    |---|---|---|---|
    | encodec | EnCodec of `transformers`, `encodec` or `audiocraft` | ResidualVQ | [b, n, d] |
    | mimi | Mimi of `transformers` or `moshi` | SplitResidualVQ of two ResidualVQ | [b, n, d] |
    | dac | DAC of `transformers` or `descript-audio-codec` | FactorizedResidualVQ | [b, n, d] |
    | taming | VQGAN of `taming-transformers`, latent diffusion | VectorQuantize | [b, d, h, w] |
    | diffusers | VQModel of `diffusers` | VectorQuantize | [b, d, h, w] |
    | spinlock | this package or the original project | GroupedVectorQuantizer | [..., sum D] |

    The audio codecs themselves put channels before time: transpose their latents. Codes come last, [b, n, q].

    Args:
        state_dict: of the model or of its quantizer alone, or a file: safetensors, or a torch file, from which
            no code is run; or the directory of a checkpoint (spinlock, or what `save_pretrained` writes).
        format: the family; None finds it by the keys.
        num_quantizers: how many stages of a residual quantizer to keep, for a lower bandwidth; in Mimi semantic and
            acoustic ones together.
        options: arguments of the quantizer's class for training on: decay, commitment_weight, learnable_codebook, ...
            For packed spinlock weights without their configuration, num_codes and dims.

    Raises:
        DataError: the file cannot be read, or a key is missing or does not fit; the text names the nearest key.
        ValueError: an unknown format, or an option that the weights decide.
    """
    if format is not None and format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
    payload = read_weights(Path(state_dict), format) if isinstance(state_dict, (str, Path)) else state_dict
    weights = Weights(payload, format)
    reader = _READERS[weights.format]
    if num_quantizers is not None:
        if weights.format not in ("encodec", "mimi", "dac"):
            raise ValueError(f"num_quantizers is for residual quantizers, and format {weights.format!r} has no stages")
        if num_quantizers < 1:
            raise ValueError(f"num_quantizers must be at least 1, got {num_quantizers}")
    fixed = sorted(_FIXED & options.keys())
    if fixed:
        raise ValueError(f"{fixed[0]} cannot be given: the weights decide it")
    return reader(weights, num_quantizers, options).eval()


def _load(quantizer: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Sets some entries of a state dict; raises DataError where shapes differ."""
    try:
        quantizer.load_state_dict({**quantizer.state_dict(), **values})
    except RuntimeError as error:
        raise DataError(f"weights do not fit each other: {' '.join(str(error).split())[:200]}") from None
    return quantizer


def _codebook(embed: Tensor, size: Tensor | None = None, total: Tensor | None = None) -> dict[str, Tensor]:
    """Entries of `_codebook`: codes [K, D] with their moving counts and sums.

    Without counts (or with counts of zero) a code counts as one row, as in a new codebook.
    """
    if size is None or total is None or not bool(size.sum() > 0):
        size, total = torch.ones(embed.shape[0]), embed
    return {
        "_codebook.initted": torch.tensor(True),
        "_codebook.cluster_size": size.reshape(1, -1),
        "_codebook.embed_avg": total[None],
        "_codebook.embed": embed[None],
    }


def _residual(books: list[dict[str, Tensor]], dim: int | None, options: Mapping[str, Any]) -> nn.Module:
    """A ResidualVQ of given codebooks."""
    sizes = [book["_codebook.embed"].shape[1] for book in books]
    width = books[0]["_codebook.embed"].shape[2]
    quantizer = ResidualVQ(
        dim=width if dim is None else dim,
        codebook_dim=width,
        num_quantizers=len(books),
        codebook_size=sizes[0] if len(set(sizes)) == 1 else tuple(sizes),
        **options,
    )
    return _load(quantizer, {f"layers.{i}.{key}": value for i, book in enumerate(books) for key, value in book.items()})


def _encodec(weights: Weights, wanted: int | None, options: Mapping[str, Any]) -> nn.Module:
    root = weights.root("layers.0.codebook.embed")
    count = weights.stages(f"{root}layers.", ".codebook.embed", wanted)
    books, width = [], None
    for i in range(count):
        layer = f"{root}layers.{i}"
        if f"{layer}.project_in.weight" in weights.tensors:
            raise DataError(f"{layer}.project_in: EnCodec with projections in its stages is not supported")
        embed = weights.matrix(f"{layer}.codebook.embed", width)
        width = embed.shape[1]
        _check_initialized(weights, f"{layer}.codebook.inited")
        averages = [weights.optional(f"{layer}.codebook.{name}") for name in ("cluster_size", "embed_avg")]
        books.append(_codebook(embed, *averages))
    return _residual(books, None, {**_CODEC_TRAINING, **options})


def _check_initialized(weights: Weights, name: str) -> None:
    if name in weights.tensors and not bool(weights.tensors[name].all()):
        raise DataError(f"{weights.names[name]!r} is 0: this codebook was never initialised")


def _mimi(weights: Weights, wanted: int | None, options: Mapping[str, Any]) -> nn.Module:
    first, rest = "semantic_residual_vector_quantizer.", "acoustic_residual_vector_quantizer."
    root = weights.root(f"{first}layers.0.codebook.embed_sum")
    semantic = weights.stages(f"{root}{first}layers.", ".codebook.embed_sum", None)
    if wanted is not None and wanted < semantic:
        raise DataError(f"num_quantizers is {wanted}, but the semantic quantizers alone are {semantic}")
    remaining = None if wanted is None else wanted - semantic
    acoustic = weights.stages(f"{root}{rest}layers.", ".codebook.embed_sum", remaining)
    if wanted is None and acoustic == 0:
        raise weights.missing(f"{root}{rest}layers.0.codebook.embed_sum")
    training = {**_CODEC_TRAINING, **options}
    return SplitResidualVQ(
        _mimi_part(weights, root + first, semantic, {**training, "quantize_dropout": False}),
        _mimi_part(weights, root + rest, acoustic, training) if acoustic else None,
    )


def _mimi_part(weights: Weights, prefix: str, count: int, options: Mapping[str, Any]) -> nn.Module:
    books, width = [], None
    for i in range(count):
        codebook = f"{prefix}layers.{i}.codebook"
        _check_initialized(weights, f"{codebook}.initialized")
        total = weights.matrix(f"{codebook}.embed_sum", width)
        size = weights.get(f"{codebook}.cluster_usage")
        width = total.shape[1]
        # Mimi stores sums and counts and divides with this bound.
        books.append(_codebook(total / size.clamp(min=1e-5)[:, None], size, total))
    if f"{prefix}input_proj.weight" not in weights.tensors:
        return _residual(books, None, options)
    project_in = weights.matrix(f"{prefix}input_proj.weight")
    project_out = weights.matrix(f"{prefix}output_proj.weight", project_in.shape[0])
    quantizer = _residual(books, project_in.shape[1], options)
    values = {"project_in.weight": project_in, "project_out.weight": project_out}
    for name, parameter in quantizer.named_parameters():
        # Mimi's projections have no bias: here it is zero and stays so.
        if name in ("project_in.bias", "project_out.bias"):
            values[name] = torch.zeros_like(parameter)
            parameter.requires_grad_(False)
    return _load(quantizer, values)


def _dac(weights: Weights, wanted: int | None, options: Mapping[str, Any]) -> nn.Module:
    root = weights.root("quantizers.0.codebook.weight")
    count = weights.stages(f"{root}quantizers.", ".codebook.weight", wanted)
    values: dict[str, Tensor] = {}
    for i in range(count):
        source, stage = f"{root}quantizers.{i}", f"layers.{i}"
        codes = weights.matrix(f"{source}.codebook.weight")
        values[f"{stage}.codebook.weight"] = codes
        for name, columns in (("in_proj", None), ("out_proj", codes.shape[1])):
            values[f"{stage}.{name}.weight"] = _convolution(weights, f"{source}.{name}", columns)
            values[f"{stage}.{name}.bias"] = weights.get(f"{source}.{name}.bias")
    books = [values[f"layers.{i}.codebook.weight"].shape for i in range(count)]
    dim = values["layers.0.in_proj.weight"].shape[1]
    quantizer = FactorizedResidualVQ(dim, [k for k, _ in books], [d for _, d in books], **options)
    return _load(quantizer, values)


def _convolution(weights: Weights, name: str, columns: int | None) -> Tensor:
    """[out, in] of a convolution of width 1; weight normalisation (direction v, length g) is multiplied out."""
    if f"{name}.weight_v" not in weights.tensors:
        return weights.matrix(f"{name}.weight", columns)
    direction = weights.matrix(f"{name}.weight_v", columns)
    length: Tensor = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    return direction * (weights.matrix(f"{name}.weight_g", 1) / length)


def _image(weights: Weights, wanted: int | None, options: Mapping[str, Any]) -> nn.Module:
    if weights.roots("quantize.embed.weight"):
        raise DataError("quantize.embed.weight: a Gumbel quantizer picks codes by logits, not by distance")
    root = weights.part("quantize.", "embedding.weight")
    if f"{root}used" in weights.tensors:
        raise DataError(f"{root}used: codes that were renumbered (remap) are not supported")
    embed = weights.matrix(f"{root}embedding.weight")
    averages = [weights.optional(f"{root}embedding.{name}") for name in ("cluster_size", "embed_avg")]
    quantizer = VectorQuantize(
        dim=embed.shape[1],
        codebook_size=embed.shape[0],
        **{"accept_image_fmap": True, "rotation_trick": False, **options},
    )
    return _load(quantizer, _codebook(embed, *averages))


def _spinlock(weights: Weights, wanted: int | None, options: Mapping[str, Any]) -> nn.Module:
    from spinlock_fast.quantize import GroupedVectorQuantizer

    if weights.roots("vq_layers.0.embedding.weight"):
        return _spinlock_original(weights, options)
    root = weights.part("quantizer.", "embedding")
    known = {"centred": False, **_spinlock_config(weights.payload), **options}
    if "num_codes" not in known or "dims" not in known:
        raise DataError("the codes are packed without their sizes: give a checkpoint directory, or num_codes and dims")
    quantizer = GroupedVectorQuantizer(**known)
    values = {}
    for name, place in quantizer.state_dict().items():
        value = weights.stored(f"{root}{name}")
        if value.shape != place.shape:
            raise DataError(f"{root}{name} is {list(value.shape)}, but num_codes and dims make {list(place.shape)}")
        values[name] = value
    return _load(quantizer, values)


def _spinlock_config(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the quantizer in a checkpoint of this package; nothing where there is no configuration."""
    from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig

    config = payload.get("model_config")
    if not isinstance(config, Mapping):
        return {}
    try:
        quantizer = CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(**config)).quantizer
    except ValueError as error:
        raise DataError(f"model_config: {' '.join(str(error).split())[:200]}") from None
    same = ("num_codes", "dims", "decay", "commitment_weight", "use_ema", "rotation_trick")
    return {name: getattr(quantizer, name) for name in same}


def _spinlock_original(weights: Weights, options: Mapping[str, Any]) -> nn.Module:
    from spinlock_fast.quantize import GroupedVectorQuantizer

    root = weights.root("vq_layers.0.embedding.weight")
    count = weights.stages(f"{root}vq_layers.", ".embedding.weight", None)
    books = [f"{root}vq_layers.{g}." for g in range(count)]
    codes = [weights.matrix(f"{book}embedding.weight") for book in books]
    moving = f"{books[0]}ema_w" in weights.tensors
    known = {"centred": False, "use_ema": moving, **options}
    quantizer = GroupedVectorQuantizer([len(code) for code in codes], [code.shape[1] for code in codes], **known)
    values = {"embedding": torch.cat([code.flatten() for code in codes]), "initialized": torch.tensor(True)}
    if moving:
        values["cluster_size"] = torch.cat([weights.get(f"{book}ema_cluster_size") for book in books])
        values["embedding_sum"] = torch.cat([weights.get(f"{book}ema_w").flatten() for book in books])
    else:
        values["embedding_sum"] = values["embedding"]
    return _load(quantizer, values)


_READERS: dict[Format, Callable[[Weights, int | None, Mapping[str, Any]], nn.Module]] = {
    "encodec": _encodec,
    "mimi": _mimi,
    "dac": _dac,
    "taming": _image,
    "diffusers": _image,
    "spinlock": _spinlock,
}
