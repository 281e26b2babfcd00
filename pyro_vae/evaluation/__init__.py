"""How good a fitted program is: log-likelihood, ELBO, rate, distortion, active units, in nats per datum."""

from pyro_vae.evaluation import (
    annealed,
    batches,
    decomposition,
    densities,
    draws,
    generation,
    latents,
    likelihood,
    summary,
)
from pyro_vae.evaluation.annealed import *
from pyro_vae.evaluation.batches import *
from pyro_vae.evaluation.decomposition import *
from pyro_vae.evaluation.densities import *
from pyro_vae.evaluation.draws import *
from pyro_vae.evaluation.generation import *
from pyro_vae.evaluation.latents import *
from pyro_vae.evaluation.likelihood import *
from pyro_vae.evaluation.summary import *

# What a file offers is offered here: a new one costs a line in its own file, and nothing else.
__all__ = [
    *annealed.__all__,
    *batches.__all__,
    *decomposition.__all__,
    *densities.__all__,
    *draws.__all__,
    *generation.__all__,
    *latents.__all__,
    *likelihood.__all__,
    *summary.__all__,
]
