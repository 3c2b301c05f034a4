"""Joint search of codes: the reference against its definition, the native kernels against the reference."""

import helpers
import pytest
import torch

from spinlock_fast import _native
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.joint_search import Decoder, joint_search
from spinlock_fast.kernels.joint_search.reference import code_tables

LAYOUTS = {
    "one": CodebookLayout.of([5], [3]),
    "small": CodebookLayout.of([3, 1, 4], [2, 3, 1]),
    "wide": CodebookLayout.of([40, 7, 17, 24], [6, 4, 9, 3]),
}
# Rows, features, hidden units: below and above the sizes of lanes, lower bounds and padding.
SIZES = [(1, 3, 5), (37, 20, 16), (50, 70, 100)]


@pytest.fixture(params=["reference", *_native.instruction_sets()])
def backend(request):
    """Each implementation, with the native kernels of each instruction set."""
    if request.param == "reference":
        yield "reference"
        return
    _native.use_instruction_set(request.param)
    yield "auto"
    _native.use_instruction_set(_native.instruction_sets()[0])


def problem(layout, rows, features, hidden, dtype=torch.float32, seed=0, linear=False):
    """Rows x that some codes nearly reconstruct, other codes where the search starts, the codebook and a decoder.

    With `linear`, the codes also add to the output.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    codebook = normal(layout.total_entries)
    decoder = Decoder(normal(layout.total_dims, hidden), normal(hidden), normal(hidden, features), normal(features))
    if linear:
        decoder = decoder._replace(linear=2.0 * hidden**0.5 * normal(layout.total_codes, features))
    codes = [torch.stack([torch.randint(k, (rows,), generator=generator) for k in layout.num_codes], 1) for _ in "ab"]
    x = decoded(codes[0], codebook, decoder, layout) + 0.5 * normal(rows, features)
    cast = Decoder(*(None if part is None else part.to(dtype) for part in decoder))
    return x.to(dtype), codes[1], codebook.to(dtype), cast


def decoded(codes, codebook, decoder, layout):
    """The reconstruction of codes [B, G], in float64."""
    vectors = [codebook[layout.entry_slice(g)].view(layout.num_codes[g], -1)[codes[:, g]] for g in range(layout.groups)]
    w1, b1, w2, b2 = (part.double() for part in decoder[:4])
    features = (torch.cat(vectors, 1).double() @ w1 + b1).relu() @ w2 + b2
    if decoder.linear is None:
        return features
    return features + decoder.linear[codes + layout.indices(codes.device).code_offsets].double().sum(1)


def errors(x, codes, codebook, decoder, layout):
    return (decoded(codes, codebook, decoder, layout) - x.double()).square().sum(1)


def coordinate_descent(x, codes, codebook, decoder, layout, sweeps, latents=None, weight=0.0):
    """The search by its definition, row by row and in float64."""
    cost = [torch.zeros(len(x), k, dtype=torch.float64) for k in layout.num_codes]
    if weight:
        cost = [weight * part.double() for part in helpers.distances64(latents, codebook, layout)]
    found = codes.clone()
    for i in range(len(x)):
        for g in [*range(layout.groups)] * sweeps:
            tried = found[i].repeat(layout.num_codes[g], 1)
            tried[:, g] = torch.arange(layout.num_codes[g])
            found[i] = tried[(errors(x[i], tried, codebook, decoder, layout) + cost[g][i]).argmin()]
    return found


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_is_coordinate_descent(backend, layout, size, linear):
    x, codes, codebook, decoder = problem(layout, *size, linear=linear)
    assert (errors(x, codes, codebook, decoder, layout) > 1.0).all()  # far from any tolerance
    for sweeps in (1, 2):
        expected = coordinate_descent(x, codes, codebook, decoder, layout, sweeps)
        found = joint_search(x, codes, codebook, decoder, layout, sweeps, backend=backend)
        assert torch.equal(found, expected)
    assert not torch.equal(found, codes) or layout.total_codes < 10


@pytest.mark.parametrize("linear", [False, True])
def test_error_does_not_increase(backend, linear):
    # Latents of many nearly equal codes: most changes of the error are rounding errors.
    layout = CodebookLayout.of([32, 16, 8, 32], [4, 4, 8, 8])
    x, codes, codebook, decoder = problem(layout, 200, 48, 64, seed=3, linear=linear)
    codebook = codebook[0] + 1e-4 * codebook
    if linear:
        decoder = decoder._replace(linear=decoder.linear[0] + 1e-4 * decoder.linear)
    x = decoded(codes, codebook, decoder, layout).float() + 1e-3 * x
    error = errors(x, codes, codebook, decoder, layout)
    first = error
    for _ in range(4):
        codes = joint_search(x, codes, codebook, decoder, layout, 1, backend=backend)
        after = errors(x, codes, codebook, decoder, layout)
        assert (after <= error).all()
        error = after
    assert error.sum() < 0.999 * first.sum()


def test_equal_codes(backend):
    layout = CodebookLayout.of([6, 5], [2, 2])
    x, codes, codebook, decoder = problem(layout, 40, 12, 8)
    codebook[6:12] = codebook[:6]  # codes 3, 4, 5 of the first codebook equal 0, 1, 2
    found = joint_search(x, codes, codebook, decoder, layout, 3, backend=backend)
    moved = found[:, 0] != codes[:, 0]
    assert moved.any()
    assert (found[moved, 0] < 3).all()
    again = joint_search(
        x, found + torch.tensor([3, 0]) * (found[:, :1] < 3), codebook, decoder, layout, 1, backend=backend
    )
    assert torch.equal(again[:, 0] % 3, found[:, 0] % 3)
    assert (again[:, 0] >= 3).all()  # no better code: stays


def test_linear_contributions_that_cancel_the_hidden_layer(backend):
    """Bounds of the hidden layer's part alone would reject the best codes."""
    layout = LAYOUTS["wide"]
    x, codes, codebook, decoder = problem(layout, 40, 70, 16, linear=True)
    decoder = decoder._replace(b1=decoder.b1 + 40.0)  # all hidden units are positive
    decoder = decoder._replace(linear=0.1 * decoder.linear - code_tables(codebook, decoder.w1, layout) @ decoder.w2)
    x = decoded(codes.roll(1, 0), codebook, decoder, layout).float() + 0.5 * x / x.std()
    expected = coordinate_descent(x, codes, codebook, decoder, layout, 2)
    assert torch.equal(joint_search(x, codes, codebook, decoder, layout, backend=backend), expected)
    assert not torch.equal(expected, codes)


def test_linear_contributions_with_another_default_dtype():
    layout = LAYOUTS["wide"]
    x, codes, codebook, decoder = problem(layout, 30, 70, 16, linear=True)
    expected = joint_search(x, codes, codebook, decoder, layout)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(joint_search(x, codes, codebook, decoder, layout), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("linear", [False, True])
def test_rows_that_cannot_be_searched(backend, linear):
    layout = LAYOUTS["wide"]
    x, codes, codebook, decoder = problem(layout, 30, 20, 16, linear=linear)
    expected = joint_search(x, codes, codebook, decoder, layout, backend=backend)
    codes[3, 1], x[7, 2], x[8, 0] = -1, torch.nan, torch.inf
    found = joint_search(x, codes, codebook, decoder, layout, backend=backend)
    kept = torch.tensor([3, 7, 8])
    expected[kept] = codes[kept]
    assert torch.equal(found, expected)
    codebook[:] = torch.nan
    assert torch.equal(joint_search(x, codes, codebook, decoder, layout, backend=backend), codes)


@pytest.mark.parametrize("linear", [False, True])
def test_bad_code_is_not_taken(backend, linear):
    layout = LAYOUTS["wide"]
    x, codes, codebook, decoder = problem(layout, 60, 20, 16, linear=linear)
    codes[:, 0] = codes[:, 0].clamp(min=1)
    codebook[0] = torch.inf
    if linear:
        decoder.linear[1] = torch.nan
        codes[:, 0] = codes[:, 0].clamp(min=2)
    found = joint_search(x, codes, codebook, decoder, layout, backend=backend)
    assert (found[:, 0] > (1 if linear else 0)).all()
    assert not torch.equal(found, codes)


def test_candidates(backend):
    layout = LAYOUTS["wide"]
    x, _, codebook, decoder = problem(layout, 60, 20, 16)
    latents, _ = helpers.random_group(layout, 60, seed=1)
    distances = torch.stack(
        [
            torch.cat([d, d.new_full((60, 40 - d.shape[1]), torch.inf)], 1)
            for d in helpers.distances64(latents, codebook, layout)
        ],
        1,
    )  # [B, G, 40]
    order = distances.argsort(-1)
    nearest = order[:, :, 0]

    def search(count):
        return joint_search(x, nearest, codebook, decoder, layout, 2, 0.0, latents, count, backend)

    assert torch.equal(search(1), nearest)
    three = search(3)
    assert (three[:, :, None] == order[:, :, :3]).any(-1).all()
    assert not torch.equal(three, nearest)
    assert torch.equal(search(40), joint_search(x, nearest, codebook, decoder, layout, 2, backend=backend))


def test_weight_of_the_latents(backend):
    layout = LAYOUTS["wide"]
    x, _, codebook, decoder = problem(layout, 60, 20, 16)
    latents, _ = helpers.random_group(layout, 60, seed=1)
    nearest = torch.stack([part.argmin(1) for part in helpers.distances64(latents, codebook, layout)], 1)

    def search(weight):
        return joint_search(x, nearest, codebook, decoder, layout, 2, weight, latents, backend=backend)

    limit = errors(x, nearest, codebook, decoder, layout)
    changed = []
    for weight in (0.0, 1.0, 30.0, 1e6):
        found = search(weight)
        assert torch.equal(found, coordinate_descent(x, nearest, codebook, decoder, layout, 2, latents, weight))
        assert (errors(x, found, codebook, decoder, layout) <= limit).all()
        changed.append((found != nearest).sum())
    assert changed[0] > changed[2] > changed[3] == 0


def test_arguments():
    layout = LAYOUTS["small"]
    x, codes, codebook, decoder = problem(layout, 4, 3, 5)
    tables = torch.zeros(layout.total_codes, 5)
    for change in (
        {"tables": tables},
        {"tables": tables[:, :4]},
        {"sweeps": -1},
        {"candidates": 0},
        {"perturbations": -1},
        {"perturbations": 1, "candidates": 2},
        {"candidates": 2},
        {"search_weight": -1.0},
        {"search_weight": 1.0},
    ):
        with helpers.raises_one_line(ValueError, "joint_search", next(iter(change))):
            joint_search(x, codes, codebook, decoder, layout, **change)
    with helpers.raises_one_line(IndexError, "joint_search", "codebook 1"):
        joint_search(x, codes + 1, codebook, decoder, layout)
    with helpers.raises_one_line(ValueError, "decoder.linear"):
        joint_search(x, codes, codebook, decoder._replace(linear=tables[:, :3][1:]), layout)
    with helpers.raises_one_line(ValueError, "decoder.b2"):
        joint_search(x, codes, codebook, decoder._replace(b2=decoder.b1), layout)
    assert torch.equal(joint_search(x, codes, codebook, decoder, layout, 0), codes)
    assert joint_search(x[:0], codes[:0], codebook, decoder, layout).shape == (0, 3)
    wide = joint_search(x.double(), codes, codebook, decoder, layout)
    half = joint_search(x.half().float(), codes, codebook, decoder, layout)
    assert torch.equal(joint_search(x.half(), codes, codebook, decoder, layout), half)
    assert wide.dtype == torch.int64


@pytest.mark.parametrize("linear", [False, True])
def test_perturbations(backend, linear):
    layout = LAYOUTS["wide"]
    x, codes, codebook, decoder = problem(layout, 60, 20, 16, linear=linear)
    latents, _ = helpers.random_group(layout, 60, seed=1)
    for weight in (0.0, 1.0):

        def search(rows, start, count, weight=weight):
            some = latents[: len(rows)] if len(rows) < 60 else latents
            return joint_search(
                rows, start, codebook, decoder, layout, 2, weight, some, backend=backend, perturbations=count
            )

        def objective(found, weight=weight):
            own = [
                d.gather(1, found[:, g : g + 1]) for g, d in enumerate(helpers.distances64(latents, codebook, layout))
            ]
            return errors(x, found, codebook, decoder, layout) + weight * torch.cat(own, 1).sum(1)

        before, found = objective(search(x, codes, 0)), None
        plain = before
        for count in (1, 4, 12):
            found = search(x, codes, count)
            after = objective(found)
            assert (after <= before).all()
            before = after
        assert before.sum() < 0.97 * plain.sum()
        assert torch.equal(search(x[:7], codes[:7], 12), found[:7])  # whatever the batch


def test_perturbations_leave_rows_that_cannot_be_searched(backend):
    layout = CodebookLayout.of([5, 1, 4], [2, 2, 3])
    x, codes, codebook, decoder = problem(layout, 30, 20, 16)
    codes[3, 0], x[7, 2] = -1, torch.nan
    found = joint_search(x, codes, codebook, decoder, layout, backend=backend, perturbations=3)
    assert torch.equal(found[[3, 7]], codes[[3, 7]])
    one = CodebookLayout.of([1], [3])
    x, codes, codebook, decoder = problem(one, 4, 6, 5)
    assert torch.equal(joint_search(x, codes, codebook, decoder, one, backend=backend, perturbations=2), codes)


def test_tables_instead_of_first_weights(backend):
    layout = LAYOUTS["wide"]
    x, codes, codebook, decoder = problem(layout, 37, 20, 16)
    tables = code_tables(codebook, decoder.w1, layout)
    without = decoder._replace(w1=None)
    for more in ({}, {"perturbations": 2}):
        expected = joint_search(x, codes, codebook, decoder, layout, backend=backend, **more)
        assert torch.equal(
            joint_search(x, codes, codebook, without, layout, backend=backend, tables=tables, **more), expected
        )
    columns = torch.cat([tables, tables], 1)[:, :16]  # not contiguous
    found = joint_search(x, codes, codebook, without, layout, backend=backend, tables=columns)
    assert torch.equal(found, joint_search(x, codes, codebook, decoder, layout, backend=backend))
    with helpers.raises_one_line(ValueError, "decoder.w1", "tables"):
        joint_search(x, codes, codebook, without, layout)
