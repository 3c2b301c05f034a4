"""Writing files: atomic replacement, locks, HDF5 on reserved space."""
