"""All checks of a program on one page."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyro_vae.diagnostics.calibration import calibration
from pyro_vae.diagnostics.collapse import collapse
from pyro_vae.diagnostics.gaps import inference_gap
from pyro_vae.diagnostics.khat import khat
from pyro_vae.diagnostics.nuts import nuts
from pyro_vae.diagnostics.predictive import predictive_checks
from pyro_vae.diagnostics.verdict import Verdict
from pyro_vae.evaluation import checked_batches
from pyro_vae.programs import Program

__all__ = ["CHECKS", "Diagnosis", "Refusal", "diagnose", "run_checks"]


class Refusal(NamedTuple):
    """What stands for the result of a check that a program cannot have.

    Attributes:
        reason: Why not, in one line.
    """

    reason: str

    @property
    def verdict(self) -> Verdict:
        """That it cannot tell."""
        return Verdict(None, self.reason)


@dataclass(frozen=True)
class Diagnosis:
    """The results of checks.

    Attributes:
        results: What each check returned, by name; a `Refusal` where the program cannot have it.
    """

    results: Mapping[str, Any]

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """What each check says, by name."""
        return {name: result.verdict for name, result in self.results.items()}

    @property
    def failed(self) -> list[str]:
        """Names of the checks that do not hold."""
        return [name for name, verdict in self.verdicts.items() if verdict.holds is False]


def _calibration(program: Program, x: Any, **options: Any) -> Any:
    return calibration(program, like=x, **options)


CHECKS: dict[str, Callable] = {
    "collapse": collapse,
    "predictive_checks": predictive_checks,
    "khat": khat,
    "inference_gap": inference_gap,
    "calibration": _calibration,
    "nuts": nuts,
}
"""The checks in the order of what they ask: are the latents used, do draws look like data, is the posterior right."""


def diagnose(
    program: Program, x: Any, *, only: str | Collection[str] | None = None, seed: int = 0, progress: bool = True
) -> Diagnosis:
    """Run all checks of a program, each with its own defaults.

    A check that the program cannot have, such as `nuts` of discrete latents, is passed over with the reason.

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        x: Data that it was not fitted to: tensor, array, `Dataset` or `DataLoader`. The checks that are dear take the
            first few of them.
        only: Name or names of the checks to run; None runs all.
        seed: Seed of each check.
        progress: Whether to show a bar on stderr, past two seconds.

    Returns:
        A `Diagnosis`.

    Raises:
        ValueError: If a check is unknown, a parameter is not finite, or the data do not suit the program.

    Example:
        >>> import pyro_vae, torch
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(20, 8, 8)
        >>> list(diagnose(vae, x, only=["collapse", "khat"]).verdicts)
        ['collapse', 'khat']
    """
    return Diagnosis(dict(run_checks(program, x, only=only, seed=seed, progress=progress)))


def run_checks(
    program: Program, x: Any, *, only: str | Collection[str] | None = None, seed: int = 0, progress: bool = True
) -> Iterator[tuple[str, Any]]:
    """The checks of `diagnose`, one after another: name and result of each as it is done.

    Takes the arguments of `diagnose`, and raises what it does.

    Example:
        >>> import pyro_vae, torch
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(20, 8, 8)
        >>> [name for name, result in run_checks(vae, x, only=["khat", "collapse"])]
        ['khat', 'collapse']
    """
    names = list(CHECKS) if only is None else [only] if isinstance(only, str) else list(only)
    if unknown := [name for name in names if name not in CHECKS]:
        raise ValueError(f"checks: expected names among {', '.join(CHECKS)}, got {', '.join(unknown)}")
    for name, parameter in program.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(
                f"parameter {name}: expected finite values, got infinite ones or NaN; fit again with a smaller lr"
            )
    checked_batches(program, x, 1)  # what is wrong with the data is not taken for what a check cannot do
    for name in names:
        try:
            yield name, CHECKS[name](program, x, seed=seed, progress=progress)
        except ValueError as error:
            yield name, Refusal(str(error).splitlines()[0])
