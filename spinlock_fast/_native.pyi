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
