import helpers
import pytest
import torch
from helpers import distances, mean_distances, pearson

from spinlock_fast import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig, GroupedVectorQuantizer
from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.kernels.topo_loss import topographic_correlations, topographic_loss
from spinlock_fast.models.losses import (
    TOPO_PRE_WEIGHT,
    LossTerms,
    LossWeights,
    code_orthogonality,
    loss_terms,
)


def make_model(**options):
    torch.manual_seed(0)
    groups = {"a": [0, 1, 2, 3], "b": [4, 5, 6], "c": [7, 8, 9, 10]}
    plain = {"group_indices": groups, "group_embedding_dim": 8, "group_hidden_dim": 8, "dropout": 0.0}
    config = CategoricalVQVAEConfig(input_dim=11, **{**plain, **options})
    return CategoricalHierarchicalVQVAE(config).double()


def test_terms_against_the_formulas():
    model = make_model().eval()
    model.quantizer.embedding.normal_()
    x = torch.randn(30, 11, dtype=torch.float64)
    out = model(x)
    terms = loss_terms(model, x, out, topo_samples=20)
    layout, z, e = model.quantizer.layout, out["latents"], out["quantized"]

    torch.testing.assert_close(terms.reconstruction, ((out["reconstruction"] - x) ** 2).sum() / x.numel())
    vq = sum(
        0.25 * (a - b).square().mean()
        for a, b in zip(helpers.split_columns(z, layout), helpers.split_columns(e, layout), strict=True)
    )
    torch.testing.assert_close(terms.vq, vq)
    partial = model.partial_reconstructions(e)
    info = torch.stack([(partial[g] - x).square().mean() for g in range(9)]).mean()
    torch.testing.assert_close(terms.informativeness, info)
    torch.testing.assert_close(terms.orthogonality, orthogonality(model.quantizer))
    d_z = mean_distances(z[:20], layout)
    pre, post = pearson(distances(x[:20]), d_z), pearson(d_z, mean_distances(e[:20], layout))
    assert terms.topographic.item() == pytest.approx(0.3 * (1 - pre) + 0.7 * (1 - post), abs=1e-9)


def test_error_of_a_large_scale_extra_input_is_downweighted():
    model = make_model(
        group_indices={"a": [0, 1, 2, 3], "b": [4, 5, 6], "c": [7, 8, 9]}, extra_inputs={"b": [10]}
    ).eval()
    x = torch.randn(30, 11, dtype=torch.float64)
    x[:, 10] *= 20.0
    model.fit_extra_inputs(*helpers.column_mean_std(x))
    squared = (model(x)["reconstruction"] - x).square()
    squared[:, 10] /= x[:, 10].std(correction=0)
    terms = loss_terms(model, x, model(x), topo_samples=20)
    torch.testing.assert_close(terms.reconstruction, squared.mean())


def orthogonality(quantizer):
    """A loop over codebooks and pairs of codes."""
    per_book = []
    for g in range(quantizer.layout.groups):
        codes = quantizer.codebook(g)
        squares = [
            torch.cosine_similarity(codes[i], codes[j], dim=0) ** 2
            for i in range(len(codes))
            for j in range(len(codes))
            if i != j
        ]
        per_book.append(torch.stack(squares).mean() if squares else codes.new_zeros(()))
    return torch.stack(per_book).mean()


@pytest.mark.parametrize("sizes", [([5, 3, 8], [3, 2, 4]), ([1, 6], [4, 1]), ([1], [1])])
def test_orthogonality_against_a_loop(sizes):
    quantizer = GroupedVectorQuantizer(*sizes).double()
    torch.testing.assert_close(code_orthogonality(quantizer), orthogonality(quantizer))


@pytest.mark.parametrize(("rows", "expected"), [([[1.0, 0.0], [0.0, 2.0]], 0.0), ([[1.0, 1.0], [-3.0, -3.0]], 1.0)])
def test_orthogonality_of_known_codes(rows, expected):
    quantizer = GroupedVectorQuantizer([2], [2])
    quantizer.embedding.copy_(torch.tensor(rows).flatten())
    assert code_orthogonality(quantizer).item() == pytest.approx(expected)


def test_orthogonality_of_learned_codes_has_a_gradient():
    quantizer = GroupedVectorQuantizer([5, 1, 3], [3, 4, 2], use_ema=False).double()
    codebook = torch.randn(25, dtype=torch.float64)
    quantizer.embedding.data.copy_(codebook)
    code_orthogonality(quantizer).backward()
    step = 1e-6
    for i in range(25):
        values = []
        for sign in (1.0, -1.0):
            quantizer.embedding.data.copy_(codebook)
            quantizer.embedding.data[i] += sign * step
            values.append(code_orthogonality(quantizer).item())
        assert quantizer.embedding.grad[i].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-7)
    assert quantizer.embedding.grad.any()


def test_orthogonality_of_ema_codes_has_no_gradient():
    assert not code_orthogonality(GroupedVectorQuantizer([5], [3])).requires_grad


def test_orthogonality_of_a_zero_code_is_finite():
    quantizer = GroupedVectorQuantizer([3, 2], [2, 4], use_ema=False)
    quantizer.embedding.data[:2] = 0.0
    term = code_orthogonality(quantizer)
    term.backward()
    assert term.isfinite()
    assert quantizer.embedding.grad.isfinite().all()


def test_topographic_loss_is_weighted():
    model = make_model().eval()
    x = torch.randn(12, 11, dtype=torch.float64)
    out = model(x)
    sets = x, out["latents"], out["tokens"], out["codebook"], model.quantizer.layout
    pre, post = topographic_correlations(*sets)
    expected = 0.3 * (1.0 - pre) + 0.7 * (1.0 - post)
    torch.testing.assert_close(loss_terms(model, x, out, 12).topographic, expected)


@pytest.mark.parametrize("topo_samples", [2, 10, 100])
def test_topographic_term_uses_the_first_rows(topo_samples):
    model = make_model().eval()
    x = torch.randn(12, 11, dtype=torch.float64)
    out = model(x)
    n = min(topo_samples, 12)
    first = x[:n], out["latents"][:n], out["tokens"][:n]
    expected = topographic_loss(*first, out["codebook"], model.quantizer.layout, TOPO_PRE_WEIGHT)
    torch.testing.assert_close(loss_terms(model, x, out, topo_samples).topographic, expected)


@pytest.mark.parametrize("rotation_trick", [False, True])
def test_every_part_of_the_model_gets_a_finite_gradient(rotation_trick):
    model = make_model(rotation_trick=rotation_trick).train()
    x = torch.randn(30, 11, dtype=torch.float64)
    loss_terms(model, x, model(x), 16).total(LossWeights.of(TrainingConfig())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_batch_of_one_row_has_a_finite_loss():
    model = make_model(codebook_init="uniform").train()
    x = torch.randn(1, 11, dtype=torch.float64)
    total = loss_terms(model, x, model(x), 16).total(LossWeights.of(TrainingConfig()))
    total.backward()
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_default_weights_are_those_of_the_specification():
    assert LossWeights.of(TrainingConfig()) == (1.0, 1.0, 0.1, 0.1, 0.3)


def test_total_is_the_weighted_sum():
    terms = LossTerms(*(torch.tensor(v) for v in (1.0, 2.0, 3.0, 4.0, 5.0)))
    assert terms.total(LossWeights(1.0, 10.0, 0.1, 2.0, 0.5)).item() == pytest.approx(1 + 20 + 0.3 + 8 + 2.5)


def test_term_of_weight_zero_may_be_nonfinite():
    terms = LossTerms(*(torch.tensor(v) for v in (1.0, 2.0, float("nan"), float("inf"), 5.0)))
    assert terms.total(LossWeights(1.0, 1.0, 0.0, 0.0, 0.0)).item() == 3.0
    assert terms.total(LossWeights(0.0, 0.0, 0.0, 0.0, 0.0)).item() == 0.0


def test_nonfinite_row_makes_the_loss_nonfinite():
    model = make_model(codebook_init="uniform").eval()
    x = torch.randn(6, 11, dtype=torch.float64)
    x[2, 0] = torch.nan
    assert loss_terms(model, x, model(x), 16).reconstruction.isnan()


def test_step_operations_do_not_depend_on_values():
    model = make_model(codebook_init="uniform", dropout=0.1).float().train()
    x = torch.randn(30, 11)
    weights = LossWeights.of(TrainingConfig())

    def run():
        loss_terms(model, x, model(x), 16).total(weights).backward()

    with helpers.without_native_kernels():
        run()  # makes the index tensors
    with helpers.no_host_sync():
        run()
