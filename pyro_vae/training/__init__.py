"""Training: `steps`, a generator whose loop is the user's, and `fit` on top."""

from pyro_vae.training.fitting import Fitted, fit
from pyro_vae.training.processes import LostProcessError
from pyro_vae.training.steps import NonFiniteError, Step, Training, steps

__all__ = ["Fitted", "LostProcessError", "NonFiniteError", "Step", "Training", "fit", "steps"]
