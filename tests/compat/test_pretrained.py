"""`from_pretrained_codebook` against the models of `transformers` and `diffusers`, tiny and untrained; no downloads."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from spinlock_fast import from_pretrained_codebook
from spinlock_fast.compat.codecs import FactorizedResidualVQ, SplitResidualVQ

K = 16


def optional(name: str) -> ModuleType:
    """Imports a library of the extra `pretrained`, ignoring its warnings."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"needs {name}: pip install 'spinlock-fast[pretrained]'")


@pytest.fixture(scope="module")
def encodec() -> Any:
    library = optional("transformers")
    torch.manual_seed(1)
    config = library.EncodecConfig(
        target_bandwidths=[0.8, 1.6, 3.2], sampling_rate=1600, upsampling_ratios=[4, 2], num_filters=4,
        hidden_size=12, codebook_size=K, num_lstm_layers=1,
    )  # fmt: skip
    model = library.EncodecModel(config).eval()
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_()
        layer.codebook.cluster_size.uniform_(1, 5)
        layer.codebook.embed_avg.copy_(layer.codebook.embed * layer.codebook.cluster_size[:, None])
    return model


def make_mimi(hidden: int) -> Any:
    library = optional("transformers")
    torch.manual_seed(2)
    config = library.MimiConfig(
        sampling_rate=1600, hidden_size=hidden, num_filters=2, upsampling_ratios=[4, 2], codebook_size=K,
        codebook_dim=8, vector_quantization_hidden_dimension=8, num_quantizers=5, num_semantic_quantizers=2,
        num_hidden_layers=1, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, upsample_groups=hidden,
    )  # fmt: skip
    model = library.MimiModel(config).eval()
    for name, module in model.quantizer.named_modules():
        if name.endswith("codebook"):
            module.cluster_usage.uniform_(1, 5)
            module.embed_sum.normal_()
    return model


@pytest.fixture(scope="module", params=[16, 8], ids=["projected", "plain"])
def mimi(request: pytest.FixtureRequest) -> Any:
    return make_mimi(request.param)


@pytest.fixture
def dac() -> Any:
    library = optional("transformers")
    config = library.DacConfig(
        encoder_hidden_size=4, downsampling_ratios=[2, 2], decoder_hidden_size=16, n_codebooks=4, codebook_size=K,
        codebook_dim=3, sampling_rate=1600,
    )  # fmt: skip
    model = library.DacModel(config).eval()
    with torch.no_grad():
        for parameter in model.quantizer.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="module")
def vq_model() -> Any:
    library = optional("diffusers")
    torch.manual_seed(4)
    model = library.VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, num_vq_embeddings=K, norm_num_groups=4,
        vq_embed_dim=3,
    )  # fmt: skip
    model.quantize.embedding.weight.data.normal_()
    return model.eval()


def renamed(state: Mapping[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    changed = {}
    for key, value in state.items():
        for old, new in pairs:
            key = re.sub(old, new, key)
        changed[key] = value
    assert changed.keys() != state.keys()
    return changed


def quantize(vq: nn.Module, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized [b, d, n] and codes [b, q, n] in the layout of the codecs: channels before time."""
    quantized, indices, losses = vq(latents.transpose(1, 2))
    assert indices.dtype == torch.int64
    assert losses.shape == (indices.shape[-1],)
    return quantized.transpose(1, 2), indices.transpose(1, 2)


def decode(vq: Any, codes: Tensor) -> Tensor:
    return vq.get_output_from_indices(codes.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("bandwidth", [0.8, 1.6, 3.2])
@torch.no_grad()
def test_encodec_at_every_bandwidth(encodec: Any, bandwidth: float) -> None:
    audio = torch.randn(2, 1, 800)
    stages = encodec.quantizer.get_num_quantizers_for_bandwidth(bandwidth)
    expected = encodec.encode(audio, bandwidth=bandwidth).audio_codes[0]
    assert expected.shape[1] == stages
    vq = from_pretrained_codebook(encodec.state_dict(), "encodec", num_quantizers=stages)
    quantized, codes = quantize(vq, encodec.encoder(audio))
    assert torch.equal(codes, expected)
    target = encodec.quantizer.decode(expected.transpose(0, 1))
    torch.testing.assert_close(quantized, target)
    torch.testing.assert_close(decode(vq, codes), target)
    heard = encodec.decode(expected[None], [None]).audio_values
    torch.testing.assert_close(encodec.decoder(quantized), heard)


@torch.no_grad()
def test_encodec_decodes_the_first_codes(encodec: Any) -> None:
    vq = from_pretrained_codebook(encodec.state_dict(), "encodec")
    codes = torch.randint(0, K, (2, 2, 7))
    torch.testing.assert_close(decode(vq, codes), encodec.quantizer.decode(codes.transpose(0, 1)))


def test_encodec_keeps_the_moving_averages(encodec: Any) -> None:
    vq: Any = from_pretrained_codebook(encodec.state_dict(), "encodec")
    assert not vq.training
    for layer, source in zip(vq.layers, encodec.quantizer.layers, strict=True):
        assert torch.equal(layer._codebook.cluster_size[0], source.codebook.cluster_size)
        assert torch.equal(layer._codebook.embed_avg[0], source.codebook.embed_avg)
        assert layer._codebook.initted


def test_encodec_with_the_names_of_its_first_release(encodec: Any) -> None:
    state = renamed(
        encodec.state_dict(), (r"quantizer\.layers", "quantizer.vq.layers"), (r"\.codebook\.", "._codebook.")
    )
    z = torch.randn(2, 12, 9)
    quantized, codes = quantize(from_pretrained_codebook({"best_state": state}), z)
    assert torch.equal(codes.transpose(0, 1), encodec.quantizer.encode(z))
    torch.testing.assert_close(quantized, encodec.quantizer.decode(codes.transpose(0, 1)))


@pytest.mark.parametrize("stages", [2, 3, 5])
@torch.no_grad()
def test_mimi_with_some_quantizers(mimi: Any, stages: int) -> None:
    latents = torch.randn(2, mimi.config.hidden_size, 11)
    expected = mimi.quantizer.encode(latents, stages).transpose(0, 1)
    vq = from_pretrained_codebook(mimi.state_dict(), "mimi", num_quantizers=stages)
    assert isinstance(vq, SplitResidualVQ)
    assert vq.num_quantizers == stages
    quantized, codes = quantize(vq, latents)
    assert torch.equal(codes, expected)
    target = mimi.quantizer.decode(expected)
    torch.testing.assert_close(quantized, target)
    torch.testing.assert_close(decode(vq, codes), target)
    everything = from_pretrained_codebook(mimi.state_dict(), "mimi")
    torch.testing.assert_close(decode(everything, codes), target)


@torch.no_grad()
def test_mimi_from_audio_to_audio(mimi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, seen = mimi.quantizer.encode, []
    monkeypatch.setattr(mimi.quantizer, "encode", lambda latents, *rest: seen.append(latents) or encode(latents, *rest))
    found = mimi.encode(torch.randn(2, 1, 400)).audio_codes
    vq = from_pretrained_codebook(mimi.state_dict())
    quantized, codes = quantize(vq, seen[0])
    assert torch.equal(codes, found)
    heard = mimi.decode(found).audio_values
    monkeypatch.setattr(mimi.quantizer, "decode", lambda _: quantized)
    torch.testing.assert_close(mimi.decode(found).audio_values, heard)


def test_mimi_with_the_names_of_its_first_release(mimi: Any) -> None:
    state = renamed(
        mimi.state_dict(),
        (r"semantic_residual_vector_quantizer\.layers", "rvq_first.vq.layers"),
        (r"acoustic_residual_vector_quantizer\.layers", "rvq_rest.vq.layers"),
        ("semantic_residual_vector_quantizer", "rvq_first"),
        ("acoustic_residual_vector_quantizer", "rvq_rest"),
        (r"\.codebook\.", "._codebook."),
        (r"\.initialized$", "._initialized"),
        (r"\.embed_sum$", ".embedding_sum"),
    )
    z = torch.randn(2, mimi.config.hidden_size, 9)
    _, codes = quantize(from_pretrained_codebook(state), z)
    assert torch.equal(codes, mimi.quantizer.encode(z).transpose(0, 1))


def test_mimi_projection_biases_stay_zero_in_training() -> None:
    source = make_mimi(16)
    vq = from_pretrained_codebook(source.state_dict(), freeze_codebook=True, quantize_dropout=False).train()
    optimizer = torch.optim.SGD(vq.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in vq.named_parameters()}
    quantized, _, losses = vq(torch.randn(2, 9, 16))
    (quantized.square().mean() + losses.sum()).backward()
    optimizer.step()
    changed = {name for name, value in vq.named_parameters() if not torch.equal(value, before[name])}
    parts, ends = ("semantic", "acoustic"), ("project_in", "project_out")
    assert changed == {f"{part}.{end}.weight" for part in parts for end in ends}


def weight_norm_of_first_release(dac: Any) -> dict[str, Tensor]:
    dac.apply_weight_norm()
    return renamed(
        dac.state_dict(),
        (r"parametrizations\.weight\.original0", "weight_g"),
        (r"parametrizations\.weight\.original1", "weight_v"),
    )


def dac_states(dac: Any, form: str) -> Mapping[str, Tensor]:
    if form == "plain":
        return dict(dac.state_dict())
    if form == "first release":
        return weight_norm_of_first_release(dac)
    dac.apply_weight_norm()
    with torch.no_grad():
        for stage in dac.quantizer.quantizers:
            stage.in_proj.parametrizations.weight.original0.mul_(1.5)
    return dict(dac.state_dict())


@pytest.mark.parametrize("form", ["plain", "weight norm", "first release"])
@pytest.mark.parametrize("stages", [1, 2, 4])
@torch.no_grad()
def test_dac_with_some_codebooks(dac: Any, form: str, stages: int) -> None:
    state = dac_states(dac, form)
    latents = torch.randn(2, 16, 25)
    expected, codes_expected, *_ = dac.quantizer(latents, n_quantizers=stages)
    vq = from_pretrained_codebook(state, "dac", num_quantizers=stages)
    assert isinstance(vq, FactorizedResidualVQ)
    quantized, codes = quantize(vq, latents)
    assert torch.equal(codes, codes_expected)
    # Rounding errors accumulate over the stages.
    torch.testing.assert_close(quantized, expected, rtol=1e-5, atol=1e-4)
    everything = from_pretrained_codebook(state, "dac")
    torch.testing.assert_close(decode(everything, codes), dac.quantizer.from_codes(codes)[0], rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_dac_from_audio_to_audio(dac: Any) -> None:
    audio = torch.randn(2, 1, 160)
    found = dac.encode(audio)
    quantized, codes = quantize(from_pretrained_codebook(dac.state_dict()), dac.encoder(audio))
    assert torch.equal(codes, found.audio_codes)
    heard = dac.decode(audio_codes=found.audio_codes).audio_values
    torch.testing.assert_close(dac.decoder(quantized).squeeze(1), heard, rtol=1e-4, atol=1e-5)


def test_dac_gradients_match_its_source(dac: Any) -> None:
    vq = from_pretrained_codebook(dac.state_dict(), "dac").train()
    z = torch.randn(2, 16, 25)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    quantized, _, losses = vq(ours.transpose(1, 2))
    expected, _, _, commitment, codebook = dac.quantizer.train()(theirs)
    loss = 0.25 * commitment.mean() + codebook.mean()
    torch.testing.assert_close(losses.sum(), loss)
    (quantized.square().mean() + losses.sum()).backward()
    (expected.square().mean() + loss).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    for stage, source in zip(vq.layers, dac.quantizer.quantizers, strict=True):  # type: ignore[call-overload]
        scale = source.codebook.weight.grad.abs().max()
        torch.testing.assert_close(
            stage.codebook.weight.grad, source.codebook.weight.grad, rtol=1e-3, atol=1e-4 * scale
        )


@pytest.mark.parametrize("format", ["diffusers", "taming", None])
@torch.no_grad()
def test_vq_model(vq_model: Any, format: Any) -> None:
    images = torch.randn(2, 3, 16, 16)
    latents = vq_model.encode(images).latents
    expected, _, (_, _, indices) = vq_model.quantize(latents)
    vq: Any = from_pretrained_codebook(vq_model.state_dict(), format)
    quantized, codes, _ = vq(latents)
    assert torch.equal(codes.flatten(), indices)
    torch.testing.assert_close(quantized, expected)
    entries = vq_model.quantize.get_codebook_entry(indices, (2, *latents.shape[2:], 3))
    torch.testing.assert_close(vq.get_output_from_indices(codes), entries)
    seen = vq_model.decode(latents).sample
    torch.testing.assert_close(vq_model.decode(quantized, force_not_quantize=True).sample, seen)


@torch.no_grad()
def test_vq_model_as_rows(vq_model: Any) -> None:
    z = torch.randn(2, 3, 4, 4)
    expected = vq_model.quantize(z)[2][2]
    vq = from_pretrained_codebook(vq_model.quantize.state_dict(), "taming", accept_image_fmap=False)
    assert torch.equal(vq(z.flatten(2).transpose(1, 2))[1].flatten(), expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@torch.no_grad()
def test_from_files(encodec: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    state = {key: value.contiguous().clone() for key, value in encodec.state_dict().items()}
    if suffix == ".pt":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        save_file(state, path)
    z = torch.randn(2, 12, 9)
    _, codes = quantize(from_pretrained_codebook(str(path), "encodec"), z)
    assert torch.equal(codes.transpose(0, 1), encodec.quantizer.encode(z))


def test_from_the_directory_of_a_model(vq_model: Any, encodec: Any, tmp_path: Path) -> None:
    for model, name in ((encodec, "encodec"), (vq_model, "vq_model")):
        model.save_pretrained(tmp_path / name)
    found: Any = [from_pretrained_codebook(tmp_path / name) for name in ("encodec", "vq_model")]
    assert torch.equal(found[0].codebooks[1], encodec.quantizer.layers[1].codebook.embed)
    assert torch.equal(found[1].codebook, vq_model.quantize.embedding.weight)


def test_half_precision_weights_give_float32_codes(encodec: Any) -> None:
    state = {key: value.half() if value.is_floating_point() else value for key, value in encodec.state_dict().items()}
    vq: Any = from_pretrained_codebook(state, "encodec")
    assert vq.layers[0]._codebook.embed.dtype == torch.float32
    assert torch.equal(vq.layers[0]._codebook.embed[0], encodec.quantizer.layers[0].codebook.embed.half().float())
