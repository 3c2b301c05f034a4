"""The model computes slices of a batch as it computes the whole batch, with the same dropout."""

import pytest
import torch

from spinlock_fast import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.kernels._common.dropout import BatchSlice
from spinlock_fast.models.losses import loss_terms

ROWS = 50
SLICES = [(slice(first, last), BatchSlice(first, ROWS)) for first, last in ((0, 0), (0, 1), (1, 30), (30, ROWS))]


@pytest.fixture
def model():
    groups = {"a": list(range(8)), "b": list(range(8, 20))}
    config = CategoricalVQVAEConfig(
        input_dim=20, group_indices=groups, group_embedding_dim=16, group_hidden_dim=32, dropout=0.3
    )
    return CategoricalHierarchicalVQVAE(config).train()


def test_latents_and_reconstructions_of_slices(model):
    x = torch.randn(ROWS, 20)

    def passes(rows, batch):
        torch.manual_seed(1)
        latents = model.encode(x[rows], batch)
        return latents, model.decode(latents, batch), torch.rand(1)

    latents, features, number = passes(slice(0, ROWS), None)
    parts = [passes(*part) for part in SLICES]
    assert torch.equal(torch.cat([part[0] for part in parts]), latents)
    assert torch.equal(torch.cat([part[1] for part in parts]), features)
    assert all(part[2] == number for part in parts)
    assert not torch.equal(model.encode(x), latents)  # there is dropout


def test_quantization_and_losses_of_slices(model):
    x = torch.randn(ROWS, 20)
    model.encode_and_quantize(x)[1]()  # initialises the codes
    model.requires_grad_(False).quantizer.eval()

    def passes(rows, batch):
        torch.manual_seed(1)
        out, _ = model.encode_and_quantize(x[rows], batch)
        return out, loss_terms(model, x[rows], out, 0, batch=batch).reconstruction

    whole, expected = passes(slice(0, ROWS), None)
    parts = [passes(*part) for part in SLICES]
    for name in ("latents", "tokens", "quantized"):
        assert torch.equal(torch.cat([out[name] for out, _ in parts]), whole[name])
    total = sum(loss * len(out["latents"]) for out, loss in parts if len(out["latents"]))
    torch.testing.assert_close(total / ROWS, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_compiled_slices(model):
    x = torch.randn(ROWS, 20)
    compiled = torch.compile(lambda x, batch: model.decode(model.encode(x, batch), batch), backend="aot_eager")

    def passes(rows, batch):
        torch.manual_seed(1)
        return compiled(x[rows], batch)

    whole = passes(slice(0, ROWS), None)
    for rows, batch in SLICES[1:]:
        torch.testing.assert_close(passes(rows, batch), whole[rows])
