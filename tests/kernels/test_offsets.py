"""Addresses of kernels for tensors of more than 2**31 entries, without allocating them.

Triton's interpreter runs one program of a launch of that size, at a chosen program index. Loads outside of small tables
return zeros, stores write nothing, and the addresses of both are compared with those of the first and last entry.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed here")
if torch.cuda.is_available():
    pytest.skip("addresses are recorded under the interpreter only", allow_module_level=True)

from triton.runtime import interpreter

from spinlock_fast.kernels._common.launch_helpers import check_int32_offsets, codebook_offsets
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.augment.triton_forward import augment_fwd_kernel
from spinlock_fast.kernels.topo_loss import triton_backward as topo_backward
from spinlock_fast.kernels.topo_loss import triton_forward as topo
from spinlock_fast.kernels.vq_assign.triton_backward import vq_assign_bwd_kernel
from spinlock_fast.kernels.vq_assign.triton_forward import vq_assign_fwd_kernel

CPU = torch.device("cpu")
S = 60_000  # rows; S * S is between 2**31 and 2**32
WIDE = 40_000  # columns; S * WIDE is too
LAYOUT = CodebookLayout.of([4], [4])


class Memory:
    """Records the addresses of a program, except those of the small tensors `real`, which it reads."""

    def __init__(self, monkeypatch, program, programs, real):
        self.real = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in real]
        self.addresses = []
        load = interpreter.InterpreterBuilder.create_masked_load

        def masked_load(builder, ptrs, mask, other, *rest):
            if self.is_real(ptrs.data, mask.data):
                return load(builder, ptrs, mask, other, *rest)
            self.record(ptrs.data, mask.data)
            kind = interpreter._get_np_dtype(ptrs.get_element_ty())
            return interpreter.TensorHandle(np.zeros(ptrs.data.shape, kind), ptrs.get_element_ty())

        def masked_store(builder, ptrs, value, mask, *rest):
            self.record(ptrs.data, mask.data)

        def index(builder, axis):
            return interpreter.TensorHandle(np.array([program[axis]], np.int32), interpreter.tl.int32)

        def count(builder, axis):
            return interpreter.TensorHandle(np.array([programs[axis]], np.int32), interpreter.tl.int32)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", masked_load)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", masked_store)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", index)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_num_programs", count)

    def is_real(self, pointers, mask):
        read = pointers[mask]
        return any(len(read) and read.min() >= low and read.max() < high for low, high in self.real)

    def record(self, pointers, mask):
        self.addresses += pointers[mask].astype(np.int64).tolist()

    def check(self, base, last):
        """No address lies below the tensor, and its float32 entry `last` is addressed."""
        assert min(self.addresses) >= base.data_ptr() - 2**30
        assert base.data_ptr() + 4 * last in self.addresses


@pytest.fixture
def memory(monkeypatch):
    return lambda program, programs, *real: Memory(monkeypatch, program, programs, real)


def some():
    return torch.zeros(64)


def test_points(memory):
    sets = topo.point_sets(4, LAYOUT, CPU)
    x, z, codebook, codes, points, norms, centre = (some() for _ in range(7))
    last = S // topo.BLOCK_S - 1
    for s in range(sets.count):
        seen = memory((last, s), (last + 1, sets.count), sets.table, codebook)
        topo.topo_points_fwd_kernel[(1, 1)](
            x, z, codebook, codes.to(torch.int64), sets.table, points, norms, centre, S, 1, WIDE, WIDE, sets.columns,
            **topo.POINTS_TILES,
        )  # fmt: skip
        row = (last + 1) * topo.BLOCK_S - 1
        if s < 2:
            seen.check((x, z)[s], row * WIDE + 3)
        assert min(seen.addresses) > x.data_ptr() - 2**30


def test_distances(memory):
    sets = topo.point_sets(4, LAYOUT, CPU)
    points, norms, distances = some(), some(), some()
    tile = S // topo.BLOCK_S - 1
    seen = memory((tile, tile, 0), (tile + 1, tile + 1, 3), sets.table, sets.splits)
    topo.topo_distances_fwd_kernel[(1, 1, 1)](
        points,
        norms,
        sets.table,
        sets.splits,
        distances,
        S,
        sets.count,
        sets.columns,
        1e-6,
        1e-6,
        **topo.DISTANCES_TILES,
    )
    row = (tile + 1) * topo.BLOCK_S - 1
    seen.check(distances, row * S + row)


def test_moments(memory):
    distances, moments = some(), torch.zeros(64, dtype=torch.float64)
    tile = S // topo.BLOCK_PAIRS - 1
    seen = memory((tile, tile), (tile + 1, tile + 1))
    topo.topo_moments_fwd_kernel[(1, 1)](distances, moments, S, 1, 1, BLOCK_S=topo.BLOCK_PAIRS)
    row = (tile + 1) * topo.BLOCK_PAIRS - 1
    for matrix in range(3):
        seen.check(distances, matrix * S * S + row * S + row)


def test_weights_of_pairs(memory):
    scalars, distances, of_z, of_e = torch.ones(64), some(), some(), some()
    tile = S // topo.BLOCK_PAIRS - 1
    seen = memory((tile, tile), (tile + 1, tile + 1), scalars)
    topo_backward.topo_weights_bwd_kernel[(1, 1)](
        scalars, scalars, scalars, scalars, distances, of_z, of_e, S, 1, 1, S, 1.0, 1.0, BLOCK_S=topo.BLOCK_PAIRS
    )
    row = (tile + 1) * topo.BLOCK_PAIRS - 1
    for matrix in range(3):
        seen.check(distances, matrix * S * S + row * S + row)
    seen.check(of_z, row * S + row)


def test_rows_of_a_batch(memory):
    x, target, seed = some(), some(), torch.zeros((), dtype=torch.int64)
    order, tile = torch.zeros(64, dtype=torch.int64), S // 8 - 1
    seen = memory((tile, WIDE // 128 - 1), (tile + 1, WIDE // 128), seed)
    augment_fwd_kernel[(1, 1)](
        x, order, order, x, seed, target, x, S, S, WIDE, WIDE, 0, 0.0, 0.0, HAS_MIXUP=False, HAS_DECAY=False,
        HAS_NOISE=False, BLOCK_B=8, BLOCK_F=128,
    )  # fmt: skip
    seen.check(target, (S - 1) * WIDE + WIDE // 128 * 128 - 1)


@pytest.mark.parametrize("rows", [S, 2**31 + 64])
def test_latents(memory, rows):
    """2**31 rows of a few columns, and fewer of many."""
    z, quantized, grad, out = (some() for _ in range(4))
    codes, table = torch.zeros(64, dtype=torch.int64), codebook_offsets(LAYOUT, CPU)
    wide = WIDE if rows == S else 4
    tile = rows // 16 - 1
    seen = memory((tile, 0), (tile + 1, 1), table)
    vq_assign_bwd_kernel[(1, 1)](
        z, quantized, codes, grad, some(), table, out, rows, 1, wide, wide, wide, rows, ROTATE=False, BLOCK_N=16,
        BLOCK_D=16,
    )  # fmt: skip
    seen.check(out, ((tile + 1) * 16 - 1) * wide + 3)


def test_nearest_codes(memory):
    z, codebook, quantized, codes, table = some(), some(), some(), torch.zeros(64, dtype=torch.int64), None
    table = codebook_offsets(LAYOUT, CPU)
    tile = S // 16 - 1
    seen = memory((tile, 0), (tile + 1, 1), table, codebook)
    vq_assign_fwd_kernel[(1, 1)](
        z, codebook, z, table, codes, quantized, some(), some(), some(), S, 1, 4, WIDE, 16, WIDE, 1, HAS_MASK=False,
        WITH_SUMS=False, CENTRED=True, BLOCK_N=16, BLOCK_K=16, BLOCK_D=16,
    )  # fmt: skip
    seen.check(z, ((tile + 1) * 16 - 1) * WIDE + 3)
    seen.check(quantized, ((tile + 1) * 16 - 1) * WIDE + 3)


def test_codebooks_of_2_31_entries_are_rejected():
    with pytest.raises(ValueError, match="packed codebooks: 4,294,967,296 entries"):
        codebook_offsets(CodebookLayout.of([2**20], [4096]), CPU)
    check_int32_offsets("codes", 2**31 - 1)
