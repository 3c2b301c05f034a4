from typing import Any, TypedDict

import numpy as np

Buffer = bytes | bytearray | memoryview | np.ndarray[Any, Any]

__version__: str

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cxx_standard: int
    simd_level: str

def simd_level() -> str:
    """The widest instruction set of this processor: avx512, avx2, sse2 or portable."""

def build_info() -> BuildInfo:
    """Version, compiler and SIMD level."""

def unshuffle(data: Buffer, item_size: int) -> bytes:
    """Undo HDF5's shuffle filter on one chunk of items of `item_size` bytes.

    `data`: any C-contiguous buffer; trailing bytes that fill no item are kept in place.
    Raises ValueError for item_size = 0 or a buffer with gaps.
    """

def fletcher32(data: Buffer) -> int:
    """The checksum of HDF5's fletcher32 filter over a C-contiguous buffer."""
