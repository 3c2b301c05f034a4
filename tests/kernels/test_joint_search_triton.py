"""The Triton kernel of the joint search against the reference: interpreted without a CUDA device."""

import pytest
import torch

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.joint_search import Decoder, joint_search

pytest.importorskip("triton", reason="the package triton is not installed here")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    *([pytest.mark.gpu] if ON_GPU else []),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # numpy in the interpreter, for NaN
]


def problem(sizes, rows, features, hidden, seed=0, linear=False):
    """Rows that some codes nearly reconstruct, other codes, and the codebook and decoder."""
    layout = CodebookLayout.of(*zip(*sizes, strict=True))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    decoder = Decoder(normal(layout.total_dims, hidden), normal(hidden), normal(hidden, features), normal(features))
    if linear:
        decoder = decoder._replace(linear=6.0 * normal(layout.total_codes, features))
    codes = torch.stack([torch.randint(k, (rows,), generator=generator) for k in layout.num_codes], 1)
    return (
        layout,
        [3.0 * normal(rows, features), codes, normal(layout.total_entries)],
        decoder,
        normal(rows, layout.total_dims),
    )


def cast(decoder, *to):
    return Decoder(*(None if part is None else part.to(*to) for part in decoder))


@pytest.mark.parametrize(
    ("candidates", "weight", "perturbations", "linear"),
    [(None, 0.0, 0, False), (3, 0.5, 0, True), (None, 0.5, 2, False), (None, 0.0, 1, True)],
)
@pytest.mark.parametrize(
    ("sizes", "rows", "features", "hidden"),
    [([(5, 3)], 1, 3, 5), ([(9, 4), (1, 2), (17, 5)], 21, 70, 40)],
    ids=["small", "tiles"],
)
def test_matches_the_reference(monkeypatch, sizes, rows, features, hidden, candidates, weight, perturbations, linear):
    layout, arguments, decoder, latents = problem(sizes, rows, features, hidden, linear=linear)
    x, codes, codebook = arguments
    if rows > 5:
        x[4, 1], codes[5, 0] = torch.nan, -1
    expected = joint_search(
        x.double(),
        codes,
        codebook.double(),
        cast(decoder, torch.float64),
        layout,
        2,
        weight,
        latents,
        candidates,
        perturbations=perturbations,
    )
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t: empty_like(t).fill_(torch.nan if t.is_floating_point() else -9))
    found = joint_search(
        *(t.to(DEVICE) for t in (x, codes, codebook)), cast(decoder, DEVICE), layout, 2,
        weight, latents.to(DEVICE), candidates, "triton", perturbations,
    ).cpu()  # fmt: skip
    assert torch.equal(found, expected)
    assert rows == 1 or not torch.equal(found, codes)


def test_equal_codes_and_codes_that_are_not_finite():
    layout, (x, codes, codebook), decoder, _ = problem([(12, 2), (5, 2)], 20, 12, 8)
    codebook[12:24] = codebook[:12]  # codes 6 .. 11 equal 0 .. 5
    codebook[0] = torch.inf
    codes[:, 0] = 7
    on_device = [t.to(DEVICE) for t in (x, codes, codebook)]
    found = joint_search(*on_device, cast(decoder, DEVICE), layout, backend="triton").cpu()
    assert ((found[:, 0] < 6) | (found[:, 0] == 6) | (found[:, 0] == 7)).all()
    assert (found[:, 0] != 0).all()
    assert torch.equal(found, joint_search(x, codes, codebook, decoder, layout, backend="reference"))
