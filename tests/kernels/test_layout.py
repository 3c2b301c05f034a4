import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spinlock_fast.kernels._common.layout import CodebookLayout

CPU = torch.device("cpu")
SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=6)


def make(sizes):
    return CodebookLayout.of(*zip(*sizes, strict=True))


@given(SIZES)
def test_totals(sizes):
    layout = make(sizes)
    assert layout.groups == len(sizes)
    assert layout.total_codes == sum(k for k, _ in sizes)
    assert layout.total_dims == sum(d for _, d in sizes)
    assert layout.total_entries == sum(k * d for k, d in sizes)
    assert (layout.max_codes, layout.max_dims) == (max(k for k, _ in sizes), max(d for _, d in sizes))


@given(SIZES, st.integers(0, 4))
def test_pad_columns_fills_with_zeros(sizes, rows):
    layout = make(sizes)
    z = torch.arange(1.0, rows * layout.total_dims + 1).view(rows, -1) if rows else torch.zeros(0, layout.total_dims)
    padded = layout.pad_columns(z)
    assert padded.shape == (layout.groups, rows, layout.max_dims)
    for g, (_, d) in enumerate(sizes):
        assert torch.equal(padded[g, :, :d], z[:, layout.column_slice(g)])
        assert not padded[g, :, d:].any()
    assert torch.equal(layout.pack_columns(padded), z)


@given(SIZES)
def test_pad_codebook_fills_with_zeros(sizes):
    layout = make(sizes)
    codebook = torch.arange(1.0, layout.total_entries + 1)
    padded = layout.pad_codebook(codebook)
    assert padded.shape == (layout.groups, layout.max_codes, layout.max_dims)
    for g, (k, d) in enumerate(sizes):
        assert torch.equal(padded[g, :k, :d], codebook[layout.entry_slice(g)].view(k, d))
    assert padded.count_nonzero() == layout.total_entries
    assert torch.equal(layout.pack_codebook(padded), codebook)


@given(SIZES)
def test_index_tensors_of_codes_columns_and_entries(sizes):
    layout = make(sizes)
    index = layout.indices(CPU)
    codebook_of_code = [g for g, (k, _) in enumerate(sizes) for _ in range(k)]
    codebook_of_column = [g for g, (_, d) in enumerate(sizes) for _ in range(d)]
    dims_of_code = [d for k, d in sizes for _ in range(k)]
    assert index.codebook_of_code.tolist() == codebook_of_code
    assert index.codebook_of_column.tolist() == codebook_of_column
    assert index.code_of_entry.tolist() == [c for c, d in enumerate(dims_of_code) for _ in range(d)]
    assert index.code_offsets.tolist() == [layout.code_slice(g).start for g in range(layout.groups)]
    assert index.code_mask.sum(1).tolist() == index.num_codes.tolist() == [k for k, _ in sizes]
    assert index.column_mask.sum(1).tolist() == index.dims.tolist() == [d for _, d in sizes]


def test_slices_are_contiguous():
    layout = CodebookLayout.of([3, 1, 5], [2, 4, 1])
    assert [layout.code_slice(g) for g in range(3)] == [slice(0, 3), slice(3, 4), slice(4, 9)]
    assert [layout.column_slice(g) for g in range(3)] == [slice(0, 2), slice(2, 6), slice(6, 7)]
    assert [layout.entry_slice(g) for g in range(3)] == [slice(0, 6), slice(6, 10), slice(10, 15)]


@pytest.mark.parametrize(
    ("num_codes", "dims"), [([], []), ([3], []), ([3, 3], [2]), ([0], [2]), ([3], [0]), ([-1, 3], [1, 1])]
)
def test_invalid_sizes_are_rejected(num_codes, dims):
    with pytest.raises(ValueError, match=r"num_codes|codebook"):
        CodebookLayout.of(num_codes, dims)


def test_index_tensors_are_cached():
    layout = CodebookLayout.of([3], [2])
    assert layout.indices(CPU) is layout.indices(CPU)


def test_layouts_of_equal_sizes_are_equal():
    layout = CodebookLayout.of([3, 2], [2, 4])
    layout.indices(CPU)
    assert layout == CodebookLayout((3, 2), (2, 4))
    assert layout != CodebookLayout((3, 2), (2, 5))


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_are_equal(clone):
    layout = CodebookLayout.of([3, 2], [2, 4])
    layout.indices(CPU)
    other = clone(layout)
    assert other == layout
    assert torch.equal(other.pad_codebook(torch.arange(14.0)), layout.pad_codebook(torch.arange(14.0)))


def test_padding_is_differentiable():
    layout = CodebookLayout.of([3, 2], [2, 4])
    z = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(14, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t: layout.pack_columns(layout.pad_columns(t).square()), z)
    torch.autograd.gradcheck(lambda t: layout.pack_codebook(layout.pad_codebook(t).square()), codebook)
