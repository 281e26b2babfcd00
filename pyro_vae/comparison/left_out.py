"""Leave-one-out cross-validation by ArviZ, with what it is conditional on."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

from pyro_vae.diagnostics import Verdict
from pyro_vae.diagnostics.khat import FEWEST_PARTICLES, largest_shape

__all__ = ["ConditionalLOO", "loo"]

LOW_SHARE = 0.05  # of the data may have weights that cannot be trusted


class ConditionalLOO(NamedTuple):
    """Leave-one-out cross-validation by ArviZ, and what it is conditional on.

    Attributes:
        elpd: What `arviz_stats.loo` gave.
        conditional_on: What was not left out.
        poor_guide: Share of the data where the guide's k-hat, in `sample_stats` of the tree, is above its threshold,
            so that the draws are not the posterior's; None where the tree has none.
        unknown_guide: Share of the data whose k-hat is NaN.
    """

    elpd: Any
    conditional_on: str
    poor_guide: float | None = None
    unknown_guide: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """Holds where at most 5 % of the data have a Pareto k above what ArviZ says is good, and 5 % a guide's k-hat.

        Pareto k is that of 1 / p(x given z) over the draws, and knows nothing of a posterior that they miss: of a guide
        that is too narrow it is low, and elpd far too high. Hence None for a tree without `khat` in `sample_stats`, or
        where more than 5 % of that are NaN; and for an elpd that is not finite.
        """
        high = float((~(self.elpd.pareto_k <= self.elpd.good_k)).mean())
        finding = (
            f"elpd {self.elpd.elpd:.1f} ± {self.elpd.se:.1f} nats given {self.conditional_on}; Pareto k above "
            f"{self.elpd.good_k:.2f} for {high:.0%} of {self.elpd.n_data_points:,} data"
        )
        advice = "comparison.models on held-out data"
        if not math.isfinite(self.elpd.elpd):
            return Verdict(None, finding, "a program and data with finite log-likelihoods")
        if self.poor_guide is not None and self.poor_guide > LOW_SHARE:
            poor = f"the guide's k-hat is high for {self.poor_guide:.0%}, whose draws are not the posterior's"
            return Verdict(False, f"{finding}; {poor}", advice)
        if high > LOW_SHARE:
            return Verdict(False, finding, advice)
        if self.poor_guide is None:
            return Verdict(None, f"{finding}; no k-hat says whether draws are the posterior's", "a tree of to_arviz")
        if self.poor_guide + self.unknown_guide > LOW_SHARE:
            return Verdict(None, f"{finding}; no k-hat of the guide for {self.unknown_guide:.0%}", "more draws")
        return Verdict(True, finding)

    def __str__(self) -> str:
        return f"{self.elpd}\n\nConditional on {self.conditional_on}."


def loo(tree: Any, var_name: str | None = None) -> ConditionalLOO:
    r"""ArviZ's leave-one-out cross-validation of what `to_arviz` gave, with the label that it needs.

    .. math:: \text{elpd} = \sum_n \log p(x_n \mid x_{-n}, \theta), \qquad
              p(x_n \mid x_{-n}, \theta)^{-1} = E_{z_n \mid x_n, \theta}\bigl[p(x_n \mid z_n, \theta)^{-1}\bigr]

    It is conditional on the decoder's weights :math:`\theta`, which were fitted to this datum too if the data are those
    of the training. And a latent belongs to its datum alone: once the datum is left out, nothing but the prior is known
    of it. What is estimated is then the evidence :math:`p(x_n \mid \theta)` itself, by the harmonic mean of likelihoods
    over the guide's draws, whose weights have heavy tails: Pareto k will often be high. Of a guide that is too narrow
    it is not, and the estimate is too high by any amount: the verdict asks the guide's own k-hat too. `models`, on
    held-out data, is the better estimate of the same.

    Args:
        tree: A `DataTree` with a group `log_likelihood`, of dimensions chain, draw and datum, of at least 25 draws, and
            `khat` in the group `sample_stats`, without which there is no verdict.
        var_name: The observed site, where there are several.

    Returns:
        A `ConditionalLOO`.

    Raises:
        ValueError: If there is no log-likelihood, there are several and none is named, draws are too few, or all
            likelihoods in the tail of a datum are the same.

    Reference:
        Vehtari, Gelman and Gabry, 2017. Practical Bayesian model evaluation using leave-one-out cross-validation and
        WAIC. Neal, 1994, in the discussion of Newton and Raftery: the harmonic mean.

    Example:
        >>> import numpy as np
        >>> from arviz_base import from_dict
        >>> draws = np.random.default_rng(0).normal(size=(1, 500, 20))
        >>> found = loo(from_dict({"posterior": {"z": draws}, "log_likelihood": {"x": -0.1 * draws**2}}))
        >>> print(found.verdict.holds, found.conditional_on, sep=": ")
        None: the weights of the decoder, which no datum was left out of
    """
    import arviz_stats

    log_likelihood = _log_likelihood(tree, var_name)
    num_draws = log_likelihood.sizes["chain"] * log_likelihood.sizes["draw"]
    if num_draws < FEWEST_PARTICLES:
        raise ValueError(f"loo: expected at least {FEWEST_PARTICLES} draws, which a tail needs, got {num_draws}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto")  # which the verdict says
        try:
            found = arviz_stats.loo(tree, pointwise=True, var_name=log_likelihood.name)
        except ValueError as error:
            if "tail values are the same" not in str(error):
                raise
            raise ValueError(
                "loo: expected log-likelihoods that differ from draw to draw, got a datum whose lowest are all the "
                "same, as of discrete latents or none; take comparison.models"
            ) from error
    shapes = tree["sample_stats"].get("khat") if "sample_stats" in tree.children else None
    shares: tuple = (None, 0.0)
    if shapes is not None:
        shares = float((shapes > largest_shape(num_draws)).mean()), float(shapes.isnull().mean())
    return ConditionalLOO(found, "the weights of the decoder, which no datum was left out of", *shares)


def _log_likelihood(tree: Any, var_name: str | None) -> Any:
    group: Any = getattr(tree, "children", {}).get("log_likelihood")
    names = [] if group is None else list(group.data_vars)
    if var_name is None and len(names) == 1:
        var_name = names[0]
    if not names or not {"chain", "draw"} <= set(group.dims):
        raise ValueError("loo: expected a tree with a group log_likelihood over chain and draw, such as to_arviz gives")
    if var_name not in names:
        raise ValueError(f"var_name: expected one of {', '.join(names)}, got {var_name!r}")
    return group[var_name]
