import helpers
import pytest
import torch

from spinlock_fast.kernels.layout import CodebookLayout
from spinlock_fast.quantize import kmeans as module
from spinlock_fast.quantize.kmeans import kmeans

LAYOUT = CodebookLayout.of([4, 7, 2], [3, 2, 5])


def clustered(layout: CodebookLayout, per_code: int, seed: int = 0):
    """Rows in well separated clusters, one per code of each codebook, and the cluster centres."""
    generator = torch.Generator().manual_seed(seed)
    rows = per_code * 28  # a multiple of every K above
    parts, centres = [], []
    for k, d in zip(layout.num_codes, layout.dims, strict=True):
        centre = torch.zeros(k, d)
        centre[:, 0] = 100.0 * torch.arange(k)
        label = torch.randperm(rows, generator=generator) % k
        parts.append(centre[label] + 0.1 * torch.randn(rows, d, generator=generator))
        centres.append(centre)
    return torch.cat(parts, 1), centres


@pytest.mark.parametrize("seed", range(5))
def test_separated_clusters_are_found_in_every_codebook(seed):
    z, centres = clustered(LAYOUT, 10, seed)
    codebook, counts = kmeans(z, LAYOUT, generator=torch.Generator().manual_seed(seed))
    for g, (book, centre) in enumerate(zip(helpers.split_codebooks(codebook, LAYOUT), centres, strict=True)):
        found = book[book[:, 0].argsort()]
        # The mean of at least 40 rows of standard deviation 0.1.
        torch.testing.assert_close(found, centre, rtol=0, atol=0.1)
        assert counts[LAYOUT.code_slice(g)].tolist() == [280 // LAYOUT.num_codes[g]] * LAYOUT.num_codes[g]


def test_converged_codes_are_means_of_their_rows():
    z, _ = clustered(LAYOUT, 4)
    codebook, _ = kmeans(z, LAYOUT)
    again, _ = kmeans(z, LAYOUT, iterations=20, generator=torch.Generator().manual_seed(1))
    order = [b[b[:, 0].argsort()] for b in helpers.split_codebooks(codebook, LAYOUT)]
    other = [b[b[:, 0].argsort()] for b in helpers.split_codebooks(again, LAYOUT)]
    for a, b in zip(order, other, strict=True):
        torch.testing.assert_close(a, b)


def test_more_iterations_do_not_raise_the_error():
    z, _ = helpers.random_group(LAYOUT, 200, seed=0)
    errors = []
    for iterations in (0, 1, 5, 20):
        codebook, _ = kmeans(z, LAYOUT, iterations, torch.Generator().manual_seed(3))
        errors.append(sum(d.min(1).values.sum().item() for d in helpers.distances64(z, codebook, LAYOUT)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_seeds_are_rows():
    z, _ = helpers.random_group(LAYOUT, 30, seed=0)
    codebook, _ = kmeans(z, LAYOUT, iterations=0)
    for part, book in zip(helpers.split_columns(z, LAYOUT), helpers.split_codebooks(codebook, LAYOUT), strict=True):
        which = (book[:, None] == part).all(-1)
        assert (which.sum(1) == 1).all()
        assert which.any(0).sum() == book.shape[0]


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_rows_than_codes_leave_codes_on_rows(rows):
    z, _ = helpers.random_group(LAYOUT, rows, seed=0)
    codebook, counts = kmeans(z, LAYOUT)
    assert codebook.isfinite().all()
    for g, distance in enumerate(helpers.distances64(z, codebook, LAYOUT)):
        if LAYOUT.num_codes[g] >= rows:
            assert distance.min(1).values.max() < 1e-10
        assert counts[LAYOUT.code_slice(g)].sum() == rows


def test_equal_rows():
    codebook, counts = kmeans(torch.ones(6, LAYOUT.total_dims), LAYOUT)
    assert torch.equal(codebook, torch.ones(LAYOUT.total_entries))
    assert counts.sum() == 18


def test_nonfinite_rows_are_left_out():
    z, _ = helpers.random_group(LAYOUT, 40, seed=0)
    dirty = torch.cat([z, torch.full((3, LAYOUT.total_dims), torch.nan), torch.full((2, LAYOUT.total_dims), torch.inf)])
    clean = kmeans(z, LAYOUT, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(kmeans(dirty, LAYOUT, generator=torch.Generator().manual_seed(0)), clean, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_finite_row_is_an_error(rows):
    with pytest.raises(ValueError, match="finite"):
        kmeans(torch.full((rows, LAYOUT.total_dims), torch.nan), LAYOUT)


def test_generator_makes_kmeans_repeatable():
    z, _ = helpers.random_group(LAYOUT, 40, seed=0)
    results = []
    for noise in range(2):
        torch.manual_seed(noise)
        results.append(kmeans(z, LAYOUT, generator=torch.Generator().manual_seed(5))[0])
    assert torch.equal(*results)


def test_large_codebooks_are_seeded_with_distinct_rows(monkeypatch):
    monkeypatch.setattr(module, "_MAX_PLUS_PLUS_CODES", 3)
    z, _ = helpers.random_group(LAYOUT, 30, seed=0)
    codebook, _ = kmeans(z, LAYOUT, iterations=0)
    for book in helpers.split_codebooks(codebook, LAYOUT):
        assert len(book.unique(dim=0)) == len(book)
    few, counts = kmeans(z[:2], LAYOUT)
    assert few.isfinite().all()
    assert counts.sum() == 6


def test_half_precision_rows_give_float32_codes():
    z, _ = helpers.random_group(LAYOUT, 40, seed=0)
    codebook, counts = kmeans(z.half(), LAYOUT)
    assert codebook.dtype == counts.dtype == torch.float32
