"""Estimators of the evidence: an ELBO each, in a few lines that read as its formula, and the log-weights under them."""

from pyro_vae.estimators import gradients, importance, particles, score_function
from pyro_vae.estimators.gradients import *
from pyro_vae.estimators.importance import *
from pyro_vae.estimators.particles import *
from pyro_vae.estimators.score_function import *

# What a file offers is offered here: a new one costs a line in its own file, and nothing else.
__all__ = [*gradients.__all__, *importance.__all__, *particles.__all__, *score_function.__all__]
