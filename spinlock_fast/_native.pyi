from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

Buffer = bytes | bytearray | memoryview | np.ndarray[Any, Any]

__version__: str

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cxx_standard: int
    simd_level: str
    inflate: str

def simd_level() -> str:
    """The widest instruction set of this processor: avx512, avx2, sse2 or portable."""

def inflate_library() -> str:
    """Who undoes deflate: "libdeflate VERSION", "zlib VERSION", or "none": then h5py must."""

def build_info() -> BuildInfo:
    """Version, compiler, SIMD level and inflate library."""

def unshuffle(data: Buffer, item_size: int) -> bytes:
    """Undo HDF5's shuffle filter on one chunk of items of `item_size` bytes.

    `data`: any C-contiguous buffer; trailing bytes that fill no item are kept in place.
    Raises ValueError for item_size = 0 or a buffer with gaps.
    """

def fletcher32(data: Buffer) -> int:
    """The checksum of HDF5's fletcher32 filter over a C-contiguous buffer."""

# The CPU path of a training step (csrc/training). Tensors are addresses of float32 entries, 0 for none; a matrix of
# any strides is (address, distance of rows, distance of columns). kernels/*/native.py says what each computes.
Matrix = tuple[int, int, int]

def use_openmp(gomp_parallel: int) -> None:
    """Run loops on the threads of an OpenMP runtime: the address of its GOMP_parallel, 0 for threads of our own."""

def training_levels() -> list[str]:
    """The instruction sets of this processor that the kernels are compiled for, best first."""

def use_training_level(level: str) -> None:
    """Compute with another instruction set from now on; raises ValueError for one that is not there."""

def mlp_forward(
    x: Matrix, w1: Matrix, b1: int, w2: Matrix, w2_group: int, b2: int, sizes: list[int], rows: int, hidden_width: int,
    out_width: int, dropout: float, seed: int, hidden: int, out: int, threads: int,
) -> None: ...  # fmt: skip
def mlp_backward(
    grad: int, x: Matrix, w1: Matrix, w2: Matrix, w2_group: int, hidden: int, sizes: list[int], rows: int,
    hidden_width: int, out_width: int, dropout: float, of_hidden: int, of_x: int, of_w1: Matrix, of_b1: int,
    of_w2: int, of_b2: int, threads: int,
) -> None: ...  # fmt: skip
def output_linear(
    x: int, gain: int, shift: int, weight: int, bias: int, sizes: list[int], rows: int, width: int, scaled: int,
    out: int, threads: int,
) -> None: ...  # fmt: skip
def output_linear_backward(
    grad: int, x: int, gain: int, shift: int, weight: int, scaled: int, sizes: list[int], rows: int, width: int,
    of_x: int, of_gain: int, of_shift: int, of_weight: int, of_bias: int, threads: int,
) -> None: ...  # fmt: skip
def normalize(x: int, rows: int, width: int, eps: float, deviation: int, threads: int) -> None: ...
def normalize_backward(
    grad: int, normed: int, deviation: int, rows: int, width: int, of_x: int, threads: int
) -> None: ...
def segments(
    x: int, rows: int, sizes: list[int], weight: int, bias: int, eps: float, dropout: float, seed: int, normed: int,
    deviation: int, out: int, threads: int,
) -> None: ...  # fmt: skip
def segments_backward(
    grad: int, normed: int, deviation: int, rows: int, sizes: list[int], weight: int, dropout: float, seed: int,
    of_x: int, of_weight: int, of_bias: int, threads: int,
) -> None: ...  # fmt: skip
def assign(
    z: int, z_row: int, rows: int, codebook: int, mask: int, centred: bool, num_codes: list[int], dims: list[int],
    codes: int, quantized: int, error: int, counts: int, sums: int, threads: int,
) -> None: ...  # fmt: skip
def assign_backward(
    grad: int, of_error: int, z: int, quantized: int, codes: int, rows: int, dims: list[int], of_z: int, threads: int
) -> None: ...
def residual_assign(
    x: int, x_row: int, rows: int, dims: int, codebook: int, num_codes: list[int], mask: int, cosine: bool,
    gradient: int, codes: int, quantized: int, errors: int, counts: int, sums: int, threads: int,
) -> None: ...  # fmt: skip
def residual_backward(
    grad: int, of_errors: int, x: int, x_row: int, rows: int, dims: int, codebook: int, num_codes: list[int],
    mask: int, codes: int, cosine: bool, gradient: int, of_x: int, threads: int,
) -> None: ...  # fmt: skip
def decoders_forward(
    x: int, mean: int, codes: int, codebook: int, w1: int, b1: int, w2: int, b2: int, num_codes: list[int],
    dims: list[int], rows: int, features: int, hidden_width: int, hidden: int, decoded: int, off: int, threads: int,
) -> float: ...  # fmt: skip
def decoders_backward(
    scale: float, x: int, codes: int, codebook: int, w1: int, w2: int, num_codes: list[int], dims: list[int],
    rows: int, features: int, hidden_width: int, hidden: int, decoded: int, off: int, of_quantized: int, of_w1: int,
    of_b1: int, of_w2: int, of_b2: int, threads: int,
) -> None: ...  # fmt: skip
def check_codes(codes: int, rows: int, num_codes: list[int], name: str) -> bool:
    """Whether one of int64 codes [rows, G] is -1; raises IndexError where one is outside its codebook."""

def topo_forward(
    x: int, features: int, z: int, codes: int, codebook: int, rows: int, num_codes: list[int], dims: list[int],
    distances: int, tables: int, missing: bool, threads: int,
) -> tuple[float, float, list[float]]: ...  # fmt: skip
def topo_backward(
    of_pre: float, of_post: float, factors: list[float], z: int, codes: int, codebook: int, rows: int,
    num_codes: list[int], dims: list[int], distances: int, tables: int, of_z: int, threads: int,
) -> None: ...  # fmt: skip
def inflate(data: Buffer, out: Buffer) -> None:
    """Decode one zlib stream into a writable buffer of exactly its size.

    Raises ValueError for a damaged stream, or one of another size.
    """

class ReadError(RuntimeError):
    """Rows cannot be read; the text names file, dataset, chunk, rows and byte."""

class ReaderStats(TypedDict):
    chunks: int
    stored_bytes: int
    decoded_bytes: int
    cpu_seconds: float

class RowReader:
    """Threads that fill batches of rows; see csrc/row_reader.hpp.

    Args:
        files: dicts of path (bytes), label, device, inode, size, mtime_ns; a file that differs is refused.
        datasets: dicts of name, item_size, row_shape and shards. A shard has file (an index into `files`), rows,
            chunk_rows, swapped (stored in the other byte order), and either offset (contiguous) or chunk_shape (of a
            row), filters [(name, item size)], fill (one item), and by chunk: offsets (2**64 - 1: never written),
            sizes, masks.
        threads: at least 1; they start with the first `submit`.
        verify_checksums: whether fletcher32 is compared.

    Raises ValueError where a description contradicts itself.
    """

    def __init__(
        self,
        files: Sequence[dict[str, Any]],
        datasets: Sequence[dict[str, Any]],
        threads: int,
        verify_checksums: bool,
    ) -> None: ...
    def add_batch(self, first: int, count: int, memory: Sequence[Buffer]) -> None:
        """Positions [first, first + count) and memory for them: one writable buffer of `count` rows per dataset."""

    def submit(self, first: int, rows: np.ndarray[Any, Any]) -> None:
        """Rows of the positions from `first` on, which batches must cover; begins reading them."""

    def wait(self, first: int) -> None:
        """Returns when the batch that starts at `first` is complete; raises ReadError."""

    def stats(self) -> ReaderStats:
        """Sums since the beginning; also after `close`."""

    def close(self) -> None:
        """Drops what is not begun, joins the threads, closes the files and lets go of the memory."""
