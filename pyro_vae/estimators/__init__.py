"""Estimators of the evidence: an ELBO each, in a few lines that read as its formula, and the log-weights under them."""

from pyro_vae.estimators import (
    checks,
    comparison,
    evidence,
    gradients,
    importance,
    kernels,
    particles,
    regularized,
    score_function,
)
from pyro_vae.estimators.checks import *
from pyro_vae.estimators.comparison import *
from pyro_vae.estimators.evidence import *
from pyro_vae.estimators.gradients import *
from pyro_vae.estimators.importance import *
from pyro_vae.estimators.kernels import *
from pyro_vae.estimators.particles import *
from pyro_vae.estimators.regularized import *
from pyro_vae.estimators.score_function import *

# What a file offers is offered here: a new one costs a line in its own file, and nothing else.
__all__ = [
    *checks.__all__,
    *comparison.__all__,
    *evidence.__all__,
    *gradients.__all__,
    *importance.__all__,
    *kernels.__all__,
    *particles.__all__,
    *regularized.__all__,
    *score_function.__all__,
]
