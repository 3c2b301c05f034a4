"""Search of the codes of a row: nearest to its latents, or jointly by the error of the reconstruction."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.joint_search import Decoder, joint_search
from spinlock_fast.models.token_decoder import TokenDecoder
from spinlock_fast.quantize import GroupedVectorQuantizer

Search = Literal["nearest", "joint"]


class TokenSearch(NamedTuple):
    """How the tokens of a row are searched; see `CategoricalHierarchicalVQVAE.get_tokens`."""

    search: Search = "nearest"
    sweeps: int = 2
    search_weight: float = 0.0
    perturbations: int = 0

    def check(self) -> TokenSearch:
        """The search itself; raises ValueError for an unknown one, or a number that is out of range."""
        if self.search not in get_args(Search):
            raise ValueError(f"search must be one of {', '.join(get_args(Search))}, got {self.search!r}")
        if not isinstance(self.sweeps, int) or self.sweeps < 1:
            raise ValueError(f"sweeps must be a whole number of at least 1, got {self.sweeps!r}")
        if not isinstance(self.perturbations, int) or self.perturbations < 0:
            raise ValueError(f"perturbations must be a whole number of at least 0, got {self.perturbations!r}")
        if not 0.0 <= self.search_weight < math.inf:
            raise ValueError(f"search_weight must be a finite number of at least 0, got {self.search_weight!r}")
        for name, value, unset in zip(self._fields, self, TokenSearch(), strict=True):
            if self.search == "nearest" and value != unset:
                raise ValueError(f"{name} is a setting of the joint search: use it with search='joint', got {value!r}")
        return self

    @property
    def options(self) -> str:
        """The options of the command `tokenize` for this search."""
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.settings.items())

    @property
    def settings(self) -> dict[str, str | int | float]:
        """The settings by name; those that the search does not use are left out."""
        return {"search": self.search} if self.search == "nearest" else self._asdict()


NEAREST = TokenSearch()


def joint_codes(
    x: Tensor,
    latents: Tensor,
    codes: Tensor,
    quantizer: GroupedVectorQuantizer,
    decoder: nn.Sequential | TokenDecoder,
    search: TokenSearch,
) -> Tensor:
    """`joint_search` for rows x [B, F] with latents [B, sum D], from the nearest codes [B, G]."""
    tables = None
    if isinstance(decoder, TokenDecoder):
        tables, weights = decoder.tables, decoder.weights
    else:
        first, *_, last = cast(list[nn.Linear], list(decoder))
        weights = Decoder(first.weight.t(), first.bias, last.weight.t(), last.bias)
    return joint_search(
        x,
        codes,
        quantizer.embedding,
        weights,
        quantizer.layout,
        search.sweeps,
        search.search_weight,
        latents,
        perturbations=search.perturbations,
        tables=tables,
    )


def code_distances(latents: Tensor, codebook: Tensor, tokens: Tensor, layout: CodebookLayout) -> tuple[Tensor, Tensor]:
    """Euclidean distances of latents [N, sum D] to the codes of tokens [N, G], and margins, both [N, G].

    A margin is the distance to the nearest other code minus that to the chosen one. It is negative where another code
    is nearer, as after a joint search, and Inf in a codebook of one code. Distances are computed from differences:
    |z|^2 + |e|^2 - 2 z.e would lose small margins.
    """
    chosen, margins = [], []
    for g in range(layout.groups):
        codes = codebook[layout.entry_slice(g)].view(layout.num_codes[g], layout.dims[g])
        part = latents[:, layout.column_slice(g)]
        distance = torch.cdist(part, codes, compute_mode="donot_use_mm_for_euclid_dist")
        own = distance.gather(1, tokens[:, g : g + 1])
        others = distance.scatter(1, tokens[:, g : g + 1], float("inf"))
        chosen.append(own[:, 0])
        margins.append(others.min(1).values - own[:, 0])
    return torch.stack(chosen, 1), torch.stack(margins, 1)
