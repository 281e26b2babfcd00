"""Schedules are what their formulas say, at the ends and in between."""

import math

import pytest

from pyro_vae.schedules import Constant, Cosine, Cyclical, Linear, Sigmoid

RAMPS = [Linear, Cosine, Sigmoid]


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize(("fraction", "start", "end"), [(0.2, 0.0, 1.0), (1.0, 0.1, 4.0), (0.5, 1.0, 0.0)])
def test_ramps_go_from_start_to_end_and_stay(ramp, fraction, start, end):
    schedule = ramp(fraction, start, end)
    assert schedule(0.0) == pytest.approx(start)
    assert schedule(fraction / 2) == pytest.approx((start + end) / 2)
    assert schedule(fraction) == pytest.approx(end)
    assert schedule(1.0) == pytest.approx(end)
    values = [schedule(fraction * i / 20) for i in range(21)]
    assert values == sorted(values, reverse=end < start)


def test_formulas():
    assert Constant(4.0)(0.7) == 4.0
    assert Linear(0.4)(0.1) == pytest.approx(0.25)
    assert Cosine(0.4)(0.1) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)

    def logistic(u):
        return 1 / (1 + math.exp(-8 * (u - 0.5)))

    stretched = (logistic(0.25) - logistic(0)) / (logistic(1) - logistic(0))
    assert Sigmoid(0.4, steepness=8.0)(0.1) == pytest.approx(stretched)


def test_cyclical():
    schedule = Cyclical(cycles=4, fraction=0.5, start=0.2)
    for cycle in range(4):
        assert schedule(cycle / 4) == pytest.approx(0.2)
        assert schedule(cycle / 4 + 1 / 16) == pytest.approx(0.6)
        assert schedule(cycle / 4 + 0.2) == 1.0
    assert schedule(1.0) == 1.0


@pytest.mark.parametrize(
    "make", [lambda: Linear(0.0), lambda: Cosine(1.5), lambda: Cyclical(0), lambda: Cyclical(4, -1.0)]
)
def test_fractions_are_checked(make):
    with pytest.raises(ValueError, match=r"expected .* got"):
        make()


def test_steepness_is_checked():
    with pytest.raises(ValueError, match="steepness > 0"):
        Sigmoid(steepness=0)
