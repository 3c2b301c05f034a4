"""Accesses outside of the tensors of a kernel fail under the interpreter, see tests/triton_interpreter.py."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="the package triton is not installed here")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="checked by the interpreter alone")


@triton.jit
def copy_kernel(x_ptr, out_ptr, N, shift, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i + shift, mask=i < N, other=0.0), mask=i < N)


@triton.jit
def count_kernel(out_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + i, 1, mask=i < N)


def test_accesses_inside_of_the_tensors_pass():
    x, out = torch.arange(8.0), torch.zeros(8)
    copy_kernel[(1,)](x, out, 5, 3, BLOCK=16)
    assert out.tolist() == [3.0, 4.0, 5.0, 6.0, 7.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("shift", [-1, 4])
def test_a_load_outside_fails(shift):
    with pytest.raises(Exception, match="1 of 5 addresses are outside of the kernel's tensors"):
        copy_kernel[(1,)](torch.arange(8.0), torch.zeros(8), 5, shift, BLOCK=16)


def test_a_store_outside_fails():
    with pytest.raises(Exception, match="2 of 6 addresses are outside of the kernel's tensors"):
        copy_kernel[(1,)](torch.arange(8.0), torch.zeros(4), 6, 0, BLOCK=16)


def test_an_atomic_operation_outside_fails():
    with pytest.raises(Exception, match="1 of 4 addresses are outside of the kernel's tensors"):
        count_kernel[(1,)](torch.zeros(3, dtype=torch.int32), 4, BLOCK=16)
