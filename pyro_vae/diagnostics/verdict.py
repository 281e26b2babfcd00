"""What a check says in words."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Verdict", "holm"]


class Verdict(NamedTuple):
    """What a check found, as `verdict` of its result.

    Attributes:
        holds: Whether the check passed; None where it could not tell.
        finding: What was found, in one line, with the numbers that it rests on.
        advice: What to try, in one line; empty where nothing need be done.

    Example:
        >>> print(Verdict(False, "k-hat above 0.7 in 31 % of 100 data", "fit longer"))
        does not hold: k-hat above 0.7 in 31 % of 100 data; try: fit longer
    """

    holds: bool | None
    finding: str
    advice: str = ""

    def __str__(self) -> str:
        said = {True: "holds", False: "does not hold", None: "cannot tell"}[self.holds]
        return f"{said}: {self.finding}" + (f"; try: {self.advice}" if self.advice else "")


def holm(p_values: Tensor) -> Tensor:
    r"""P-values corrected for there being several, so that the smallest keeps the level of one.

    .. math:: \tilde p_{(i)} = \min\Bigl(1,\; \max_{j \le i}\, (n - j + 1)\, p_{(j)}\Bigr)

    Args:
        p_values: Tensor of shape `(n,)`, float64.

    Reference:
        Holm, 1979. A simple sequentially rejective multiple test procedure.

    Example:
        >>> holm(torch.tensor([0.02, 0.5, 0.04], dtype=torch.float64))
        tensor([0.0600, 0.5000, 0.0800], dtype=torch.float64)
    """
    order = p_values.argsort()
    factors = torch.arange(len(order), 0, -1, dtype=p_values.dtype)
    rising = (factors * p_values[order]).cummax(0).values.clamp(max=1)
    return torch.empty_like(rising).scatter_(0, order, rising)
