"""Joint search of codes: coordinate descent on the error of the reconstruction from all codes."""

from spinlock_fast.kernels.joint_search.op import joint_search
from spinlock_fast.kernels.joint_search.reference import Decoder

__all__ = ["Decoder", "joint_search"]
