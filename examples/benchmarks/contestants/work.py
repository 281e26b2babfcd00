"""What is trained: images, and one network for all."""

import dataclasses
import gzip
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

PIXELS = 28


@dataclasses.dataclass(frozen=True)
class Work:
    """A network, a batch size and an estimator.

    Attributes:
        batch_size: Data in a batch.
        hidden: Widths of the perceptron's hidden layers, in the encoder's order, or channels of convolutions with
            kernels of 4 x 4 and stride 2.
        convolutional: Whether they are channels.
        activation: Name of the activation in `torch.nn`.
        particles: The ELBO with one, and the importance-weighted bound with more.
    """

    batch_size: int
    hidden: tuple[int, ...] = (400,)
    convolutional: bool = False
    activation: str = "ReLU"
    particles: int = 1
    latent: int = 50

    @property
    def event_shape(self):
        """Shape of an image."""
        return (1, PIXELS, PIXELS) if self.convolutional else (PIXELS**2,)

    @property
    def features(self):
        """Values between the convolutions and the linear layers."""
        return self.hidden[-1] * (PIXELS // 2 ** len(self.hidden)) ** 2


def networks(work):
    """Encoder and decoder in PyTorch, as it starts them."""
    return _convolutional(work) if work.convolutional else _perceptrons(work)


def _perceptrons(work):
    def perceptron(*widths):
        layers = [nn.Linear(widths[0], widths[1])]
        for width, following in pairwise(widths[1:]):
            layers += [getattr(nn, work.activation)(), nn.Linear(width, following)]
        return nn.Sequential(*layers)

    return perceptron(PIXELS**2, *work.hidden, 2 * work.latent), perceptron(work.latent, *work.hidden[::-1], PIXELS**2)


def _convolutional(work):
    activation = getattr(nn, work.activation)
    down, up, channels = [], [], (1, *work.hidden)
    for fewer, more in pairwise(channels):
        down += [nn.Conv2d(fewer, more, 4, stride=2, padding=1), activation()]
        up = [activation(), nn.ConvTranspose2d(more, fewer, 4, stride=2, padding=1), *up]
    side = PIXELS // 2 ** len(work.hidden)
    encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(work.features, 2 * work.latent))
    decoder = nn.Sequential(
        nn.Linear(work.latent, work.features), up[0], nn.Unflatten(1, (work.hidden[-1], side, side)), *up[1:]
    )
    return encoder, decoder


def batches(x, batch_size):
    """An epoch's batches of data in memory, as floats."""
    for rows in torch.randperm(len(x)).split(batch_size):
        yield x[rows].float().div_(255)


def images(num_data, root=None):
    """Black and white images as they lie on disk, `uint8` of 0 and 255: MNIST, or drawn at random.

    Their values do not change what a step costs. Those drawn have something to be learned, ten factors, so that the
    losses of contestants can be compared.
    """
    if root is not None:
        raw = np.frombuffer(_opened(Path(root) / "MNIST" / "raw" / "train-images-idx3-ubyte"), np.uint8, offset=16)
        x = torch.from_numpy(raw.reshape(-1, PIXELS**2)[:num_data].copy())
        return (x > 127).to(torch.uint8) * 255
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, PIXELS**2, generator=generator) / math.sqrt(10)
    x = torch.empty(num_data, PIXELS**2, dtype=torch.uint8)
    for part in x.split(10_000):  # a million at once would need floats of 3 GB
        part.copy_((torch.randn(len(part), 10, generator=generator) @ patterns > 1.1) * 255)
    return x


def _opened(path):
    return path.read_bytes() if path.is_file() else gzip.decompress(path.with_suffix(".gz").read_bytes())
