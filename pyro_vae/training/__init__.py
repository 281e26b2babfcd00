"""Training: `steps`, a generator whose loop is the user's, and `fit` on top."""

from pyro_vae.training.fitting import Fitted, fit
from pyro_vae.training.steps import NonFiniteError, Step, Training, steps

__all__ = ["Fitted", "NonFiniteError", "Step", "Training", "fit", "steps"]
