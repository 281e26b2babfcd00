"""Likelihoods p(x given z): modules whose `forward(z)` returns a distribution over data."""

from pyro_vae.likelihoods.discrete import Bernoulli

__all__ = ["Bernoulli"]
