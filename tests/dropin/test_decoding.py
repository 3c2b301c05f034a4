"""Decoding of indices, assignment of codebooks, and loading of state dicts."""

import copy
import pickle

import pytest
import torch
from torch import nn

import spinlock_fast as vq
from spinlock_fast import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig, GroupedVectorQuantizer
from spinlock_fast.compat import VectorQuantizer

pytestmark = [pytest.mark.filterwarnings("ignore:.* is not fused")]

HEADS = {
    "plain": {},
    "projection": {"codebook_dim": 3},
    "cosine": {"use_cosine_sim": True},
    "heads": {"heads": 2, "codebook_dim": 4},
    "projected heads": {"heads": 3, "codebook_dim": 2},
    "codebook per head": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "projected, codebook per head": {"heads": 3, "codebook_dim": 2, "separate_codebook_per_head": True},
    "one head with its codebook": {"separate_codebook_per_head": True},
    "affine": {"affine_param": True},
    "bridge": {"vq_bridge": nn.Linear(8, 8)},
}
STAGES = {
    "stages": {},
    "projected stages": {"codebook_dim": 4},
    "stages of several sizes": {"codebook_size": (5, 16, 7)},
    "shared": {"shared_codebook": True},
    "dropout": {"quantize_dropout": True, "codebook_dim": 4},
    "implicit": {"implicit_neural_codebook": True},
    "affine stages": {"affine_param": True},
    "beam": {"beam_size": 2},
}
LAYOUTS = {
    "sequence": ({}, (2, 5, 8)),
    "token": ({}, (6, 8)),
    "channels first": ({"channel_last": False}, (2, 8, 5)),
    "token, channels first": ({"channel_last": False}, (6, 8)),
    "image": ({"accept_image_fmap": True}, (2, 8, 3, 4)),
    "video": ({"accept_3d_fmap": True}, (2, 8, 2, 3, 4)),
}


def one(kind, layout):
    torch.manual_seed(0)
    options, shape = LAYOUTS[layout]
    return vq.VectorQuantize(dim=8, codebook_size=16, **HEADS[kind], **options), torch.randn(shape)


def stages(kind, layout, groups=None):
    torch.manual_seed(0)
    options, shape = LAYOUTS[layout]
    arguments = {"dim": 8, "codebook_size": 16, "num_quantizers": 3, **STAGES[kind], **options}
    if groups is None:
        return vq.ResidualVQ(**arguments), torch.randn(shape)
    arguments |= {"dim": 8 * groups, "groups": groups}
    return vq.GroupedResidualVQ(**arguments), torch.randn([8 * groups if n == 8 else n for n in shape])


def assert_decodes(quantizer, x, masked=True, batch_dim=0):
    quantizer(x)  # a training step
    quantizer.eval()
    quantized, codes, *_ = quantizer(x)
    torch.testing.assert_close(quantizer.get_output_from_indices(codes), quantized)
    narrow = codes.to(torch.int16)
    torch.testing.assert_close(quantizer.get_output_from_indices(narrow), quantized)
    if x.ndim == 3 and masked:
        rows = x.shape[1] if getattr(quantizer, "channel_last", True) else x.shape[2]
        mask = torch.arange(rows) < torch.tensor([[rows], [2]])
        quantized, codes, *_ = quantizer(x, mask=mask)
        assert (codes == -1).any()
        torch.testing.assert_close(quantizer.get_output_from_indices(codes), quantized)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", HEADS)
def test_vector_quantize_decodes_to_eval_output(kind, layout):
    quantizer, x = one(kind, layout)
    assert_decodes(quantizer, x)
    codes = quantizer(x)[1]
    vectors = quantizer.get_codes_from_indices(codes)
    assert torch.equal(vectors, quantizer.get_codes_from_indices(codes.to(torch.uint8)))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "video"])
@pytest.mark.parametrize("kind", STAGES)
def test_residual_vq_decodes_to_eval_output(kind, layout):
    assert_decodes(*stages(kind, layout))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "video"])
@pytest.mark.parametrize("kind", ["stages", "projected stages", "stages of several sizes", "dropout"])
def test_grouped_residual_vq_decodes_to_eval_output(kind, layout):
    quantizer, x = stages(kind, layout, groups=2)
    assert_decodes(quantizer, x)
    assert len(quantizer.codebooks) == 2
    with pytest.raises(ValueError, match="indices must be given for 2 groups, got 1"):
        quantizer.get_output_from_indices(quantizer(x)[1][:1])


def test_topk_codes_decode():
    quantizer, x = one("projection", "sequence")
    quantized, codes, _ = quantizer.eval()(x, topk=3)
    torch.testing.assert_close(quantizer.get_output_from_indices(codes), quantized)


def test_dropped_stages_decode():
    quantizer, x = stages("dropout", "sequence")
    quantized, codes, _ = quantizer(x, rand_quantize_dropout_fixed_seed=torch.tensor(2), freeze_codebook=True)
    assert (codes[..., 2] == -1).all()
    torch.testing.assert_close(quantizer.get_output_from_indices(codes), quantized)
    torch.testing.assert_close(quantizer.get_output_from_indices(codes[..., :2]), quantized)


@pytest.mark.parametrize(
    ("make", "indices"),
    [
        (lambda: one("plain", "sequence")[0], [[16]]),
        (lambda: one("plain", "sequence")[0], [[-2]]),
        (lambda: one("codebook per head", "sequence")[0], [[[3, 16]]]),
        (lambda: stages("stages", "sequence")[0], [[[0, 16, 0]]]),
        (lambda: stages("stages of several sizes", "sequence")[0], [[[5, 0, 0]]]),
    ],
)
def test_indices_outside_the_codebook_raise(make, indices):
    with pytest.raises(IndexError):
        make().get_output_from_indices(torch.tensor(indices))


def test_invalid_indices_raise():
    with pytest.raises(ValueError, match="indices must be integers, got"):
        one("plain", "sequence")[0].get_output_from_indices(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"of 2 heads, got \[2, 5\]"):
        one("heads", "sequence")[0].get_output_from_indices(torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="at most 3 stages, got 4"):
        stages("stages", "sequence")[0].get_output_from_indices(torch.zeros(2, 5, 4, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["plain", "cosine", "codebook per head"])
@pytest.mark.parametrize("steps", [0, 200])
def test_assigned_codes_survive_updates_without_rows(kind, steps):
    quantizer, x = one(kind, "sequence")
    x[:] = x[0, 0]  # all codes but one per codebook are unused
    for _ in range(steps):
        quantizer(x)
    codes = torch.randn(quantizer.codebook.shape)
    codes = nn.functional.normalize(codes, dim=-1) if kind == "cosine" else codes
    quantizer.codebook = codes
    torch.testing.assert_close(quantizer.codebook, codes)
    used = quantizer(x)[1].reshape(-1)
    still = torch.ones(16, dtype=torch.bool).index_fill_(0, used, False)
    torch.testing.assert_close(quantizer.codebook[..., still, :], codes[..., still, :], rtol=1e-3, atol=1e-4)


def test_assigned_codes_disable_kmeans_init():
    quantizer = vq.VectorQuantize(dim=8, codebook_size=4, kmeans_init=True, decay=0.99)
    codes = torch.randn(4, 8)
    quantizer.codebook = codes
    quantizer(torch.randn(1, 50, 8), freeze_codebook=True)
    assert torch.equal(quantizer.codebook, codes)
    with pytest.raises(ValueError, match=r"the codebook must be \[4, 8\], got \[8\]"):
        quantizer.codebook = codes[0]


def model(**options):
    groups, extra = {"a": [0, 3, 2], "b": [4, 1, 6]}, {"b": [5]}
    return CategoricalHierarchicalVQVAE(
        CategoricalVQVAEConfig(
            input_dim=8, group_indices=groups, extra_inputs=extra, group_embedding_dim=8, group_hidden_dim=12, **options
        )
    )


MODULES = {
    "one": lambda: vq.VectorQuantize(dim=8, codebook_size=16),
    "learned": lambda: vq.VectorQuantize(dim=8, codebook_size=16, learnable_codebook=True, ema_update=False),
    "k-means": lambda: vq.VectorQuantize(dim=8, codebook_size=16, kmeans_init=True),
    "heads": lambda: vq.VectorQuantize(8, 16, heads=2, codebook_dim=3, separate_codebook_per_head=True),
    "affine": lambda: vq.VectorQuantize(dim=8, codebook_size=16, affine_param=True),
    "stages": lambda: vq.ResidualVQ(dim=8, codebook_size=16, num_quantizers=3),
    "shared": lambda: vq.ResidualVQ(dim=8, codebook_size=16, num_quantizers=3, shared_codebook=True),
    "beam": lambda: vq.ResidualVQ(
        dim=8, codebook_size=16, num_quantizers=3, beam_size=2, beam_score_quantizer_weights=[1.0, 0.5, 0.25]
    ),
    "groups": lambda: vq.GroupedResidualVQ(dim=8, groups=2, codebook_size=16, num_quantizers=2),
    "packed": lambda: GroupedVectorQuantizer([9, 4], [5, 3], codebook_init="uniform"),
    "packed, k-means": lambda: GroupedVectorQuantizer([9, 4], [5, 3]),
    "packed, learned": lambda: GroupedVectorQuantizer([7, 5], [4, 4], use_ema=False),
    "original": lambda: VectorQuantizer(16, 8),
    "model": model,
}


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [one for part in (value.values() if isinstance(value, dict) else value) for one in tensors(part)]


def materialised(make, state):
    with torch.device("meta"):
        module = make()
    module = module.to_empty(device="cpu")
    module.load_state_dict(state)
    return module


def assigned(make, state):
    with torch.device("meta"):
        module = make()
    module.load_state_dict(copy.deepcopy(state), assign=True)
    return module


def loaded(make, state):
    module = make()
    module.load_state_dict(state)
    return module


def pickled(make, state):
    return pickle.loads(pickle.dumps(copy.deepcopy(loaded(make, state))))


@pytest.mark.parametrize("by", [materialised, assigned, loaded, pickled])
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("used", [False, True])
def test_state_dict_round_trip(kind, by, used, monkeypatch):
    real = torch.empty_like
    monkeypatch.setattr(  # simulates uninitialised memory in `to_empty`
        torch, "empty_like", lambda *a, **k: real(*a, **k).fill_(1) if k.get("device") == "cpu" else real(*a, **k)
    )
    torch.manual_seed(0)
    source, x = MODULES[kind](), torch.randn(60, 8)
    if used:
        source(x)
    module = by(MODULES[kind], source.state_dict())
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    for part in (*source.modules(), *module.modules()):
        getattr(part, "reset_usage", lambda: None)()
    expected, found = dict(source.named_buffers()), dict(module.named_buffers())
    assert expected.keys() == found.keys()
    for name, buffer in expected.items():
        assert torch.equal(buffer, found[name]), name
    for training in (False, True):
        results = []
        for part in (source.train(training), module.train(training)):
            torch.manual_seed(1)
            results.append(tensors(part(x)))
        torch.testing.assert_close(*results, equal_nan=True)
    torch.testing.assert_close(source.state_dict(), module.state_dict())


def test_new_state_loads_into_a_trained_layer():
    """The statistics of `affine_param` exist only after the first batch."""
    new, used = MODULES["affine"](), MODULES["affine"]()
    used(torch.randn(20, 8))
    state = new.state_dict()
    used.load_state_dict(state)
    assert used.state_dict().keys() == state.keys()
    with pytest.raises(RuntimeError, match="Missing key"):
        used.load_state_dict({name: value for name, value in state.items() if "embed_avg" not in name})


def test_shared_codebook_usage_is_zero_after_to_empty(monkeypatch):
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: real(*a, **k).fill_(1))
    with torch.device("meta"):
        module = vq.ResidualVQ(dim=8, codebook_size=16, num_quantizers=3, shared_codebook=True)
    module.to_empty(device="cpu")
    assert not module.layer(0)._codebook.usage.any()
    assert torch.nn.Sequential(module).to_empty(device="cpu")[0].layer(0)._codebook.usage.sum() == 0
