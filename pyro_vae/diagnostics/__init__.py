"""Did the inference work? Checks that return numbers and a verdict, any of which can say no."""

# By name, and not by star, as a file has the name of its check: the check is what is offered.
from pyro_vae.diagnostics.calibration import Calibration, calibration
from pyro_vae.diagnostics.collapse import Collapse, collapse
from pyro_vae.diagnostics.diagnosis import CHECKS, Diagnosis, Refusal, diagnose, run_checks
from pyro_vae.diagnostics.gaps import InferenceGap, inference_gap
from pyro_vae.diagnostics.khat import KHat, khat
from pyro_vae.diagnostics.nuts import Nuts, nuts
from pyro_vae.diagnostics.predictive import PredictiveChecks, predictive_checks
from pyro_vae.diagnostics.verdict import Verdict

__all__ = [
    "CHECKS",
    "Calibration",
    "Collapse",
    "Diagnosis",
    "InferenceGap",
    "KHat",
    "Nuts",
    "PredictiveChecks",
    "Refusal",
    "Verdict",
    "calibration",
    "collapse",
    "diagnose",
    "inference_gap",
    "khat",
    "nuts",
    "predictive_checks",
    "run_checks",
]
