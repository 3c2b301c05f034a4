"""The former names of `_common.launch_sizes`."""

from spinlock_fast.kernels._common.launch_sizes import check_int32_offsets as check_offsets
from spinlock_fast.kernels._common.launch_sizes import codebook_offsets as book_table
from spinlock_fast.kernels._common.launch_sizes import compute_capability as capability
from spinlock_fast.kernels._common.launch_sizes import next_power_of_two as power_of_two

__all__ = ["book_table", "capability", "check_offsets", "power_of_two"]
