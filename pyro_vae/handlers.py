"""Handlers: messengers that change or watch a program from outside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["beta", "in_data_plate", "record"]


def in_data_plate(site: Any) -> bool:
    """Whether a sample site is local: in the plate named "data"."""
    return any(frame.name == "data" for frame in site["cond_indep_stack"])


class beta(Messenger):
    r"""Multiply the scale of every latent site, in model and guide, by `value`.

    .. math:: \log p(x \mid z) + \beta\, (\log p(z) - \log q(z \mid x))

    Used around an estimator's call it weighs the rate by beta. It nests with itself, `poutine.scale` and plates;
    unlike `poutine.scale`, it takes 0.

    Args:
        value: The weight beta, at least 0.

    Raises:
        ValueError: If `value` is negative.

    Reference:
        Bowman et al., 2016. Generating sentences from a continuous space. Higgins et al., 2017. beta-VAE.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro import poutine
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
        >>> with beta(0.5):
        ...     trace = poutine.trace(model).get_trace()
        >>> trace.nodes["z"]["scale"], trace.nodes["x"]["scale"]
        (0.5, 1.0)
    """

    def __init__(self, value: float | Tensor):
        super().__init__()
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"beta: expected a value of at least 0, got {value}")
        self.value = value

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = self.value * msg["scale"]


class record(Messenger):
    r"""Record rate and distortion, datum by datum, while an estimator runs a model and a guide.

    .. math:: R_b = \log q(z_b \mid x_b) - \log p(z_b), \qquad D_b = -\log p(x_b \mid z_b)

    Both are unscaled, so that they mean the same under annealing and subsampling, and are averaged over particles. It
    costs little: the log-probability of the data is computed once, and shared with the estimator's trace. Sites outside
    the plate "data" belong to no datum and are left out.

    Attributes:
        rate: Tensor of shape `(B,)` in nats, detached; NaN where latents are enumerated and not sampled.
        distortion: The same for the distortion.
        num_data: Size of the data set that the plate "data" stands for, so that loss / num_data is per datum.

    Example:
        >>> import pyro_vae
        >>> from pyro.infer import Trace_ELBO
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)
        >>> with record() as recorded:
        ...     loss = Trace_ELBO().loss(recorded.model(vae.model), recorded.guide(vae.guide), x)
        >>> torch.allclose((recorded.rate + recorded.distortion).sum(), torch.tensor(loss))
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self._sites: list[tuple[str, Any, Tensor]] = []  # of model or guide, the message, its log-probability
        self._program = ""

    def __enter__(self) -> record:
        self._sites = []
        return super().__enter__()

    def model(self, program: Callable) -> Callable:
        """The model, with its sites filed as the model's."""
        return self._filed(program, "model")

    def guide(self, program: Callable) -> Callable:
        """The guide, with its sites filed as the guide's."""
        return self._filed(program, "guide")

    def _filed(self, program: Callable, name: str) -> Callable:
        @functools.wraps(program)
        def filed(*args: Any, **kwargs: Any) -> Any:
            self._program = name
            return program(*args, **kwargs)

        return filed

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        log_prob = msg["fn"].log_prob(msg["value"])
        if msg["is_observed"]:
            # The outermost handler comes first after a site has run: the estimator's trace will copy what is in the
            # message, and not compute it again. Latents are left to the estimator: TraceGraph_ELBO marks their values
            # only later, to follow what depends on them.
            msg["unscaled_log_prob"] = log_prob
            msg["log_prob"] = scale_and_mask(log_prob, msg["scale"], msg["mask"])
            msg["log_prob_sum"] = msg["log_prob"].sum()
        self._sites.append((self._program, msg, log_prob))

    @property
    def rate(self) -> Tensor:
        """Log q(z given x) - log p(z), of shape `(B,)`."""
        return self._log_prob("guide", observed=False) - self._log_prob("model", observed=False)

    @property
    def distortion(self) -> Tensor:
        """Minus log p(x given z), of shape `(B,)`."""
        return -self._log_prob("model", observed=True)

    @property
    def num_data(self) -> int:
        """Size of the data set behind the batch."""
        return self._frame().full_size

    def _frame(self) -> Any:
        for _, msg, _ in self._sites:
            for frame in msg["cond_indep_stack"]:
                if frame.name == "data":
                    return frame
        names = [msg["name"] for _, msg, _ in self._sites]
        raise ValueError(f'expected sites in a plate named "data" at dim=-1, got {names}')

    def _log_prob(self, program: str, observed: bool) -> Tensor:
        """Sum over sites and mean over particles, of shape `(B,)`."""
        size = self._frame().size
        if any("_enumerate_dim" in msg["infer"] or msg["infer"].get("enumerate") for _, msg, _ in self._sites):
            return torch.full((size,), torch.nan)
        names, log_probs = [], []
        for owner, msg, unscaled in self._sites:
            if owner == program and msg["is_observed"] == observed and in_data_plate(msg):
                log_prob = scale_and_mask(unscaled.detach(), mask=msg["mask"])
                names.append(msg["name"])
                log_probs.append(log_prob if log_prob.ndim == 1 else log_prob.reshape(-1, size).mean(0))
        if not names:
            return torch.zeros(size)
        # Particles that are not vectorized come one pass after another.
        return functools.reduce(torch.add, log_probs) / names.count(names[0])

    def first_nonfinite(self) -> str:
        """The first site that was not finite, in words."""
        for program, msg, log_prob in self._sites:
            if not msg["value"].isfinite().all():
                return f"{msg['name']!r} of the {program} (its value)"
            if not log_prob.isfinite().all():
                return f"{msg['name']!r} of the {program} (its log-probability)"
        return "none, though the loss is"
