"""Distributions that Pyro lacks."""

from pyro_vae.distributions.autoregressive import Autoregressive
from pyro_vae.distributions.continuous import BatchNormal, OpenBeta
from pyro_vae.distributions.discretized import DiscretizedLogistic
from pyro_vae.distributions.flows import FlowDistribution, as_pyro, import_zuko
from pyro_vae.distributions.joint import Joint
from pyro_vae.distributions.mixtures import DiagonalNormalMixture, PathwiseMixture, mixture
from pyro_vae.distributions.one_hot import OneHotCategoricalGroups, RelaxedOneHotCategoricalGroups, check_temperature
from pyro_vae.distributions.precise import Precise, in_float64
from pyro_vae.distributions.soft_bernoulli import SoftBernoulli
from pyro_vae.distributions.sphere import UniformSphere, VonMisesFisher
from pyro_vae.distributions.supports import (
    Grid,
    OneHotGroups,
    boolean_vector,
    describe,
    innermost,
    open_unit_interval,
    same_support,
    simplices,
)

__all__ = [
    "Autoregressive",
    "BatchNormal",
    "DiagonalNormalMixture",
    "DiscretizedLogistic",
    "FlowDistribution",
    "Grid",
    "Joint",
    "OneHotCategoricalGroups",
    "OneHotGroups",
    "OpenBeta",
    "PathwiseMixture",
    "Precise",
    "RelaxedOneHotCategoricalGroups",
    "SoftBernoulli",
    "UniformSphere",
    "VonMisesFisher",
    "as_pyro",
    "boolean_vector",
    "check_temperature",
    "describe",
    "import_zuko",
    "in_float64",
    "innermost",
    "mixture",
    "open_unit_interval",
    "same_support",
    "simplices",
]
