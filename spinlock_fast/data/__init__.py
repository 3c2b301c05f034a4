"""Reading data sets."""

from spinlock_fast.data.loader import HDF5Loader

__all__ = ["HDF5Loader"]
