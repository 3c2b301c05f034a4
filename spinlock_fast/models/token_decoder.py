"""Decoder of tokens: what each code adds to the hidden layer is a parameter of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.single_thread import single_thread
from spinlock_fast.kernels.joint_search import Decoder
from spinlock_fast.kernels.joint_search.reference import code_tables

TOKEN_DECODER = "token_decoder."  # prefix of its entries in the state dict of a model


class TokenDecoder(nn.Module):
    """Tokens k [B, G] to features: relu(b1 + sum_g T_g[k_g]) W2 + sum_g L_g[k_g] + b2.

    In the shared decoder T_g = E_g W1_g follows from the code vectors E_g [K_g, D_g], and L_g = 0; here every code has
    rows of its own, so that the decoder can be fitted to the tokens while the codes, and with them the nearest tokens,
    stay. L alone is the decoder of an additive quantizer (Babenko and Lempitsky 2014).

    Args:
        layout: sizes of the codebooks.
        hidden: H, width of the hidden layer.
        features: F, width of the output.
    """

    tables: Tensor
    linear: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __init__(self, layout: CodebookLayout, hidden: int, features: int) -> None:
        super().__init__()
        self.layout = layout
        self.register_buffer("tables", torch.zeros(layout.total_codes, hidden))  # T of all codebooks: [sum K, H]
        self.register_buffer("linear", torch.zeros(layout.total_codes, features))  # L of all codebooks: [sum K, F]
        self.register_buffer("b1", torch.zeros(hidden))
        self.register_buffer("w2", torch.zeros(hidden, features))
        self.register_buffer("b2", torch.zeros(features))

    @torch.no_grad()
    def copy_from(self, codebook: Tensor, shared_decoder: nn.Sequential) -> None:
        """Sets the parameters to those of a shared decoder and code vectors [sum K D]: equal reconstructions."""
        first, last = shared_decoder[0], shared_decoder[-1]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        with single_thread(codebook.device):  # the fit starts from the same numbers with any number of threads
            self.tables.copy_(code_tables(codebook, first.weight.t(), self.layout))
        self.linear.zero_()
        self.b1.copy_(first.bias)
        self.w2.copy_(last.weight.t())
        self.b2.copy_(last.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Features [B, F] of tokens [B, G]; NaN in rows with a token of -1."""
        coded = (tokens >= 0).all(1, keepdim=True)
        codes = tokens.clamp(min=0) + self.layout.indices(tokens.device).code_offsets
        hidden = (self.b1 + F.embedding_bag(codes, self.tables, mode="sum")).relu()
        features = torch.addmm(F.embedding_bag(codes, self.linear, mode="sum") + self.b2, hidden, self.w2)
        return torch.where(coded, features, torch.nan)

    @property
    def weights(self) -> Decoder:
        """The parameters as the joint search takes them, beside `tables`."""
        return Decoder(None, self.b1, self.w2, self.b2, self.linear)
