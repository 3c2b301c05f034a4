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
    """Widest instruction set of this processor: avx512, avx2, sse2 or portable."""

def instruction_sets() -> list[str]:
    """Instruction sets that both the build and this processor support, fastest first."""

def use_instruction_set(name: str) -> None:
    """Select the instruction set of the CPU kernels; raises ValueError for an unsupported one."""

def inflate_library() -> str:
    """Deflate library of this build: "libdeflate VERSION", "zlib VERSION", or "none"."""

def build_info() -> BuildInfo:
    """Version, compiler, SIMD level and deflate library."""

def codec_libraries() -> str:
    """LZ4 and Zstandard of this build, such as "lz4 1.10.0, zstd 1.5.6", or "none"."""

def filter_numbers() -> list[int]:
    """Numbers, in the registry of HDF5, of the filters that have a native decoder."""

def check_filters(filters: Sequence[tuple[int, Sequence[int]]]) -> None:
    """Check that this build decodes a pipeline.

    Args:
        filters: (registered number, client data) of each filter, in the order of writing.

    Raises:
        NotImplementedError: it does not; the message completes "read through h5py because of".
    """

def decode_chunk(
    stored: bytes,
    mask: int,
    filters: Sequence[tuple[int, Sequence[int]]],
    chunk_bytes: int,
    verify_checksums: bool = True,
) -> bytes:
    """Decode the stored bytes of one chunk to `chunk_bytes` bytes.

    Args:
        mask: bit i set means that filter i was skipped.
        filters: as for `check_filters`.

    Raises:
        ValueError: the stored bytes are damaged.
        NotImplementedError: they use a feature that the native reader lacks.
    """

def unshuffle(data: Buffer, item_size: int) -> bytes:
    """Invert HDF5's shuffle filter on one chunk of items of `item_size` bytes.

    Args:
        data: C-contiguous buffer; trailing bytes beyond the last whole item are copied.
        item_size: at least 1.

    Raises:
        ValueError: item_size is 0, or the buffer is not C-contiguous.
    """

def fletcher32(data: Buffer) -> int:
    """Checksum of HDF5's fletcher32 filter over a C-contiguous buffer; raises ValueError for another buffer."""

# Operations on periodic fields of the simulation (csrc/simulate/field_operations.hpp). A tensor is the address of its
# contiguous float32 elements, 0 for none. All release the GIL; impossible sizes raise ValueError.
def torus_convolution(
    x: int, scale: int, weight: int, bias: int, realizations: int, inputs: int, outputs: int, grid: int, kernel: int,
    out: int,
) -> None: ...  # fmt: skip
def channel_sums(
    x: int, realizations: int, channels: int, points: int, sums: int, square_sums: int
) -> None: ...  # fmt: skip
def confined_step(
    u: int, f: int, noise: int, count: int, keep: float, step: float, cubic: float, clip: float, out: int
) -> None: ...  # fmt: skip
def squared_gradients(fields: int, planes: int, grid: int, out: int) -> None: ...
def interfaces_and_extremes(
    fields: int, mean: int, planes: int, grid: int, interfaces: int, least: int, greatest: int
) -> None: ...  # fmt: skip
def block_means(fields: int, planes: int, grid: int, scale: int, out: int) -> None: ...
def split_complex(values: int, count: int, real: int, imag: int, power: int) -> None: ...

# CPU kernels of a training step (csrc/training/operations.hpp). A tensor is the address of its contiguous float32
# elements, 0 for none; a strided matrix is (address, row stride, column stride). All release the GIL.
Matrix = tuple[int, int, int]

def use_openmp(gomp_parallel: int) -> None:
    """Run loops on the threads of an OpenMP runtime.

    Args:
        gomp_parallel: address of its GOMP_parallel; 0 selects an own thread pool.
    """

def mlp_forward(
    x: Matrix, w1: Matrix, b1: int, w2: Matrix, w2_group: int, b2: int, sizes: list[int], rows: int, hidden_width: int,
    out_width: int, dropout: float, seed: int, first_row: int, batch_rows: int, hidden: int, out: int, threads: int,
) -> None: ...  # fmt: skip
def mlp_backward(
    grad: int, x: Matrix, w1: Matrix, w2: Matrix, w2_group: int, hidden: int, sizes: list[int], rows: int,
    hidden_width: int, out_width: int, dropout: float, grad_hidden: int, grad_x: int, grad_w1: Matrix, grad_b1: int,
    grad_w2: int, grad_b2: int, threads: int,
) -> None: ...  # fmt: skip
def output_linear(
    x: int, gain: int, shift: int, weight: int, bias: int, sizes: list[int], rows: int, width: int, scaled: int,
    out: int, threads: int,
) -> None: ...  # fmt: skip
def output_linear_backward(
    grad: int, x: int, gain: int, shift: int, weight: int, scaled: int, sizes: list[int], rows: int, width: int,
    grad_x: int, grad_gain: int, grad_shift: int, grad_weight: int, grad_bias: int, threads: int,
) -> None: ...  # fmt: skip
def normalize(x: int, rows: int, width: int, eps: float, inv_std: int, threads: int) -> None: ...
def normalize_backward(
    grad: int, normalized: int, inv_std: int, rows: int, width: int, grad_x: int, threads: int
) -> None: ...
def segments(
    x: int, rows: int, sizes: list[int], weight: int, bias: int, eps: float, dropout: float, seed: int, first_row: int,
    normalized: int, inv_std: int, out: int, threads: int,
) -> None: ...  # fmt: skip
def segments_backward(
    grad: int, normalized: int, inv_std: int, rows: int, sizes: list[int], weight: int, dropout: float, seed: int,
    first_row: int, grad_x: int, grad_weight: int, grad_bias: int, threads: int,
) -> None: ...  # fmt: skip
def assign(
    z: int, z_row: int, rows: int, codebook: int, mask: int, centered: bool, num_codes: list[int], dims: list[int],
    codes: int, quantized: int, error: int, counts: int, sums: int, threads: int,
) -> None: ...  # fmt: skip
def assign_backward(
    grad: int, grad_error: int, z: int, quantized: int, codes: int, rows: int, dims: list[int], grad_z: int,
    threads: int,
) -> None: ...  # fmt: skip
def residual_assign(
    x: int, x_row: int, rows: int, dims: int, codebook: int, num_codes: list[int], mask: int, cosine: bool,
    gradient: int, codes: int, quantized: int, errors: int, counts: int, sums: int, threads: int,
) -> None: ...  # fmt: skip
def residual_backward(
    grad: int, grad_errors: int, x: int, x_row: int, rows: int, dims: int, codebook: int, num_codes: list[int],
    mask: int, codes: int, cosine: bool, gradient: int, grad_x: int, threads: int,
) -> None: ...  # fmt: skip
def quantize_step(
    x: int, rows: int, dims: int, codebook: int, num_codes: int, cosine: bool, gradient: int, weight: float, codes: int,
    quantized: int, loss: int, saved_codebook: int, saved_codes: int, counts: int, sums: int, cluster_size: int,
    code_sum: int, usage: int, rate: float, epsilon: float, threads: int,
) -> None: ...  # fmt: skip
def quantize_step_backward(
    grad: int, grad_loss: int, x: int, rows: int, dims: int, codebook: int, num_codes: int, codes: int, cosine: bool,
    gradient: int, weight: float, grad_x: int, threads: int,
) -> None: ...  # fmt: skip
def average_codes(
    codes: int, cluster_size: int, code_sum: int, usage: int, counts: int, sums: int, num_codes: list[int],
    dims: list[int], rate: float, smoothing: int, epsilon: float, unit: bool, keep_without_rows: bool, threads: int,
) -> None: ...  # fmt: skip
def decoders_forward(
    x: int, mean: int, codes: int, codebook: int, w1: int, b1: int, w2: int, b2: int, num_codes: list[int],
    dims: list[int], rows: int, features: int, hidden_width: int, hidden: int, decoded: int, error_sums: int,
    threads: int,
) -> float: ...  # fmt: skip
def decoders_backward(
    scale: float, x: int, codes: int, codebook: int, w1: int, w2: int, num_codes: list[int], dims: list[int],
    rows: int, features: int, hidden_width: int, hidden: int, decoded: int, error_sums: int, grad_quantized: int,
    grad_w1: int, grad_b1: int, grad_w2: int, grad_b2: int, threads: int,
) -> None: ...  # fmt: skip
def code_mlp_forward(
    codes: int, codebook: int, w1: tuple[int, int, int], b1: int, w2: tuple[int, int, int], b2: int,
    num_codes: list[int], dims: list[int], rows: int, hidden_width: int, out_width: int, rate: float, seed: int,
    tables: int, hidden: int, out: int, threads: int,
) -> None: ...  # fmt: skip
def code_mlp_backward(
    grad: int, codes: int, codebook: int, w1: tuple[int, int, int], w2: tuple[int, int, int], hidden: int,
    num_codes: list[int], dims: list[int], rows: int, hidden_width: int, out_width: int, rate: float,
    grad_hidden: int, sums: int, grad_quantized: int, grad_w1: int, grad_b1: int, grad_w2: int, grad_b2: int,
    threads: int,
) -> None: ...  # fmt: skip
def code_cosines(codebook: int, num_codes: list[int], dims: list[int], threads: int) -> float: ...
def joint_search(
    codes: int, sums: int, gradient: int, tolerance: int, cost: int, tables: int, filter: int, head: int, tail: int,
    gram: int, linear_head: int, linear_gradient: int, num_codes: list[int], rows: int, hidden_width: int,
    linear_units: int, tail_columns: int, sweeps: int, threads: int,
) -> None: ...  # fmt: skip
def check_codes(codes: int, rows: int, num_codes: list[int], name: str) -> bool:
    """Whether any of int64 codes [rows, G] is -1 (no code); raises IndexError if one is outside its codebook."""

def topo_forward(
    x: int, features: int, z: int, codes: int, codebook: int, rows: int, num_codes: list[int], dims: list[int],
    distances: int, tables: int, missing: bool, threads: int,
) -> tuple[float, float, list[float]]: ...  # fmt: skip
def topo_backward(
    grad_pre: float, grad_post: float, factors: list[float], z: int, codes: int, codebook: int, rows: int,
    num_codes: list[int], dims: list[int], distances: int, tables: int, grad_z: int, threads: int,
) -> None: ...  # fmt: skip
def inflate(data: Buffer, out: Buffer) -> None:
    """Decode one zlib stream into a writable buffer of exactly its decoded size.

    Raises:
        ValueError: the stream is damaged, or has another size.
    """

class ReadError(RuntimeError):
    """Rows cannot be read; the message names file, dataset, chunk, rows and byte."""

class ReaderStats(TypedDict):
    chunks: int
    stored_bytes: int
    decoded_bytes: int
    cpu_seconds: float

class RowReader:
    """Threads that read and decode chunks and copy their rows into batches; see csrc/hdf5/row_reader.hpp.

    Args:
        files: dicts of path (bytes), label, device, inode, size, mtime_ns; a file that changed is an error.
        datasets: dicts of name, item_size, row_shape and shards. A shard has file (index into `files`), rows,
            chunk_rows, swapped (non-native byte order), and either offset (contiguous), or chunk_shape (within a row),
            filters [(registered number, client data)], fill (bytes of one item) and, per chunk, offsets (2**64 - 1:
            never written), sizes and masks.
        threads: at least 1; started by the first `submit`.
        verify_checksums: whether fletcher32 checksums are verified.

    Raises:
        ValueError: a layout is inconsistent.
    """

    def __init__(
        self,
        files: Sequence[dict[str, Any]],
        datasets: Sequence[dict[str, Any]],
        threads: int,
        verify_checksums: bool,
    ) -> None: ...
    def add_batch(self, first: int, count: int, memory: Sequence[Buffer]) -> None:
        """Add the batch of positions [first, first + count); memory: a writable buffer of `count` rows per dataset."""

    def submit(self, first: int, rows: np.ndarray[Any, Any]) -> None:
        """Queue reading of rows[i] to position first + i; batches must cover all positions."""

    def wait(self, first: int) -> None:
        """Wait until the batch that starts at `first` is complete; raises ReadError if it cannot be read."""

    def read_cached(self, first_row: int, count: int, memory: Sequence[Buffer]) -> bool:
        """Read consecutive rows in the calling thread if they are contiguous in the files and in the page cache.

        Returns False, with `memory` partly overwritten, if they are not, or cannot be read; no batch is needed.
        """

    def stats(self) -> ReaderStats:
        """Totals since construction; also valid after `close`."""

    def close(self) -> None:
        """Discard queued reads, join the threads, close the files and release the memory of batches."""
