"""Sums over the whole support of a distribution: by enumeration where it is discrete, else by quadrature."""

import math

import numpy as np
import torch
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_vae import distributions
from pyro_vae.distributions import Autoregressive, Grid, Joint, OneHotGroups, SoftBernoulli

COUNTS = 400  # beyond which the counts here have a probability below 1e-12
_NODES, _WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(60))


def points(fn):
    """Points in the support of a distribution of batch shape (), and the logs of their weights in a sum over it."""
    values, log_weights = zip(*axes(fn), strict=True)
    indices = torch.cartesian_prod(*(torch.arange(len(value)) for value in values)).reshape(-1, len(values)).T
    value = torch.cat([value[i] for value, i in zip(values, indices, strict=True)], -1)
    log_weight = sum(log_weight[i] for log_weight, i in zip(log_weights, indices, strict=True))
    return value.reshape(-1, *fn.event_shape), log_weight


def axes(fn):
    """The independent pieces of a value, each as (its values `(N, width)`, the logs of their weights `(N,)`)."""
    if isinstance(fn, Joint):
        return [axis for part in fn.parts.values() for axis in axes(part)]
    support, base, size = fn.support, getattr(fn, "base_dist", fn), fn.event_shape.numel()
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if isinstance(support, OneHotGroups):
        return [exactly(torch.eye(support.classes))] * (size // support.classes)
    if isinstance(fn, Autoregressive):
        base = fn.given(fn.sample()).base_dist
    if isinstance(base, SoftBernoulli) or support is constraints.boolean:
        return [exactly(torch.tensor([[0.0], [1.0]]))] * size  # a SoftBernoulli takes grey targets, but draws bits
    if isinstance(support, Grid):
        return [exactly(torch.arange(support.bins)[:, None] / (support.bins - 1))] * size
    if getattr(support, "is_discrete", False):
        last = int(torch.as_tensor(getattr(support, "upper_bound", COUNTS)).max())
        return [exactly(torch.arange(last + 1.0)[:, None])] * size
    if repr(support) == "Sphere":
        angle = torch.arange(600, dtype=torch.float64) * (2 * math.pi / 600)
        circle = torch.stack((angle.cos(), angle.sin()), -1)
        return [(circle, torch.full((600,), 2 * math.pi / 600, dtype=torch.float64).log())]
    return continuous_axes(fn, base, support)


def exactly(values):
    return values.double(), torch.zeros(len(values), dtype=torch.float64)


def continuous_axes(fn, base, support):
    """Nodes of Gauss and Legendre on both sides of the middle, where a density may have a kink, and far out."""
    torch.manual_seed(2)
    draws = fn.sample((2000,)).flatten(1)
    if support is distributions.simplices:  # pairs of classes, of which the first says it all
        draws = draws[:, ::2]
    chart = "real" if repr(support) == "Real()" else "positive" if "GreaterThan" in repr(support) else "unit"
    draws = {"real": lambda t: t, "positive": torch.log, "unit": torch.logit}[chart](draws)
    low, middle, high = draws.quantile(torch.tensor([0.16, 0.5, 0.84], dtype=torch.float64), 0)
    middle = getattr(base, "loc", middle).reshape(-1).expand(len(middle))  # where the kink of a Laplace is
    return [
        node_axis(center, spread, chart, support is distributions.simplices)
        for center, spread in zip(middle, (high - low) / 2, strict=True)
    ]


def node_axis(center, spread, chart, pairs):
    """Values `exp(t)`, `sigmoid(t)` or `t`, with `t = center + spread sinh(u)`, and weights `(dx / du) du`."""
    reach = 8.0 if chart == "real" else 4.5  # the other charts have tails that fall exponentially
    half = 0.5 * reach * (1 + _NODES)
    u, weight = torch.cat((-half, half)), 0.5 * reach * _WEIGHTS.repeat(2)
    t = center + spread * u.sinh()
    log_weight = weight.log() + spread.log() + u.cosh().log()
    if chart == "real":
        return t[:, None], log_weight
    if chart == "positive":
        return t.exp()[:, None], log_weight + t
    value = torch.stack((t.sigmoid(), (-t).sigmoid()), -1) if pairs else t.sigmoid()[:, None]
    if not pairs:
        value = value.clamp(max=1 - 1e-16)
    return value.clamp(min=1e-300), log_weight + logsigmoid(t) + logsigmoid(-t)
