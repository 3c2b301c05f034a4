"""A small convolutional VQ-VAE on scikit-learn's 8 x 8 digits: 16 tokens per image.

python examples/image_vqvae.py [--epochs 20] [--codes 64] [--output digits.png]

Needs scikit-learn; with matplotlib, also writes an image of originals and reconstructions.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import spinlock_fast

HELD_OUT = 297


class ImageVQVAE(nn.Module):
    """Convolutional VQ-VAE from images [b, 1, 8, 8] in [0, 1] to tokens [b, 4, 4] and back."""

    def __init__(self, codes: int, dim: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, hidden // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden // 2, hidden, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, dim, 3, padding=1),
        )
        self.vq = spinlock_fast.VectorQuantize(
            dim=dim,
            codebook_size=codes,
            decay=0.9,
            kmeans_init=True,
            threshold_ema_dead_code=4,
            commitment_weight=0.25,
            accept_image_fmap=True,
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, hidden, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(hidden, hidden // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden // 2, 1, 3, padding=1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructions [b, 1, 8, 8], tokens [b, 4, 4] and the commitment loss."""
        quantized, tokens, loss = self.vq(self.encoder(images))
        return self.decoder(quantized), tokens, loss

    def decode(self, tokens: Tensor) -> Tensor:
        """Images [b, 1, 8, 8] of tokens [b, 4, 4]."""
        images: Tensor = self.decoder(self.vq.get_output_from_indices(tokens))
        return images


@torch.no_grad()
def held_out_error(model: ImageVQVAE, images: Tensor) -> float:
    """Mean squared reconstruction error, in eval mode: codes are not updated."""
    model.eval()
    return F.mse_loss(model(images)[0], images).item()


def train(epochs: int, codes: int, seed: int = 0) -> tuple[ImageVQVAE, Tensor]:
    """The trained model and the held-out images; prints a line per epoch (utilization and perplexity in training)."""
    torch.manual_seed(seed)
    images = torch.from_numpy(load_digits().images).float()[:, None] / 16.0
    images = images[torch.randperm(len(images))]
    held_out, images = images[:HELD_OUT], images[HELD_OUT:]
    model = ImageVQVAE(codes)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    print("epoch  reconstruction error  utilization  perplexity")
    for epoch in range(1, epochs + 1):
        model.train()
        model.vq.reset_usage()
        for batch in images[torch.randperm(len(images))].split(100):
            reconstruction, _, commitment = model(batch)
            loss = F.mse_loss(reconstruction, batch) + commitment
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        error, used, perplexity = held_out_error(model, held_out), model.vq.utilization(), model.vq.perplexity()
        print(f"{epoch:5d}  {error:20.5f}  {used.item():11.2f}  {perplexity.item():7.1f} of {codes}")
    return model, held_out


@torch.no_grad()
def draw(model: ImageVQVAE, images: Tensor, path: Path, columns: int = 12) -> None:
    """Writes an image with pairs of rows: originals, and below them their reconstructions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = 3
    images = images[: rows * columns]
    decoded = model.eval().decode(model(images)[1]).clamp(0.0, 1.0)
    pairs = torch.stack([images.view(rows, columns, 8, 8), decoded.view(rows, columns, 8, 8)], dim=1)
    figure, axes = pyplot.subplots(2 * rows, columns, figsize=(0.62 * columns + 1.1, 1.3 * rows), squeeze=False)
    for row, images_of_row in enumerate(pairs.flatten(0, 1)):
        for axis, image in zip(axes[row], images_of_row, strict=True):
            axis.imshow(image.numpy(), cmap="gray_r", vmin=0.0, vmax=1.0)
            axis.set(xticks=[], yticks=[])
        axes[row][0].set_ylabel("original" if row % 2 == 0 else "decoded", rotation=0, ha="right", va="center")
    figure.suptitle("Held-out digits and their reconstructions from 16 tokens")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--codes", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("digits.png"))
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    model, held_out = train(options.epochs, options.codes)
    print(f"trained in {time.perf_counter() - start:.1f} s")
    try:
        draw(model, held_out, options.output)
    except ModuleNotFoundError as error:
        print(f"no picture: {error.name} is not installed")
    else:
        print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
