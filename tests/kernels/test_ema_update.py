import helpers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.dead_codes import reset_dead_codes
from spinlock_fast.kernels.ema_update import code_usage, ema_update
from spinlock_fast.kernels.vq_assign import vq_assign

LAYOUT = CodebookLayout.of([5, 1, 8, 12], [3, 4, 1, 6])
CPU = torch.device("cpu")


def expand(per_code: torch.Tensor, layout: CodebookLayout) -> torch.Tensor:
    """[sum K] -> [sum K D]."""
    return per_code[layout.indices(CPU).code_of_entry]


def start(layout, seed=0, dtype=torch.float32):
    """Consistent codebook, cluster_size and code_sum."""
    _, codebook = helpers.random_group(layout, 0, seed=seed, dtype=dtype)
    n = 1.0 + 9.0 * torch.rand(layout.total_codes, dtype=dtype)
    return codebook, n, codebook * expand(n, layout)


def formula(codebook, n, s, counts, sums, layout, decay, smoothing, epsilon=1e-5):
    """The update of `reference.ema_update`, codebook by codebook in float64."""
    e, n, s = (t.double().numpy().copy() for t in (codebook, n, s))
    for g in range(layout.groups):
        codes, entries = layout.code_slice(g), layout.entry_slice(g)
        batch = counts[codes].double().numpy()
        if batch.sum() == 0:
            continue
        shape = (layout.num_codes[g], layout.dims[g])
        n[codes] = decay * n[codes] + (1 - decay) * batch
        s[entries] = decay * s[entries] + (1 - decay) * sums[entries].double().numpy()
        total, K = n[codes].sum(), layout.num_codes[g]
        updated = n[codes] > 1e-5 * total / K
        if smoothing == "laplace":
            n[codes] = (n[codes] + epsilon) / (total + K * epsilon) * total
            updated[:] = True
        vectors = e[entries].reshape(shape)
        vectors[updated] = s[entries].reshape(shape)[updated] / n[codes][updated, None]
        e[entries] = vectors.ravel()
    return e, n, s


@pytest.mark.parametrize("smoothing", ["none", "laplace"])
@pytest.mark.parametrize("decay", [0.0, 0.8, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_steps_match_the_formula(smoothing, decay, dtype):
    state = start(LAYOUT, dtype=dtype)
    expected = state
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    for step in range(10):
        z, _ = helpers.random_group(LAYOUT, 7, seed=step, dtype=dtype)
        z[: step % 3, LAYOUT.column_slice(2)] = torch.nan
        actual = vq_assign(z, state[0], LAYOUT)
        before = formula(*expected, actual.counts, actual.sums, LAYOUT, decay, smoothing)
        expected = tuple(torch.from_numpy(part) for part in before)
        ema_update(*state, actual.counts, actual.sums, LAYOUT, decay, smoothing)
        for ours, theirs in zip(state, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, **tolerance)


def test_idle_codes_keep_their_value():
    layout = CodebookLayout.of([3], [2])
    codebook, n, s = start(layout)
    idle = codebook[4:].clone()
    counts = torch.tensor([5.0, 2.0, 0.0])
    for _ in range(2000):
        ema_update(codebook, n, s, counts, codebook.clone() * expand(counts, layout), layout, 0.99)
    assert n[2] < 1e-6
    torch.testing.assert_close(codebook[4:], idle, rtol=1e-3, atol=0)
    assert codebook.isfinite().all()


def test_unused_codes_are_unchanged():
    layout = CodebookLayout.of([2], [2])
    codebook = torch.tensor([1.0, 2.0, 3.0, 4.0])
    n, s = torch.tensor([4.0, 0.0]), torch.tensor([4.0, 8.0, 0.0, 0.0])
    ema_update(codebook, n, s, torch.tensor([3.0, 0.0]), torch.tensor([3.0, 6.0, 0.0, 0.0]), layout, 0.9)
    assert codebook[2:].tolist() == [3.0, 4.0]


def test_idle_codes_are_updated_when_used_again():
    layout = CodebookLayout.of([2], [1])
    codebook, n, s = torch.tensor([1.0, 3.0]), torch.tensor([4.0, 0.0]), torch.tensor([4.0, 0.0])
    ema_update(codebook, n, s, torch.tensor([0.0, 2.0]), torch.tensor([0.0, 10.0]), layout, 0.9)
    torch.testing.assert_close(codebook, torch.tensor([1.0, 5.0]))


@pytest.mark.parametrize("smoothing", ["none", "laplace"])
def test_a_batch_without_valid_rows_changes_nothing(smoothing):
    state = start(LAYOUT)
    before = [part.clone() for part in state]
    z = torch.full((4, LAYOUT.total_dims), torch.nan)
    actual = vq_assign(z, state[0], LAYOUT)
    ema_update(*state, actual.counts, actual.sums, LAYOUT, 0.9, smoothing)
    for now, then in zip(state, before, strict=True):
        assert torch.equal(now, then)


def test_a_codebook_without_valid_rows_is_unchanged_while_others_are_updated():
    state = start(LAYOUT)
    before = [part.clone() for part in state]
    z, _ = helpers.random_group(LAYOUT, 6, seed=1)
    z[:, LAYOUT.column_slice(2)] = torch.nan
    actual = vq_assign(z, state[0], LAYOUT)
    ema_update(*state, actual.counts, actual.sums, LAYOUT, 0.9)
    codes, entries = LAYOUT.code_slice(2), LAYOUT.entry_slice(2)
    assert torch.equal(state[0][entries], before[0][entries])
    assert torch.equal(state[1][codes], before[1][codes])
    assert not torch.equal(state[0][LAYOUT.entry_slice(3)], before[0][LAYOUT.entry_slice(3)])


@given(st.lists(st.integers(0, 50), min_size=LAYOUT.total_codes, max_size=LAYOUT.total_codes))
def test_utilization_and_perplexity_against_the_definition(counts):
    counts = np.array(counts, dtype=np.float64)
    ours = code_usage(torch.tensor(counts), LAYOUT)
    for g in range(LAYOUT.groups):
        part = counts[LAYOUT.code_slice(g)]
        share = part[part > 0] / max(part.sum(), 1.0)
        assert ours[0][g] == pytest.approx(len(share) / len(part))
        assert ours[1][g] == pytest.approx(np.exp(-(share * np.log(share)).sum()) if len(share) else 0.0)
        assert ours[0][g] <= 1.0
        assert ours[1][g] <= len(part) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("counts", "used", "effective"),
    [([7, 7, 7, 7], 1.0, 4.0), ([9, 0, 0, 0], 0.25, 1.0), ([3, 3, 0, 0], 0.5, 2.0), ([0, 0, 0, 0], 0.0, 0.0)],
)
def test_known_utilization_and_perplexity(counts, used, effective):
    layout = CodebookLayout.of([4], [2])
    utilization, perplexity = code_usage(torch.tensor(counts, dtype=torch.float32), layout)
    assert utilization.item() == used
    assert perplexity.item() == pytest.approx(effective)


def with_dead_codes(dead: int, K: int = 12, D: int = 3):
    """A codebook whose first `dead` codes are rarely used, and a second one without dead codes."""
    layout = CodebookLayout.of([K, 4], [D, 2])
    codebook, n, _ = start(layout)
    n[:dead] = 1e-3 * torch.arange(dead, 0, -1)
    return layout, codebook, n, codebook * expand(n, layout)


@pytest.mark.parametrize("strategy", ["perturb", "sample"])
@pytest.mark.parametrize(
    ("dead", "fraction", "replaced"), [(2, 0.25, 2), (7, 0.25, 3), (7, 0.5, 6), (7, 0.0, 0), (0, 1.0, 0)]
)
def test_dead_codes_are_replaced_up_to_the_fraction(strategy, dead, fraction, replaced):
    layout, codebook, n, s = with_dead_codes(dead)
    before, n_before, s_before = codebook.clone(), n.clone(), s.clone()
    latents, _ = helpers.random_group(layout, 50, seed=2)
    count = reset_dead_codes(codebook, n, s, layout, 0.05, strategy, fraction, latents)
    assert count.tolist() == [replaced, 0]
    # The least used are replaced first: usage decreases with the index, so these are dead - replaced .. dead - 1.
    replaced_codes = torch.zeros(layout.total_codes, dtype=torch.bool)
    replaced_codes[dead - replaced : dead] = True
    mean = n_before[:12].mean()
    assert torch.equal(n[~replaced_codes], n_before[~replaced_codes])
    torch.testing.assert_close(n[replaced_codes], mean.expand(replaced))
    entry = expand(replaced_codes, layout)
    assert torch.equal(codebook[~entry], before[~entry])
    assert torch.equal(s[~entry], s_before[~entry])
    torch.testing.assert_close(s[entry], mean * codebook[entry])
    assert (codebook[entry] != before[entry]).all()


def test_codes_are_dead_below_the_threshold_of_the_mean_count():
    layout = CodebookLayout.of([4], [1])
    codebook, s = torch.arange(4.0), torch.zeros(4)
    n = torch.tensor([0.19, 0.21, 4.0, 11.6])  # mean 4
    reset_dead_codes(codebook, n, s, layout, 0.05, "perturb", 1.0)
    assert n.tolist() == pytest.approx([4.0, 0.21, 4.0, 11.6])


def test_small_codebooks_never_exceed_the_fraction():
    layout = CodebookLayout.of([3, 4], [2, 2])
    codebook, _, s = start(layout)
    n = torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 9.0])
    assert reset_dead_codes(codebook, n, s, layout, 0.05, "perturb", 0.25).tolist() == [0, 1]


def test_perturbed_copies_without_noise_are_the_most_used_codes():
    layout, codebook, n, s = with_dead_codes(3)
    n[5], n[9] = 40.0, 30.0
    before = codebook.clone()
    reset_dead_codes(codebook, n, s, layout, 0.05, "perturb", 0.25, noise=0.0)
    vectors, old = codebook[:36].view(12, 3), before[:36].view(12, 3)
    # Code 2 is used least, then 1, then 0.
    assert torch.equal(vectors[2], old[5])
    assert torch.equal(vectors[1], old[9])
    third = n[3:12].topk(3).indices[2] + 3
    assert torch.equal(vectors[0], old[third])


def test_noise_scales_with_the_standard_deviation_of_the_codes():
    K, D = 400, 2
    layout = CodebookLayout.of([K], [D])
    codes = torch.randn(K, D) * torch.tensor([1.0, 100.0])
    codes[300:] = 0.0  # the codes that are copied
    n = torch.ones(K)
    n[:100], n[300:] = 0.0, 5.0
    codebook = codes.flatten().clone()
    reset_dead_codes(codebook, n, codebook.clone(), layout, 0.05, "perturb", 0.25, noise=0.1)
    noise = codebook.view(K, D)[:100].std(0)
    torch.testing.assert_close(noise, 0.1 * codes.std(0), rtol=0.25, atol=0)


def test_samples_are_distinct_finite_rows():
    layout, codebook, n, s = with_dead_codes(3)
    latents, _ = helpers.random_group(layout, 20, seed=2)
    latents[::2, 0] = torch.nan
    reset_dead_codes(codebook, n, s, layout, 0.05, "sample", 0.25, latents)
    rows = [latents[:, :3].eq(code).all(1).nonzero().flatten().tolist() for code in codebook[:9].view(3, 3)]
    assert all(len(row) == 1 and row[0] % 2 == 1 for row in rows)
    assert len({row[0] for row in rows}) == 3


@pytest.mark.parametrize("rows", [1, 2])
def test_samples_from_fewer_rows_than_codes(rows):
    layout, codebook, n, s = with_dead_codes(3)
    latents, _ = helpers.random_group(layout, rows, seed=2)
    assert reset_dead_codes(codebook, n, s, layout, 0.05, "sample", 0.25, latents)[0] == 3
    for code in codebook[:9].view(3, 3):
        assert latents[:, :3].eq(code).all(1).any()


@pytest.mark.parametrize("rows", [0, 4])
def test_no_code_is_replaced_without_a_finite_latent(rows):
    layout, codebook, n, s = with_dead_codes(3)
    before = codebook.clone(), n.clone(), s.clone()
    latents = torch.full((rows, layout.total_dims), torch.nan)
    assert not reset_dead_codes(codebook, n, s, layout, 0.05, "sample", 0.25, latents).any()
    for now, then in zip((codebook, n, s), before, strict=True):
        assert torch.equal(now, then)


def test_sampling_needs_latents():
    layout, codebook, n, s = with_dead_codes(3)
    with pytest.raises(ValueError, match="latents"):
        reset_dead_codes(codebook, n, s, layout, strategy="sample")


@pytest.mark.parametrize("strategy", ["perturb", "sample"])
def test_a_generator_makes_resets_repeatable(strategy):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        layout, codebook, n, s = with_dead_codes(3)
        latents, _ = helpers.random_group(layout, 50, seed=2)
        torch.manual_seed(len(results))
        generator = torch.Generator().manual_seed(7)
        reset_dead_codes(codebook, n, s, layout, strategy=strategy, latents=latents, generator=generator)
        results.append(codebook)
    assert torch.equal(*results)


def test_an_unused_codebook_is_unchanged():
    layout = CodebookLayout.of([4], [2])
    codebook, _, s = start(layout)
    assert not reset_dead_codes(codebook, torch.zeros(4), s, layout).any()


def test_perplexity_of_fractional_counts():
    layout = CodebookLayout.of([4, 2], [1, 1])
    counts = torch.tensor([0.1, 0.1, 0.0, 0.0, 1e-6, 0.0])
    torch.testing.assert_close(code_usage(counts, layout)[1], torch.tensor([2.0, 1.0]))


def test_perturbed_codes_are_copies_of_live_codes():
    layout = CodebookLayout.of([16], [2])
    codebook = torch.arange(32.0)
    n = torch.zeros(16)
    n[[5, 9]] = torch.tensor([30.0, 20.0])
    reset_dead_codes(codebook, n, torch.zeros(32), layout, noise=0.0)
    codes = codebook.view(16, 2)
    replaced = [i for i in range(16) if codes[i].tolist() != [2.0 * i, 2.0 * i + 1]]
    assert len(replaced) == 4
    copied = sorted(codes[i].tolist() for i in replaced)
    assert copied == [[10.0, 11.0], [10.0, 11.0], [18.0, 19.0], [18.0, 19.0]]
