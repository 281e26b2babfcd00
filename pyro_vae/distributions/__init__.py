"""Distributions that Pyro lacks."""

from pyro_vae.distributions.soft_bernoulli import SoftBernoulli

__all__ = ["SoftBernoulli"]
