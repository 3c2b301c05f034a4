"""`VectorQuantizer` of the original project: same interface, state dict and numerics."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from spinlock_fast.kernels._common.guard import check_dense
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.snapshot import snapshot
from spinlock_fast.kernels.ema_update import ema_update
from spinlock_fast.kernels.vq_assign import Assignment, quantize, vq_assign
from spinlock_fast.quantize.activation_checkpointing import first_run_values, once
from spinlock_fast.quantize.module_state import keep_float32
from spinlock_fast.quantize.process_group import Processes
from spinlock_fast.quantize.sharded_parameters import ShardKey, store_written


class VectorQuantizer(nn.Module):
    """One codebook of `num_embeddings` codes of `embedding_dim` dimensions.

    State dict keys are those of the original project: `embedding.weight`, `ema_cluster_size`, `ema_w`. With `use_ema`,
    codes are moving averages of the inputs with Laplace smoothing (`epsilon`); as in the original project they are
    still a parameter, with a gradient from `commitment_loss`. Unlike there, the processes of `process_group` (None for
    all processes of `torch.distributed`) share the moving averages.

    forward(inputs [..., D]) returns

    - quantized [..., D], with the straight-through gradient;
    - one-hot encodings [..., K] float32;
    - losses: `codebook_loss` = mean((sg(e) - z)^2), `commitment_loss` = mean((e - sg(z))^2) and `loss` =
      codebook_loss + commitment_cost * commitment_loss. The original project swaps the two names of van den Oord et
      al. (2017), and so does this class.

    Raises:
        ValueError: the last dimension of the inputs is not `embedding_dim`.
    """

    ema_cluster_size: Tensor
    ema_w: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        commitment_cost: float = 0.25,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        use_ema: bool = True,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.commitment_cost = commitment_cost
        self.decay = decay
        self.epsilon = epsilon
        self.use_ema = use_ema
        self.processes = Processes(process_group)
        self._layout = CodebookLayout.of([num_embeddings], [embedding_dim])
        self.embedding = nn.Embedding(num_embeddings, embedding_dim)
        self.embedding.shard_key = ShardKey()  # type: ignore[assignment]
        nn.init.uniform_(self.embedding.weight, -1.0 / num_embeddings, 1.0 / num_embeddings)
        if use_ema:
            wide = torch.promote_types(self.embedding.weight.dtype, torch.float32)
            self.register_buffer("ema_cluster_size", torch.zeros(num_embeddings, dtype=wide))
            self.register_buffer("ema_w", self.embedding.weight.detach().to(wide, copy=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VectorQuantizer:
        averages = ("ema_cluster_size", "ema_w")
        return keep_float32(self, averages, lambda: super(VectorQuantizer, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """Processes that share the moving averages; None for all."""
        return self.processes.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self.processes.set(group)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        check_dense("inputs", inputs)
        if not inputs.ndim or inputs.shape[-1] != self.embedding_dim:
            raise ValueError(f"inputs must be [..., {self.embedding_dim}], got {list(inputs.shape)}")
        flat = inputs.reshape(-1, self.embedding_dim)
        weight = first_run_values(self, self.embedding.weight) if self.training else self.embedding.weight
        assignment = vq_assign(flat, weight.detach().flatten(), self._layout, centred=False)
        codes = assignment.codes[:, 0]
        valid = codes >= 0
        vectors = F.embedding(codes.clamp(min=0), snapshot(weight))  # before the update changes them in place
        vectors = torch.where(valid[:, None], vectors, torch.nan)
        if self.training and self.use_ema:
            once(self, lambda: self._update_ema(assignment), self.ema_cluster_size)
        encodings = F.one_hot(codes.clamp(min=0), self.num_embeddings).to(torch.float32) * valid[:, None]
        codebook_loss = _mean_squared_error(vectors.detach(), flat)
        commitment_loss = _mean_squared_error(vectors, flat.detach())
        losses = {
            "loss": codebook_loss + self.commitment_cost * commitment_loss,
            "codebook_loss": codebook_loss,
            "commitment_loss": commitment_loss,
        }
        quantized = quantize(flat, vectors.detach(), self._layout)
        return quantized.view(inputs.shape), encodings.view(*inputs.shape[:-1], self.num_embeddings), losses

    @torch.no_grad()
    def _update_ema(self, assignment: Assignment) -> None:
        counts, sums = assignment.counts, assignment.sums
        if self.processes.size() > 1:
            counts, sums = self.processes.sum_(torch.cat([counts, sums])).split([len(counts), len(sums)])
        ema_update(
            self.embedding.weight.detach().view(-1),
            self.ema_cluster_size,
            self.ema_w.view(-1),
            counts,
            sums,
            self._layout,
            self.decay,
            "laplace",
            self.epsilon,
        )
        store_written(self.embedding, "weight")

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        """Code vectors [..., D] of indices [...]."""
        entries: Tensor = self.embedding(indices)
        return entries


def _mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error; 0 for empty inputs, with a gradient."""
    dtype = torch.promote_types(a.dtype, b.dtype)  # torch 2.11 differentiates no error of two dtypes
    a, b = a.to(dtype), b.to(dtype)
    return F.mse_loss(a, b) if a.shape[0] else F.mse_loss(a, b, reduction="sum")
