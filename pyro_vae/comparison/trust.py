"""When weights can be trusted."""

import math

__all__ = ["LOW_SHARE", "threshold"]

LOW_SHARE = 0.05  # of the data may have weights that cannot be trusted


def threshold(num_draws: int) -> float:
    """The shape of a tail that so many weights resolve, and at most the 0.7 up to which they can be trusted."""
    return min(0.7, 1 - 1 / math.log10(num_draws))
