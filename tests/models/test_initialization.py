"""Initialisation by product quantization."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch
from helpers import threads
from torch import Tensor

from spinlock_fast.config.schema import LevelConfig
from spinlock_fast.kernels._common.single_thread import single_thread
from spinlock_fast.models.decoder_refit import refit_decoder
from spinlock_fast.models.initialization import allocate_components, component_bits, product_quantization_init
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig


def levels(*sizes: tuple[int, int]) -> list[LevelConfig]:
    return [LevelConfig(num_tokens=codes, latent_dim=dims) for codes, dims in sizes]


def independent_rows(rows: int, features: int) -> Tensor:
    """Independent uniform features of variance 1."""
    return (torch.rand(rows, features) - 0.5) * math.sqrt(12.0)


def make_model() -> CategoricalHierarchicalVQVAE:
    config = CategoricalVQVAEConfig(
        input_dim=9,
        group_indices={"a": [0, 2, 4, 6, 8, 7], "b": [1, 3, 5]},
        levels={"a": levels((16, 8), (8, 8), (4, 6)), "b": levels((8, 4), (4, 4), (3, 2))},
        group_hidden_dim=64,
        group_embedding_dim=32,
        dropout=0.5,
    )
    return CategoricalHierarchicalVQVAE(config)


def error(model: CategoricalHierarchicalVQVAE, x: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(x)["reconstruction"] - x).square().mean())


def test_bits_are_those_of_reverse_water_filling() -> None:
    variance = torch.tensor([1.0, 16.0, 4.0, 1e-9], dtype=torch.float64)
    # A level of 1/4: 1, 3 and 2 bits.
    torch.testing.assert_close(component_bits(variance, 6.0), torch.tensor([1.0, 3.0, 2.0, 0.0], dtype=torch.float64))
    # A level of 4: only the second is above.
    torch.testing.assert_close(component_bits(variance, 1.0), torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    assert component_bits(torch.zeros(3, dtype=torch.float64), 3.0).tolist() == [0.0, 0.0, 0.0]


def test_components_go_to_the_level_with_the_most_unused_bits() -> None:
    assert allocate_components([1.0, 3.0, 2.0, 0.0], levels((16, 8), (8, 8), (4, 8))) == [[1], [2], [0]]


def test_level_gets_no_more_components_than_dimensions_allow() -> None:
    assert allocate_components([2.0, 2.0, 2.0, 2.0], levels((256, 4), (2, 3))) == [[0, 1], [2]]


def test_product_init_beats_kmeans_and_uses_every_code() -> None:
    x, fresh = independent_rows(1500, 9), independent_rows(500, 9)
    plain = make_model()
    torch.manual_seed(1)
    plain.eval()
    plain.quantizer.initialize(plain.encode(x))
    start = make_model()
    product_quantization_init(start, x)
    assert error(start, fresh) < 0.45  # 1.5 bits a feature; the mean of the rows alone has 1
    start.eval()
    plain.eval()
    known = {}
    for name, model in (("plain", plain), ("start", start)):
        tokens = model.get_tokens(torch.cat([x, fresh]))
        inputs = torch.cat([torch.nn.functional.one_hot(column).float() for column in tokens.T], 1)
        weights = torch.linalg.lstsq(inputs[:1500].double(), x.double(), driver="gelsd").solution
        known[name] = float((inputs[1500:].double() @ weights - fresh).square().mean())
    assert known["start"] < 0.75 * known["plain"]  # the same linear decoder for both
    counts = start.quantizer.cluster_size
    assert bool((counts > 0).all())


def test_levels_code_different_components() -> None:
    """Each level codes its own components and none of another level."""
    x = independent_rows(3000, 9) * torch.tensor([3.0, 1, 1, 1, 2.0, 1, 1, 1, 1])
    model = make_model()
    product_quantization_init(model, x)
    tokens = model.get_tokens(x)
    explained = torch.stack([_explained(tokens[:, g], x[:, [0, 4]]) for g in range(3)])  # [3, 2]
    assert (explained.max(0).values > 0.6).all()
    assert (explained.sort(0).values[:2] < 0.2).all()


@torch.no_grad()
def test_initial_networks_are_linear() -> None:
    x, fresh = independent_rows(1500, 9), independent_rows(500, 9)
    model = make_model()
    product_quantization_init(model, x)
    embeddings = model.eval().category_mlp(model.encoder_inputs(torch.cat([x, fresh])))
    for embedding, members in zip(embeddings, model.config.inputs.values(), strict=True):
        known, wanted = (torch.cat([e, torch.ones(len(e), 1)], 1) for e in (embedding[:1500], embedding[1500:]))
        solution = torch.linalg.lstsq(known.double(), x[:, members].double(), driver="gelsd").solution
        assert float((wanted.double() @ solution - fresh[:, members]).square().mean()) < 0.01
    quantized = model.quantize(model.encode(x))[0]
    middle = 0.5 * (quantized[:100] + quantized[100:200])
    between = 0.5 * (model.decode(quantized[:100]) + model.decode(quantized[100:200]))
    torch.testing.assert_close(model.decode(middle), between, atol=1e-4, rtol=1e-4)


def test_uncategorised_feature_is_coded_by_its_reader() -> None:
    x, fresh = independent_rows(1500, 9), independent_rows(500, 9)
    errors = {}
    for read in (False, True):
        config = make_model().config.model_dump() | {"group_indices": {"a": [0, 2, 4, 6, 8, 7], "b": [1, 3]}}
        model = CategoricalHierarchicalVQVAE(
            CategoricalVQVAEConfig(**config | {"extra_inputs": {"b": [5]} if read else {}})
        )
        scale = torch.ones(9)
        scale[5] = 20.0
        model.fit_extra_inputs(*helpers.column_mean_std(x * scale))
        product_quantization_init(model, x * scale)
        with torch.no_grad():
            squared = (model.eval()(fresh * scale)["reconstruction"] - fresh * scale).square().mean(0)
        errors[read] = float(squared[5])
    assert errors[False] > 300.0
    assert errors[True] < 20.0


@pytest.mark.parametrize(("hidden", "embedding"), [(1, 1), (2, 3), (3, 5)])
def test_narrow_networks_are_initialised(hidden: int, embedding: int) -> None:
    config = make_model().config.model_dump() | {"group_hidden_dim": hidden, "group_embedding_dim": embedding}
    model = CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(**config))
    product_quantization_init(model, independent_rows(200, 9))
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def _explained(tokens: Tensor, x: Tensor) -> Tensor:
    """[columns] fraction of the variance explained by the means of the codes."""
    hot = torch.nn.functional.one_hot(tokens).to(x.dtype)
    means = hot.T @ x / hot.sum(0).clamp(min=1.0)[:, None]
    return 1.0 - (hot @ means - x).square().mean(0) / x.var(0)


def test_init_keeps_the_mode_and_depends_on_the_seed() -> None:
    x = independent_rows(200, 9)
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        model = make_model().train()
        product_quantization_init(model, x)
        assert model.training
        assert model.shared_decoder.training
        models.append(model)
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [20, 2])
def test_few_rows_and_constant_features_give_finite_weights(rows: int) -> None:
    x = independent_rows(rows, 9)
    x[:, [1, 3, 5]] = 0.5
    model = make_model()
    product_quantization_init(model, x)
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


def test_weights_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvectors and linear solves would differ by rounding, and training would amplify it."""
    used = []
    for name in ("eigh", "solve", "qr"):
        plain = getattr(torch.linalg, name)

        def watched(*arguments: Tensor, plain: Callable[..., Any] = plain) -> Any:
            used.append(torch.get_num_threads())
            return plain(*arguments)

        monkeypatch.setattr(torch.linalg, name, watched)
    x, found = independent_rows(300, 9), []
    for count in (1, 2, 4):
        with threads(count):
            torch.manual_seed(1)
            model = make_model()
            product_quantization_init(model, x)
            refit_decoder(model, x, 0.01)
            assert torch.get_num_threads() == count
        found.append(model.state_dict())
    assert len(used) > 9
    assert set(used) == {1}
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value, other[name]), name


def test_thread_count_is_restored_after_an_error() -> None:
    def fails() -> None:
        with single_thread(torch.device("cpu")):
            assert torch.get_num_threads() == 1
            raise ValueError("no")

    with threads(3):
        with pytest.raises(ValueError, match="no"):
            fails()
        assert torch.get_num_threads() == 3
