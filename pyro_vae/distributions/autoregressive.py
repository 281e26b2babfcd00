"""Images value by value, each given those before it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_vae.networks.autoregressive import PixelCNN

__all__ = ["Autoregressive"]

_PATIENCE = 2.0  # seconds of sampling that need no progress bar


class Autoregressive(TorchDistribution):
    r"""The distribution of an image whose values are drawn one after the other, each given those before it.

    .. math:: p(x \mid c) = \prod_i p(x_i \mid \theta_i), \quad \theta_i = f_i(x_{<i}, c)

    Values are in raster order of their positions, and in the order of the channels at one position. The log-density
    takes one pass of the network; a draw takes a pass over the rows above for each row, and one over its own row for
    each position. A progress bar on the standard error shows a draw that will take longer than two seconds.

    Args:
        network: The network :math:`f`.
        context: What all values are conditioned on, of shape `(*batch, network.channels, H, W)`.
        pixel_likelihood: A likelihood of event shape `()`, whose `from_outputs(outputs, leading)` gives the
            distributions of values from outputs of shape `(*leading, network.num_params)`. The network sees values
            scaled to [-1, 1] from the bounds of its support, or from [0, 1] where it has none; where it has a lower
            bound only, `log(1 + value - bound)`.

    Reference:
        van den Oord et al., 2016. Conditional image generation with PixelCNN decoders.

    Example:
        >>> from pyro_vae.likelihoods import Bernoulli
        >>> context = torch.zeros(3, 4, 8, 8)
        >>> fn = Autoregressive(PixelCNN((1, 8, 8), 1, channels=4), context, Bernoulli(nn.Identity(), ()))
        >>> fn.log_prob(fn.sample()).shape
        torch.Size([3])
    """

    arg_constraints = {}  # noqa: RUF012

    def __init__(
        self, network: PixelCNN, context: Tensor, pixel_likelihood: nn.Module, validate_args: bool | None = None
    ):
        self.network = network
        self.context = context
        self.pixel_likelihood: Any = pixel_likelihood
        self._pixel_support = self._pixels(context.new_zeros(network.num_params)).support
        super().__init__(context.shape[:-3], Size(network.event_shape), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """The support of every value."""
        return constraints.independent(self._pixel_support, 3)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Autoregressive:
        """The same distribution over a larger batch."""
        new = self._get_checked_instance(Autoregressive, _instance)
        new.network, new.pixel_likelihood = self.network, self.pixel_likelihood
        new.context = self._context(Size(batch_shape))
        new._pixel_support = self._pixel_support
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def given(self, value: Tensor) -> Any:
        """The distributions of all values, each given the values of `value` before it, from one pass of the network."""
        leading = torch.broadcast_shapes(self.batch_shape, value.shape[:-3])
        x = self._inputs(value).expand(*leading, *self.event_shape)
        return self._pixels(self.network(x, self._context(leading)).movedim(-4, -1)).to_event(3)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, in one pass of the network."""
        if self._validate_args:
            self._validate_sample(value)
        return self.given(value).log_prob(value)

    @property
    def mean(self) -> Tensor:
        """An unbiased estimate of the mean, which has no closed form: the means of all values, given those of one draw.

        It takes a draw, and so random numbers; it varies less than the draw does.
        """
        with torch.no_grad():
            return self.given(self.sample()).mean

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw, value by value."""
        shape = self._extended_shape(Size(sample_shape))
        context = self._context(shape[:-3]).reshape(-1, *self.context.shape[-3:])
        x = context.new_zeros(len(context), *self.event_shape)
        with torch.no_grad():
            for row in _with_progress(self.event_shape[-2]):
                self._draw_row(x, context, row)
        return x.reshape(shape)

    def _draw_row(self, x: Tensor, context: Tensor, row: int) -> None:
        """Draw a row of `x` in place. The network never looks below or to the right, where all is cut off."""
        network, bias = self.network, self.network.output_bias
        above = network.above(self._inputs(x[:, :, : row + 1]), context[:, :, : row + 1])
        links = [link[:, :, -1:] for link in above]
        for column in range(x.shape[-1]):
            until = self._inputs(x[:, :, row : row + 1, : column + 1])
            features = network.left_of(until, [link[..., : column + 1] for link in links])[..., -1:]
            for channel in range(x.shape[1]):
                here = self._inputs(x[:, :, row : row + 1, column : column + 1])
                outputs = network.outputs(channel, features, here).flatten(1) + bias[:, channel, row, column]
                x[:, channel, row, column] = self._pixels(outputs).sample().to(x)

    def _pixels(self, outputs: Tensor) -> Any:
        return self.pixel_likelihood.from_outputs(outputs, outputs.shape[:-1])

    def _context(self, leading: Size) -> Tensor:
        return self.context.expand(*leading, *self.context.shape[-3:])

    def _inputs(self, value: Tensor) -> Tensor:
        """Values on a scale that a network starts well from."""
        lower, upper = (getattr(self._pixel_support, f"{side}_bound", None) for side in ("lower", "upper"))
        if lower is not None and upper is None:
            return torch.log1p(value - lower)
        lower, upper = (0.0, 1.0) if lower is None or upper is None else (lower, upper)
        return 2 * (value - lower) / (upper - lower) - 1


def _with_progress(rows: int) -> Iterator[int]:
    """The rows from 0, and a progress bar as soon as the time of the first says that they will take long."""
    start, bar, task = time.monotonic(), None, None
    with ExitStack() as stack:
        for row in range(rows):
            yield row
            if bar is None and (time.monotonic() - start) * rows / (row + 1) > _PATIENCE:
                from rich.console import Console
                from rich.progress import Progress

                bar = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
                task = bar.add_task("sampling", total=rows)
            if bar is not None and task is not None:
                bar.update(task, completed=row + 1)
