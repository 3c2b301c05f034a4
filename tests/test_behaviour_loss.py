"""BehaviourLoss: the features of the tokenizer with exact gradients, a frozen tokenizer, and what is left out."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers import raises_one_line
from torch import Tensor, nn

from spinlock_fast import BehaviourLoss, CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig, Tokenizer
from spinlock_fast.config.schema import DEFAULT_DATASETS, ENCODER_PARAMS, FeatureCleaningConfig
from spinlock_fast.descriptors import describe
from spinlock_fast.descriptors.describe import Families
from spinlock_fast.descriptors.field_grid import FieldGrid
from spinlock_fast.descriptors.registry import aggregated_names, temporal_names
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.features.cleaning import fit_cleaner
from spinlock_fast.features.encode import FamilyEncoder
from spinlock_fast.features.encoders import build_encoder
from spinlock_fast.features.normalize import fit_normalizer
from spinlock_fast.features.statistics_encoder import StatisticsEncoder

GRID = FieldGrid((6, 8), (0.5, 0.25), (True, False), 0.1)
ARGUMENTS: dict[str, Any] = {"spacing": (0.5, 0.25), "periodic": (True, False), "time_step": 0.1}
TERMS = ("commitment", "latent", "reconstruction", "tokens")


def simulated(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random walks in time of random fields: [N, T, C, Y, X]."""
    random = torch.Generator().manual_seed(seed)
    scale = 0.5 + torch.rand(count, 1, 1, 1, 1, generator=random, dtype=torch.float64)
    steps = torch.randn(count, 9, 2, 6, 8, generator=random, dtype=torch.float64)
    return (scale * steps.cumsum(1)).to(dtype)


def family(name: str, encoder: str, rows: Tensor, columns: list[str]) -> FamilyEncoder:
    params = ENCODER_PARAMS[encoder]()
    built = build_encoder(tuple(rows.shape[1:]), params)
    names = None
    if isinstance(built, StatisticsEncoder):
        names = built.column_names(columns)
    elif encoder == "IdentityEncoder" and rows.ndim == 2:
        names = columns
    fill = rows.median(0).values
    made = FamilyEncoder(name, encoder, params, DEFAULT_DATASETS[name], tuple(rows.shape[1:]), built, fill=fill)
    made.column_names = names
    if encoder == "MLPEncoder":
        values = rows.reshape(-1, rows.shape[-1])
        made.center, made.scale = values.median(0).values, values.std(0) / 8.0 + 1e-6
    return made


def make_tokenizer(
    summary: str = "IdentityEncoder", temporal: str = "StatisticsEncoder", architecture: bool = False
) -> Tokenizer:
    """Fitted cleaning, normalisation and codes, with a random network: no training."""
    torch.manual_seed(0)
    raw: dict[str, Tensor] = dict(describe(simulated(48), "n t c y x", **ARGUMENTS))
    names = describe(simulated(1), "n t c y x", **ARGUMENTS).names
    if architecture:
        raw["architecture"] = torch.rand(48, 3)
        names["architecture"] = ["a", "b", "c"]
    encoders = {"summary": summary, "temporal": temporal, "architecture": "IdentityEncoder"}
    families = [family(name, encoders[name], rows, names[name]) for name, rows in raw.items()]
    columns = torch.cat([made(raw[made.name]) for made in families], 1).numpy()
    cleaner = fit_cleaner(columns, FeatureCleaningConfig())
    cleaned = cleaner(columns)
    normalizer = fit_normalizer(cleaned, "standard")
    kept = [name for name, keep in zip([n for f in families for n in f.names], cleaner.keep, strict=True) if keep]
    parts = {f"part_{i}": part.tolist() for i, part in enumerate(np.array_split(np.arange(len(kept)), 3))}
    sizes: dict[str, Any] = {"group_embedding_dim": 12, "group_hidden_dim": 16, "dropout": 0.3}
    model = CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(input_dim=len(kept), group_indices=parts, **sizes))
    model.train()(torch.from_numpy(normalizer(cleaned)))  # k-means
    return Tokenizer.from_parts(model.eval(), families, cleaner, normalizer, kept, field_grid=GRID)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.mark.parametrize(
    ("summary", "temporal"),
    [
        ("IdentityEncoder", "StatisticsEncoder"),
        ("MLPEncoder", "TemporalCNNEncoder"),
        ("IdentityEncoder", "MLPEncoder"),
        ("IdentityEncoder", "IdentityEncoder"),
    ],
)
def test_features_and_tokens_are_those_of_the_tokenizer(summary: str, temporal: str) -> None:
    tokenizer = make_tokenizer(summary, temporal)
    fields = simulated(12, seed=1)
    fields[3] *= 30.0  # outside of the clip bounds
    found = BehaviourLoss(tokenizer).encode(fields)
    raw = describe(fields, "n t c y x", **ARGUMENTS)
    expected = tokenizer.features(raw)
    at_bound = np.abs(tokenizer.normalizer.inverse(expected) - tokenizer.cleaner.high) < 1e-6
    assert at_bound.any()
    torch.testing.assert_close(found.features, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.tokens, tokenizer.encode(raw))
    assert found.finite.all()
    assert found.available.all()


def test_the_target_has_no_distance_from_itself_and_total_is_the_weighted_sum(tokenizer: Tokenizer) -> None:
    fields = simulated(6, seed=2)
    terms = BehaviourLoss(tokenizer)(fields, fields)
    assert set(terms) == {*TERMS, "total"}
    assert terms["latent"] == 0.0
    weights = {"tokens": 2.0, "latent": 0.5, "commitment": 0.0}
    found = BehaviourLoss(tokenizer, weights=weights)(simulated(6, seed=3), fields)
    assert set(found) == {*weights, "total"}
    assert float(found["total"]) == pytest.approx(2.0 * float(found["tokens"]) + 0.5 * float(found["latent"]))
    loss = BehaviourLoss(tokenizer)
    assert found["latent"] == loss(simulated(6, seed=3), loss.encode(fields))["latent"]  # a target computed before


def test_terms_have_their_formulas(tokenizer: Tokenizer) -> None:
    fields, target = simulated(4, seed=2), simulated(4, seed=3)
    loss = BehaviourLoss(tokenizer, temperature=0.7)
    found = loss(fields, target)
    model, a, b = tokenizer.model, loss.encode(fields), loss.encode(target)
    expected = dict.fromkeys(TERMS, 0.0)
    layout = model.quantizer.layout
    for g in range(layout.groups):
        columns, codes = layout.column_slice(g), model.quantizer.codebook(g)
        distance = torch.cdist(a.latents[:, columns], codes).square()
        apart = (codes[:, None] - codes).square().sum(2)
        spread = apart.masked_fill(apart < 1e-9, torch.inf).amin(1)
        spread = spread[torch.isfinite(spread)].mean() if torch.isfinite(spread).any() else torch.tensor(1.0)
        p = torch.softmax(-2.0 * distance / (0.7 * spread), 1).gather(1, b.tokens[:, g : g + 1])
        expected["commitment"] += float(distance.amin(1).mean()) / layout.dims[g] / layout.groups
        apart = (a.latents - b.latents)[:, columns].square()
        expected["latent"] += float(apart.mean()) / layout.groups
        expected["tokens"] -= float(p.log().mean()) / layout.groups
    decoded = model.decode_from_tokens(a.tokens)
    expected["reconstruction"] = float((decoded - a.features).square().mean())
    assert {name: float(found[name]) for name in TERMS} == pytest.approx(expected, rel=1e-3)


def test_gradients_are_those_of_differences(tokenizer: Tokenizer) -> None:
    loss = BehaviourLoss(tokenizer).double()
    target = loss.encode(simulated(2, seed=5, dtype=torch.float64))
    fields = simulated(2, seed=4, dtype=torch.float64).requires_grad_()

    def terms(x: Tensor) -> Tensor:
        found = loss(x, target)
        return torch.stack([found[name] for name in TERMS])

    assert terms(fields).dtype == torch.float64
    assert torch.autograd.gradcheck(terms, (fields,), eps=1e-7, atol=1e-4, rtol=1e-3, fast_mode=True)


def test_training_reduces_the_loss_and_leaves_the_tokenizer_as_it_is(tokenizer: Tokenizer) -> None:
    before = copy.deepcopy(tokenizer.model.state_dict())
    target = simulated(8, seed=6)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.amplitude = nn.Parameter(torch.tensor(3.0))
            self.loss = BehaviourLoss(tokenizer, weights={"latent": 1.0})

    model = Model().requires_grad_(True).train()
    assert [name for name, _ in model.named_parameters()] == ["amplitude"]
    assert list(model.state_dict()) == ["amplitude"]
    features, frozen = model.loss._frozen
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    losses = []
    for _ in range(25):
        loss = model.loss(model.amplitude * target, target)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
    assert abs(float(model.amplitude.detach()) - 1.0) < 0.2
    assert not any(module.training for part in (model.loss, features, frozen) for module in part.modules())
    for copied in (tokenizer.model.state_dict(), frozen.state_dict()):
        assert all(torch.equal(value, before[key]) for key, value in copied.items())
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in tokenizer.model.parameters())


def test_copies_and_pickles_give_the_same(tokenizer: Tokenizer) -> None:
    loss, fields = BehaviourLoss(tokenizer), simulated(3, seed=7)
    assert "summary::spectral_rolloff_mean" in loss.columns_without_gradient
    expected = loss(fields, fields.flip(0))["total"]
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.double().float()):
        assert torch.equal(other(fields, fields.flip(0))["total"], expected)


def test_autocast_and_half_precision_fields_are_described_in_float32(tokenizer: Tokenizer) -> None:
    loss, fields = BehaviourLoss(tokenizer), simulated(3, seed=7).bfloat16().requires_grad_()
    expected = loss(fields.detach().float(), fields.detach().float().flip(0))["total"]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(fields, fields.detach().flip(0))["total"]
    assert torch.equal(found, expected)
    found.backward()
    assert fields.grad is not None
    assert torch.isfinite(fields.grad).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20, 1e38])
def test_trajectories_that_are_not_finite_or_overflow_are_left_out(tokenizer: Tokenizer, value: float) -> None:
    loss, predicted, target = BehaviourLoss(tokenizer), simulated(4, seed=8), simulated(4, seed=9)
    kept = [0, 3]
    expected = loss(predicted[kept], target[kept])
    predicted[1, 4, 0, 2, 2] = value
    target[2, 0] = value
    predicted.requires_grad_()
    found = loss(predicted, target)
    assert loss.missing == 2
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    found["total"].backward()
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()
    assert predicted.grad.flatten(1).any(1).tolist() == [True, False, False, True]
    with raises_one_line(DataError, "none of 1 trajectories has finite descriptors"):
        loss(predicted[1:2], target[1:2])


def test_large_finite_predictions_have_a_finite_loss_and_a_gradient_back(tokenizer: Tokenizer) -> None:
    loss, target = BehaviourLoss(tokenizer, weights={"latent": 1.0}), simulated(4, seed=9)
    predicted = (1e4 * simulated(4, seed=8)).requires_grad_()
    found = loss(predicted, target)["total"]
    found.backward()
    assert loss.missing == 0
    assert torch.isfinite(found)
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()
    assert predicted.grad.any()


def test_categories_of_a_family_that_fields_do_not_give_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer(architecture=True)
    loss, fields, target = BehaviourLoss(tokenizer), simulated(5, seed=1), simulated(5, seed=2)
    parameters = np.random.default_rng(0).random((5, 3))
    raw = describe(fields, "n t c y x", **ARGUMENTS)
    whole = loss.encode(fields, {"architecture": parameters})
    assert torch.equal(whole.tokens, tokenizer.encode({**raw, "architecture": torch.from_numpy(parameters)}))
    assert loss.left_out(whole.available) == []
    with caplog.at_level(logging.WARNING):
        found = loss(fields, target)
        loss(fields, target)
    (message,) = [record.message for record in caplog.records]
    assert "values of architecture are not given" in message
    assert "part_2" in message
    without = loss.encode(fields)
    assert loss.left_out(without.available) == ["part_2"]
    kept = tokenizer.model.category_slice("part_2").start
    assert torch.equal(whole.tokens[:, :kept], without.tokens[:, :kept])
    # The terms do not depend on the values of the category that is left out.
    dims = sum(tokenizer.model.quantizer.dims[:kept])
    apart = (loss.encode(fields).latents - loss.encode(target).latents).square()
    by_codebook = [part.mean() for part in apart[:, :dims].split(list(tokenizer.model.quantizer.dims[:kept]), 1)]
    torch.testing.assert_close(found["latent"], torch.stack(by_codebook).mean())
    with torch.no_grad():
        errors = (without.features - tokenizer.model.decode(without.codes)).square()
    known = without.available
    assert 0 < int(known.sum()) < len(known)
    torch.testing.assert_close(found["reconstruction"], errors[:, known].mean())
    only = copy.deepcopy(tokenizer)
    only.families = [family("architecture", "IdentityEncoder", torch.rand(9, 3), ["a", "b", "c"])]
    only.cleaner = fit_cleaner(np.random.default_rng(0).random((9, 3), np.float32), FeatureCleaningConfig())
    only.normalizer = fit_normalizer(np.random.default_rng(0).random((9, 3), np.float32), "standard")
    only.feature_names = ["architecture::a", "architecture::b", "architecture::c"]
    only.model = CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(input_dim=3, group_indices={"a": [0, 1, 2]}))
    with raises_one_line(DataError, "values of architecture are not given", "every category reads them"):
        BehaviourLoss(only)(fields, target)


def test_columns_that_fields_do_not_give_are_taken_from_families() -> None:
    tokenizer = make_tokenizer()
    raw = describe(simulated(5, seed=1), "n t c y x", **ARGUMENTS)
    names = raw.names["summary"]

    def part(x: Tensor) -> Families:
        found = describe(x, "n t c y x", **ARGUMENTS)
        columns = {"summary": names[:-7][::-1], "temporal": found.names["temporal"]}
        return Families({"summary": found["summary"][:, :-7].flip(1), "temporal": found["temporal"]}, columns)

    loss = BehaviourLoss(tokenizer, part)
    fields = simulated(5, seed=1)
    found = loss.encode(fields, {"summary": raw["summary"]})
    assert torch.equal(found.tokens, tokenizer.encode(raw))
    available = loss.encode(fields).available
    lost = [tokenizer.feature_names[i] for i, known in enumerate(available.tolist()) if not known]
    assert lost == [f"summary::{name}" for name in names[-7:] if f"summary::{name}" in tokenizer.feature_names]
    with raises_one_line(DataError, "family 'summary': expected"):
        loss.encode(fields, {"summary": raw["summary"][:, 1:]})
    with raises_one_line(DataError, "'summary' is computed from the fields"):
        BehaviourLoss(tokenizer).encode(fields, {"summary": raw["summary"]})


def test_wrong_input_gives_one_clear_line(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    fields, target = simulated(3, seed=1), simulated(3, seed=2)
    loss = BehaviourLoss(tokenizer)
    for arguments, message in (
        ({"weights": {"latents": 1.0}}, "weights: 'latents' is none of the terms"),
        ({"weights": {"latent": -1.0}}, "latent must be at least 0"),
        ({"weights": {}}, "name at least one of the terms"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"descriptors": {"step": 1.0}}, "descriptors: 'step' is none of axes, spacing"),
    ):
        with raises_one_line(ConfigError, message):
            BehaviourLoss(tokenizer, **arguments)
    for call, message in (
        (lambda: loss(fields, target[:2]), "predicted_fields is [3"),
        (lambda: loss(fields[:2], loss.encode(target)), "predicted_fields has 2 trajectories, target_fields 3"),
        (lambda: loss(fields[:, :8], target[:, :8]), "family 'temporal': expected [3, 9, "),
        (lambda: loss(fields[:, :, :1], target[:, :, :1]), "channels, axes and realizations must be the same"),
        (lambda: loss(fields[..., ::2], target[..., ::2]), "6 x 4 points, those of the tokenizer 6 x 8"),
        (lambda: loss(fields.long(), target.long()), "floating-point"),
        (lambda: loss(fields, target, {"theta": target}), "'theta' is none of summary, temporal"),
        (lambda: BehaviourLoss(tokenizer, weights={"latent": 1.0})(fields), "target_fields: needed for the terms lat"),
    ):
        with raises_one_line(DataError, message):
            call()
    with pytest.raises(ValueError, match="name them"):
        loss(fields[0], target[0])
    assert set(loss(fields)) == {"commitment", "reconstruction", "total"}
    unknown = copy.copy(tokenizer)
    unknown.field_grid = None
    with caplog.at_level(logging.WARNING):
        BehaviourLoss(unknown, ARGUMENTS)
        assert not caplog.records
        BehaviourLoss(unknown)
    assert "does not record the grid of its fields: spacing, periodic, time_step" in caplog.text


@pytest.mark.gpu
def test_a_cuda_device_gives_the_same_loss(tokenizer: Tokenizer) -> None:
    fields, target = simulated(6, seed=1), simulated(6, seed=2)
    found = {}
    for device in ("cpu", "cuda"):
        predicted = fields.to(device).requires_grad_()
        terms = BehaviourLoss(tokenizer).to(device)(predicted, target.to(device))
        terms["total"].backward()
        assert predicted.grad is not None
        found[device] = [*(terms[name].detach().cpu() for name in TERMS), predicted.grad.cpu()]
    for own, other in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(own, other, rtol=2e-2, atol=2e-3)
    with raises_one_line(DataError, "fields are on cuda:0, the loss on cpu"):
        BehaviourLoss(tokenizer)(fields.cuda(), target.cuda())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_a_compiled_surrogate_and_a_compiled_step(tokenizer: Tokenizer) -> None:
    target = simulated(4, seed=2)
    surrogate = nn.Conv2d(2, 2, 3, padding=1)
    loss = BehaviourLoss(tokenizer)

    def step(x: Tensor) -> Tensor:
        predicted = x + surrogate(x.flatten(0, 1)).view_as(x)
        return loss(predicted, target)["total"]

    expected = torch.autograd.grad(step(target), list(surrogate.parameters()))
    found = torch.autograd.grad(torch.compile(step, backend="aot_eager")(target), list(surrogate.parameters()))
    for own, other in zip(expected, found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("encoder", ["IdentityEncoder", "MLPEncoder"])
def test_descriptors_of_the_operator_are_given_or_left_out(encoder: str) -> None:
    """The families of a file of `generate`: 3 channels, realizations, and columns that only the operator gives."""
    fields = torch.randn(6, 2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0)).cumsum(2)
    described = describe(fields, "n m t c y x")
    own = torch.rand(6, 360, generator=torch.Generator().manual_seed(1))
    place = {name: i for i, name in enumerate(described.names["summary"])}
    for i, name in enumerate(aggregated_names()):
        if name in place:
            own[:, i] = described["summary"][:, place[name]]
    raw = {"summary": own, "temporal": described["temporal"]}
    torch.manual_seed(0)
    families = [
        family("summary", encoder, raw["summary"], aggregated_names()),
        family("temporal", "TemporalCNNEncoder", raw["temporal"], temporal_names()),
    ]
    columns = torch.cat([made(raw[made.name]) for made in families], 1).numpy()
    cleaner = fit_cleaner(columns, FeatureCleaningConfig())
    normalizer = fit_normalizer(cleaner(columns), "standard")
    kept = [name for name, keep in zip([n for f in families for n in f.names], cleaner.keep, strict=True) if keep]
    groups = {kind: [i for i, name in enumerate(kept) if name.startswith(kind)] for kind in ("summary", "temporal")}
    model = CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(input_dim=len(kept), group_indices=groups)).eval()
    tokenizer = Tokenizer.from_parts(model, families, cleaner, normalizer, kept)
    loss = BehaviourLoss(tokenizer, {"axes": "n m t c y x", "spacing": 1.0, "periodic": True, "time_step": 1.0})
    whole = loss.encode(fields, {"summary": own})
    torch.testing.assert_close(whole.features, torch.from_numpy(tokenizer.features(raw)), rtol=1e-3, atol=1e-3)
    available = loss.encode(fields).available
    assert loss.left_out(available) == ["summary"]
    lost = [name for name, known in zip(kept, available.tolist(), strict=True) if not known]
    assert lost == [
        name for name in kept if ("operator_sensitivity" in name or encoder == "MLPEncoder") and "summ" in name
    ]
