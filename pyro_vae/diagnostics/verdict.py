"""What a check says in words."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Verdict"]


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
