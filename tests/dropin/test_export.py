"""Export of quantizers and of the tokenizer's model by torch.export and ONNX, without custom operators."""

import io

import pytest
import torch
from torch import nn

import spinlock_fast as vq
from spinlock_fast import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig, GroupedVectorQuantizer
from spinlock_fast.compat import VectorQuantizer
from spinlock_fast.compat.codecs import FactorizedResidualVQ

pytestmark = pytest.mark.filterwarnings("ignore")
STAGES = {"dim": 8, "codebook_size": 16, "num_quantizers": 3}


class Tokens(nn.Module):
    """Features to tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.get_tokens(x)


class Decoder(nn.Module):
    """Input -> indices -> output."""

    def __init__(self, quantizer):
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x):
        return self.quantizer.get_output_from_indices(self.quantizer(x)[1])


def model(**options):
    groups = {"a": [0, 1, 2, 3], "b": [4, 6, 5, 7]}
    return CategoricalHierarchicalVQVAE(
        CategoricalVQVAEConfig(
            input_dim=8, group_indices=groups, group_embedding_dim=8, group_hidden_dim=12, codebook_init="uniform",
            **options,
        )
    )  # fmt: skip


KINDS = {
    "plain": lambda: vq.VectorQuantize(8, 16),
    "cosine": lambda: vq.VectorQuantize(8, 16, use_cosine_sim=True),
    "projected heads": lambda: vq.VectorQuantize(8, 16, heads=2, codebook_dim=3),
    "codebook per head": lambda: vq.VectorQuantize(8, 16, heads=2, codebook_dim=4, separate_codebook_per_head=True),
    "learned": lambda: vq.VectorQuantize(8, 16, learnable_codebook=True, ema_update=False),
    "random codes": lambda: vq.VectorQuantize(8, 16, stochastic_sample_codes=True),
    "k-means": lambda: vq.VectorQuantize(8, 16, kmeans_init=True),
    "stages": lambda: vq.ResidualVQ(**STAGES),
    "projected stages": lambda: vq.ResidualVQ(**STAGES, codebook_dim=4, quantize_dropout=True),
    "cosine stages": lambda: vq.ResidualVQ(**STAGES, use_cosine_sim=True),
    "learned stages": lambda: vq.ResidualVQ(**STAGES, learnable_codebook=True, ema_update=False),
    "groups": lambda: vq.GroupedResidualVQ(dim=8, groups=2, codebook_size=16, num_quantizers=2),
    "packed": lambda: GroupedVectorQuantizer([9, 4], [5, 3], codebook_init="uniform"),
    "packed, learned": lambda: GroupedVectorQuantizer([9, 4], [5, 3], codebook_init="uniform", use_ema=False),
    "packed, rotation": lambda: GroupedVectorQuantizer([9, 4], [5, 3], codebook_init="uniform", rotation_trick=True),
    "original": lambda: VectorQuantizer(16, 8),
    "codec": lambda: FactorizedResidualVQ(8, [16, 9], [4, 3]),
    "model": model,
    "learned model": lambda: model(use_ema=False),
    "tokens": lambda: Tokens(model()),
    "decoder": lambda: Decoder(vq.VectorQuantize(8, 16, heads=2, codebook_dim=3, separate_codebook_per_head=True)),
    "decoder of stages": lambda: Decoder(vq.ResidualVQ(**STAGES, codebook_dim=4)),
}
SAVED = ("plain", "learned", "stages", "packed", "model")
FAST = ("plain", "projected heads", "k-means", "projected stages", "packed", "learned model", "tokens", "decoder")
MASKED = ("plain", "projected heads", "stages", "projected stages")


class Several(nn.Module):
    """Several quantizers, without and with a mask."""

    def __init__(self, parts, masked):
        super().__init__()
        self.parts = nn.ModuleList(KINDS[kind]() for kind in parts)
        self.masked = nn.ModuleList(KINDS[kind]() for kind in masked)

    def forward(self, x, mask):
        rows = x.flatten(0, 1)
        return [part(rows) for part in self.parts], [part(x, mask=mask) for part in self.masked]


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [one for part in (value.values() if isinstance(value, dict) else value) for one in flat(part)]


def build(kind):
    torch.manual_seed(0)
    module = KINDS[kind]() if isinstance(kind, str) else Several(*kind)
    if kind == "k-means":
        with pytest.raises(ValueError, match="k-means has not fitted the codes"):
            torch.export.export(module.eval(), (torch.randn(30, 8),))
        module.train()(torch.randn(30, 8))
    return module.eval()


def compare(expected, found):
    assert len(expected) == len(found)
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_exported_graph_has_no_custom_operators(kind):
    module, x = build(kind), torch.randn(12, 8)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(module, (x,), dynamic_shapes=((rows, None),) if kind != "tokens" else None)
    assert not any("spinlock" in str(node.target) for node in program.graph.nodes)
    if kind in SAVED:
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        program = torch.export.load(file)
    run = program.module()
    for size in (12,) if kind == "tokens" else (12, 31):
        other = torch.randn(size, 8)
        compare(flat(module(other)), flat(run(other)))  # the module itself still works
    module.train()
    if kind not in ("tokens", "decoder", "decoder of stages", "codec"):
        module(x)


@pytest.mark.parametrize("kind", MASKED)
def test_exported_graph_takes_a_mask(kind):
    module, x, mask = build(kind), torch.randn(2, 6, 8), torch.rand(2, 6) > 0.4
    program = torch.export.export(module, (x,), {"mask": mask})
    other = torch.rand(2, 6) > 0.4
    compare(flat(module(x, mask=other)), flat(program.module()(x, mask=other)))


def run_onnx(module, arguments, tmp_path, dynamic=None):
    """Exports to ONNX; returns a function that runs the model in onnxruntime."""
    pytest.importorskip("onnxscript", reason="pip install onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    program = torch.onnx.export(module, arguments, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    program.save(tmp_path / "quantizer.onnx")
    session = runtime.InferenceSession(tmp_path / "quantizer.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs):
        outputs = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        return [torch.from_numpy(output) for output in outputs]

    return run


@pytest.mark.parametrize(
    "kinds", [(["packed"], ["projected stages"]), pytest.param((["cosine"], ["plain"]), marks=pytest.mark.slow)]
)
def test_onnx(kinds, tmp_path):
    module, mask = build(kinds), torch.rand(2, 6) > 0.4
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},) * 2
    run = run_onnx(module, (torch.randn(2, 6, 8), mask), tmp_path, dynamic)
    for batch in (2, 5):
        x, mask = torch.randn(batch, 6, 8), torch.rand(batch, 6) > 0.4
        compare(flat(module(x, mask)), run(x, mask))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_of_every_quantizer(kind, tmp_path):
    module = build(kind)
    run = run_onnx(module, (torch.randn(12, 8),), tmp_path)
    x = torch.randn(12, 8)
    compare(flat(module(x)), run(x))
