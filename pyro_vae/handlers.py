"""Handlers: messengers that change or watch a program from outside."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["beta", "in_data_plate", "record", "weigh"]


def in_data_plate(site: Any) -> bool:
    """Whether a sample site is local: in the plate named "data"."""
    return data_frame(site) is not None


def data_frame(site: Any) -> Any:
    """The frame of the plate "data" that a sample site is in, or None."""
    return next((frame for frame in site["cond_indep_stack"] if frame.name == "data"), None)


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
        check_weight("beta", value)
        self.value = value

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = self.value * msg["scale"]


def check_weight(name: str, value: float | Tensor) -> None:
    if not isinstance(value, Tensor) and not value >= 0:
        raise ValueError(f"{name}: expected a value of at least 0, got {value}")


class weigh(Messenger):
    r"""Multiply the scale of the sites that are named, in model and guide.

    .. math:: \sum_i v_i \log p(x_i \mid z) + \sum_j w_j\, (\log p(z_j) - \log q(z_j \mid x))

    Used around `fit`, or around an estimator's call, it weighs one latent's share of the rate or one column of the data
    against the others. It nests with `beta`, `poutine.scale` and plates. A name that no site has is warned of when the
    handler is left. A run directory does not know of it: resume the run within it too.

    Args:
        weights: The weights, at least 0, by the names of their sites.

    Raises:
        ValueError: If a weight is negative.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro import poutine
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
        >>> with weigh({"x": 2.0}):
        ...     trace = poutine.trace(model).get_trace()
        >>> trace.nodes["z"]["scale"], trace.nodes["x"]["scale"]
        (1.0, 2.0)
    """

    def __init__(self, weights: Mapping[str, float | Tensor]):
        super().__init__()
        for name, weight in weights.items():
            check_weight(f"weigh, site {name!r}", weight)
        self.weights = dict(weights)
        self._seen: dict[str, bool] = {}  # names of the sites that came by, and whether they were observed

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        self._seen[msg["name"]] = msg["is_observed"]
        if msg["name"] in self.weights:
            weight = self.weights[msg["name"]]
            msg["scale"] = weight * msg["scale"]
            # What tells a site's own weight from a scale of the data, which belongs outside of a bound.
            msg["infer"] = {**msg["infer"], "_weight": weight * msg["infer"].get("_weight", 1.0)}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        unknown = sorted(self.weights.keys() - self._seen.keys())
        # Only a model has all sites, which shows by the data: a guide alone has none.
        if unknown and any(self._seen.values()) and error[0] is None:
            warnings.warn(
                f"weigh: expected names among the sites {', '.join(self._seen)}, got {', '.join(unknown)}", stacklevel=2
            )


class _Site(NamedTuple):
    """What `record` keeps of a sample site."""

    program: str  # model or guide
    run: int  # of model or guide, counted together
    name: str
    observed: bool
    frame: Any  # of the plate "data", or None
    value: Tensor
    log_prob: Tensor  # under the site's mask
    enumerated: bool  # so that rate and distortion cannot be told
    dreamt: bool  # data that the model drew, as in the sleep phase of wake-sleep


class record(Messenger):
    r"""Record rate and distortion, datum by datum, while an estimator runs a model and a guide.

    .. math:: R_b = \log q(z_b \mid x_b) - \log p(z_b), \qquad D_b = -\log p(x_b \mid z_b)

    Both are unscaled, so that they mean the same under annealing and subsampling, and are averaged over particles, each
    of which weighs the same, in however many runs of model and guide they come. It costs little: the log-probability of
    the data is computed once, and shared with the estimator's trace, and of a site only value and log-probability are
    kept. Sites outside the plate "data" belong to no datum and are left out, and so are data that the model dreams, as
    in the sleep phase of wake-sleep.

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
        self._sites: list[_Site] = []
        self._program, self._run = "", 0

    def __enter__(self) -> record:
        self._sites, self._run = [], 0
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
            self._program, self._run = name, self._run + 1
            return program(*args, **kwargs)

        return filed

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        # With gradients, though it is detached below: a flow keeps what it computes here for the estimator.
        log_prob = msg["fn"].log_prob(msg["value"])
        if msg["is_observed"]:
            # The outermost handler comes first after a site has run: the estimator's trace will copy what is in the
            # message, and not compute it again. Latents are left to the estimator: TraceGraph_ELBO marks their values
            # only later, to follow what depends on them.
            msg["unscaled_log_prob"] = log_prob
            msg["log_prob"] = scale_and_mask(log_prob, msg["scale"], msg["mask"])
            msg["log_prob_sum"] = msg["log_prob"].sum()
        self._sites.append(self._kept(msg, log_prob.detach()))

    def _kept(self, msg: Any, log_prob: Tensor) -> _Site:
        """No message, whose distribution holds what networks gave for every particle, and no graph."""
        infer = msg["infer"]
        return _Site(
            program=self._program,
            run=self._run,
            name=msg["name"],
            observed=msg["is_observed"],
            frame=data_frame(msg),
            value=msg["value"].detach(),
            log_prob=scale_and_mask(log_prob, mask=msg["mask"]),
            enumerated=bool("_enumerate_dim" in infer or infer.get("enumerate")),
            dreamt="was_observed" in infer,
        )

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
        for site in self._sites:
            if site.frame is not None:
                return site.frame
        names = [site.name for site in self._sites]
        raise ValueError(f'expected sites in a plate named "data" at dim=-1, got {names}')

    def _log_prob(self, program: str, observed: bool) -> Tensor:
        """Sum over sites and mean over particles, of shape `(B,)`."""
        size = self._frame().size
        if any(site.enumerated for site in self._sites):
            return torch.full((size,), torch.nan)
        local = self._local(program)
        particles: dict[int, int] = {}  # of each run: those of the site that has most, since others may be shared
        for site in local:
            particles[site.run] = max(site.log_prob.numel() // size, particles.get(site.run, 1))
        total = sum(
            site.log_prob.reshape(-1, size).mean(0) * particles[site.run] for site in local if site.observed == observed
        )
        return torch.as_tensor(total).expand(size) / max(sum(particles.values()), 1)

    def _local(self, program: str) -> list[_Site]:
        dreams = {site.run for site in self._sites if site.dreamt}
        runs = {site.run for site in self._sites if site.program == "model"} - dreams
        if program == "guide":
            # A run of the guide that no model follows is no particle: it looks for global latents, for example.
            runs = {run - 1 for run in runs}
        return [site for site in self._sites if site.program == program and site.frame is not None and site.run in runs]

    def first_nonfinite(self) -> str:
        """The first site that was not finite, in words."""
        for site in self._sites:
            if not site.value.isfinite().all():
                return f"{site.name!r} of the {site.program} (its value)"
            if not site.log_prob.isfinite().all():
                return f"{site.name!r} of the {site.program} (its log-probability)"
        return "none, though the loss is"
