"""Loading weights of this package and of the original project, and errors for invalid weights."""

from __future__ import annotations

import os
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import raises_one_line
from safetensors.torch import save_file
from torch import Tensor

from spinlock_fast import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig, from_pretrained_codebook
from spinlock_fast.checkpoints.directory import BEST, model_payload, save_torch
from spinlock_fast.compat import VectorQuantizer
from spinlock_fast.errors import DataError

FOLDER = os.environ.get("SPINLOCK_FAST_REAL_DATA", "")
SIZES = [(5, 4), (3, 8), (7, 4)]


@pytest.fixture
def model() -> CategoricalHierarchicalVQVAE:
    groups = {"a": [0, 1, 2, 3], "b": [4, 5, 6, 7, 8]}
    model = CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(input_dim=9, group_indices=groups)).eval()
    model.quantizer.embedding.normal_()
    model.quantizer.cluster_size.uniform_(1, 2)
    return model


def assert_same_quantizer(ours: Any, model: CategoricalHierarchicalVQVAE) -> None:
    assert not ours.training
    z = torch.randn(20, model.quantizer.layout.total_dims)
    for found, expected in zip(ours(z), model.quantizer(z), strict=True):
        assert torch.equal(found, expected)
    for name, value in model.quantizer.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("source", ["directory", "file", "payload"])
def test_spinlock_checkpoints(model: CategoricalHierarchicalVQVAE, tmp_path: Path, source: str) -> None:
    payload = model_payload(model, model.state_dict(), 0, {"feature_mask": torch.ones(9)})
    save_torch(tmp_path / BEST, payload)
    given = {"directory": tmp_path, "file": str(tmp_path / BEST), "payload": payload}[source]
    assert_same_quantizer(from_pretrained_codebook(given), model)


@pytest.mark.parametrize("part", [False, True])
def test_spinlock_state_dicts_with_sizes(model: CategoricalHierarchicalVQVAE, tmp_path: Path, part: bool) -> None:
    state = (model.quantizer if part else model).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    sizes = {"num_codes": model.quantizer.num_codes, "dims": model.quantizer.dims}
    assert_same_quantizer(from_pretrained_codebook(tmp_path / "model.safetensors", "spinlock", **sizes), model)
    with raises_one_line(DataError, "num_codes and dims"):
        from_pretrained_codebook(state, "spinlock")
    with raises_one_line(DataError, "embedding is", "num_codes and dims make"):
        from_pretrained_codebook(state, "spinlock", num_codes=[3], dims=[4])


@pytest.mark.parametrize("use_ema", [True, False])
def test_quantizers_of_the_original_project(use_ema: bool) -> None:
    layers = [VectorQuantizer(k, d, use_ema=use_ema).eval() for k, d in SIZES]
    state = {}
    for g, layer in enumerate(layers):
        layer.embedding.weight.data.normal_()
        state |= {f"model.vq_layers.{g}.{name}": value for name, value in layer.state_dict().items()}
    vq = from_pretrained_codebook(state)
    z = torch.randn(30, sum(d for _, d in SIZES))
    quantized, codes, _ = vq(z)
    for g, (layer, part) in enumerate(zip(layers, z.split([d for _, d in SIZES], dim=1), strict=True)):
        assert torch.equal(layer(part)[1].argmax(-1), codes[:, g])
    expected = [layer.embedding.weight[codes[:, g]] for g, layer in enumerate(layers)]
    assert torch.equal(quantized, torch.cat(expected, dim=1))


def test_learned_original_codes_train_with_ema() -> None:
    layer = VectorQuantizer(5, 4, use_ema=False)
    state = {f"vq_layers.0.{name}": value for name, value in layer.state_dict().items()}
    vq: Any = from_pretrained_codebook(state, use_ema=True).train()
    before = layer.embedding.weight.detach()
    vq(before)
    torch.testing.assert_close(vq.codebook(0), before)


@pytest.mark.skipif(not FOLDER, reason="SPINLOCK_FAST_REAL_DATA does not name the folder of the real data")
def test_a_real_checkpoint_of_the_original_project() -> None:
    from spinlock_fast.compat.original import convert

    directory = Path(FOLDER) / "original_checkpoint"
    vq: Any = from_pretrained_codebook(directory)
    converted = convert(directory).model.quantizer
    assert vq.num_codes == converted.num_codes
    z = torch.randn(50, vq.layout.total_dims)
    assert torch.equal(vq(z)[1], converted(z)[1])


def encodec(stages: int = 2, dim: int = 4, prefix: str = "quantizer.") -> dict[str, Tensor]:
    state = {}
    for i in range(stages):
        name = f"{prefix}layers.{i}.codebook"
        state |= {f"{name}.embed": torch.randn(6, dim), f"{name}.inited": torch.ones(1)}
    return state


def dac(stages: int = 2) -> dict[str, Tensor]:
    state = {}
    for i in range(stages):
        name = f"quantizer.quantizers.{i}"
        state |= {f"{name}.codebook.weight": torch.randn(6, 3)}
        state |= {f"{name}.in_proj.weight": torch.randn(3, 8, 1), f"{name}.in_proj.bias": torch.randn(3)}
        state |= {f"{name}.out_proj.weight": torch.randn(8, 3, 1), f"{name}.out_proj.bias": torch.randn(8)}
    return state


def mimi() -> dict[str, Tensor]:
    state = {}
    for part in ("semantic", "acoustic"):
        name = f"quantizer.{part}_residual_vector_quantizer.layers.0.codebook"
        state |= {f"{name}.embed_sum": torch.randn(6, 4), f"{name}.cluster_usage": torch.ones(6)}
    return state


IMAGE = {"quantize.embedding.weight": torch.randn(6, 3)}


@pytest.mark.parametrize(
    ("state", "format", "texts"),
    [
        (dac(), "encodec", ["no 'layers.0.codebook.embed'", "nearest key is 'quantizer.quantizers.0", "'dac'"]),
        (encodec(), "mimi", ["semantic_residual_vector_quantizer", "look like 'encodec'"]),
        (encodec(), "taming", ["no 'quantize.embedding.weight'", "look like 'encodec'"]),
        ({"text.embedding.weight": torch.ones(3, 2)}, "taming", ["no 'quantize.embedding.weight'", "'text.embedding"]),
        ({"head.weight": torch.ones(3, 2)}, None, ["no known format", "'head.weight'", "format="]),
        ({"head.weight": torch.ones(3, 2)}, "spinlock", ["no 'quantizer.embedding'", "nearest key is 'head.weight'"]),
        ({"epoch": 3}, None, ["no named tensors", "'epoch'"]),
        ({}, "dac", ["no named tensors"]),
        (torch.nn.Linear(2, 2), None, ["got Linear", "state_dict()"]),
        ({**encodec(), **encodec(prefix="other.")}, None, ["2 quantizers", "'quantizer.'", "'other.'"]),
        ({key: value[None] for key, value in encodec().items()}, None, ["must be [rows, columns]", "[1, 6, 4]"]),
        ({**encodec(), "quantizer.layers.1.codebook.embed": torch.ones(6, 5)}, None, ["must be [rows, 4]", "[6, 5]"]),
        ({**encodec(), "quantizer.layers.1.codebook.embed": torch.full((6, 4), torch.nan)}, None, ["not finite"]),
        ({**encodec(), "quantizer.layers.1.codebook.inited": torch.zeros(1)}, None, ["layers.1.codebook.inited", "0"]),
        ({**encodec(), "quantizer.layers.0.project_in.weight": torch.ones(4, 4)}, None, ["projections"]),
        (
            {**encodec(), "quantizer.layers.0.codebook.cluster_size": torch.ones(5),
             "quantizer.layers.0.codebook.embed_avg": torch.ones(6, 4)}, None, ["do not match", "cluster_size"],
        ),
        ({k: v for k, v in dac().items() if not k.endswith("1.out_proj.bias")}, "dac", ["quantizers.1.out_proj.bias"]),
        ({k: v for k, v in mimi().items() if "acoustic" not in k}, "mimi", ["acoustic_residual_vector_quantizer"]),
        ({**IMAGE, "quantize.used": torch.arange(3)}, "taming", ["renumbered"]),
        ({"quantize.embed.weight": torch.ones(6, 3)}, "taming", ["Gumbel"]),
    ],
)  # fmt: skip
def test_invalid_weights_raise_one_line(state: Any, format: Any, texts: list[str]) -> None:
    with raises_one_line(DataError, *texts):
        from_pretrained_codebook(state, format)


@pytest.mark.parametrize(
    ("state", "arguments", "texts"),
    [
        (encodec(), {"format": "encode"}, ["encodec, mimi, dac", "'encode'"]),
        (encodec(), {"num_quantizers": 0}, ["at least 1"]),
        (IMAGE, {"num_quantizers": 1}, ["no stages"]),
        (encodec(), {"codebook_dim": 3}, ["codebook_dim", "follows from the weights"]),
        (encodec(), {"shared_codebook": True}, ["shared_codebook"]),
    ],
)
def test_invalid_arguments_raise(state: Any, arguments: dict[str, Any], texts: list[str]) -> None:
    with raises_one_line(ValueError, *texts):
        from_pretrained_codebook(state, **arguments)


@pytest.mark.parametrize(
    ("state", "wanted", "text"),
    [(encodec(), 3, "there are 2"), (dac(), 3, "there are 2"), (mimi(), 3, "there are 1")],
)
def test_too_many_stages_raise(state: Any, wanted: int, text: str) -> None:
    with raises_one_line(DataError, text):
        from_pretrained_codebook(state, num_quantizers=wanted)


@pytest.mark.parametrize("prefix", ["", "quantizer.", "module.audio_encoder.quantizer."])
def test_any_prefix(prefix: str) -> None:
    state: OrderedDict[str, Tensor] = OrderedDict(encodec(prefix=prefix))
    vq: Any = from_pretrained_codebook(state)
    assert torch.equal(vq.codebooks[1], state[f"{prefix}layers.1.codebook.embed"])


def test_codebooks_of_different_sizes() -> None:
    state = {**encodec(), "quantizer.layers.1.codebook.embed": torch.randn(9, 4)}
    vq: Any = from_pretrained_codebook(state)
    assert [len(codebook) for codebook in vq.codebooks] == [6, 9]


def test_unreadable_files_raise(tmp_path: Path) -> None:
    with raises_one_line(DataError, "no such file"):
        from_pretrained_codebook(tmp_path / "none.safetensors")
    with raises_one_line(DataError, "none of best_model.pt", "model.safetensors"):
        from_pretrained_codebook(tmp_path, "spinlock")
    for name in ("damaged.safetensors", "damaged.pt"):
        (tmp_path / name).write_bytes(b"nothing of the sort" * 9)
        with raises_one_line(DataError, name):
            from_pretrained_codebook(tmp_path / name)
    for name, value in {"fractions.Fraction": Fraction(1, 2), "numpy.": np.float64(0.5)}.items():
        torch.save({"state_dict": encodec(), "callbacks": value}, tmp_path / "objects.ckpt")
        with raises_one_line(DataError, f"contains {name}", "only the state dict"):
            from_pretrained_codebook(tmp_path / "objects.ckpt", "encodec")


def test_taming_with_moving_averages() -> None:
    embed, size = torch.randn(6, 3), torch.rand(6) + 1
    state = {"embedding.weight": embed, "embedding.cluster_size": size, "embedding.embed_avg": embed * size[:, None]}
    vq: Any = from_pretrained_codebook({f"quantize.{key}": value for key, value in state.items()}, "taming")
    assert torch.equal(vq._codebook.cluster_size[0], size)
    assert torch.equal(vq._codebook.embed_avg[0], embed * size[:, None])


@pytest.mark.parametrize("counts", [{}, {"cluster_size": torch.zeros(6), "embed_avg": torch.zeros(6, 3)}])
def test_codes_without_counts_have_count_one(counts: dict[str, Tensor]) -> None:
    embed = 10.0 * torch.randn(6, 3)
    state = {"quantize.embedding.weight": embed} | {f"quantize.embedding.{key}": value for key, value in counts.items()}
    vq: Any = from_pretrained_codebook(state, "taming", accept_image_fmap=False, decay=0.5).train()
    x = embed + 0.1
    vq(x[None])
    torch.testing.assert_close(vq.codebook, (embed + x) / 2, rtol=1e-3, atol=1e-3)


def test_options_reach_the_quantizer() -> None:
    vq: Any = from_pretrained_codebook(IMAGE, "taming", learnable_codebook=True, ema_update=False)
    assert isinstance(vq._codebook.embed, torch.nn.Parameter)
    assert torch.equal(vq.codebook.detach(), IMAGE["quantize.embedding.weight"])


@pytest.mark.parametrize("kind", ["complex", "sparse", "meta"])
@pytest.mark.parametrize("format", ["taming", "spinlock"])
def test_codes_of_an_unsupported_dtype_raise(format: Any, kind: str) -> None:
    codes = torch.randn(4, 3)
    stored = {
        "complex": lambda: codes.to(torch.complex64),
        "sparse": codes.to_sparse,
        "meta": lambda: codes.to("meta"),
    }[kind]()
    name = "quantize.embedding.weight" if format == "taming" else "vq_layers.0.embedding.weight"
    with raises_one_line(DataError, name, kind):
        from_pretrained_codebook({name: stored}, format)


def test_complex_packed_codes_raise(model: CategoricalHierarchicalVQVAE) -> None:
    quantizer = model.quantizer
    state = {**quantizer.state_dict(), "embedding": quantizer.embedding.to(torch.complex64)}
    with raises_one_line(DataError, "embedding", "complex"):
        from_pretrained_codebook(state, "spinlock", num_codes=quantizer.num_codes, dims=quantizer.dims)
