"""Search of the codes of a row: nearest to its latents, or jointly by the error of the reconstruction."""

from __future__ import annotations

from typing import Literal, cast, get_args

from torch import Tensor, nn

from spinlock_fast.kernels.joint_search import Decoder, joint_search
from spinlock_fast.quantize import GroupedVectorQuantizer

Search = Literal["nearest", "joint"]


def check_search(search: str, sweeps: int) -> None:
    """Raises ValueError unless `search` is a kind of search, with at least one sweep."""
    if search not in get_args(Search):
        raise ValueError(f"search must be one of {', '.join(get_args(Search))}, got {search!r}")
    if not isinstance(sweeps, int) or sweeps < 1:
        raise ValueError(f"sweeps must be a whole number of at least 1, got {sweeps!r}")


def joint_codes(
    x: Tensor, codes: Tensor, quantizer: GroupedVectorQuantizer, shared_decoder: nn.Sequential, sweeps: int
) -> Tensor:
    """Codes [B, G] with a lower squared error of the decoder's reconstruction of rows x [B, F], starting at `codes`."""
    first, *_, last = cast(list[nn.Linear], list(shared_decoder))
    decoder = Decoder(first.weight.t(), first.bias, last.weight.t(), last.bias)
    return joint_search(x, codes, quantizer.embedding, decoder, quantizer.layout, sweeps)
