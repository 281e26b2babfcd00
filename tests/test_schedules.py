"""Schedules are what their formulas say, at the ends and in between."""

import json
import math

import pytest

from pyro_vae import expressions
from pyro_vae.schedules import Constant, ControlVAE, Cosine, Cyclical, Linear, Sigmoid

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


def betas(controller, rates):
    found = []
    for rate in rates:
        controller.update(rate)
        found.append(controller(0.5))
    return found


@pytest.mark.parametrize("low", [0.0, 1.0])
def test_within_its_bounds_the_controller_is_the_formula(low):
    rates = [30.0, 20.5, 24.0, 19.7, 15.0, 22.0, 20.0]
    errors = [20.0 - rate for rate in rates]
    expected = [
        0.03 / (1 + math.exp(error)) - 0.01 * sum(errors[: step + 1]) + low for step, error in enumerate(errors)
    ]
    assert all(low < beta < low + 1 for beta in expected)
    controller = ControlVAE(20.0, proportional=0.03, integral=0.01, low=low, high=low + 1)
    assert controller(0.0) == controller(1.0) == low
    assert betas(controller, rates) == pytest.approx(expected, rel=1e-12)


def test_a_controller_leaves_its_bounds_at_once():
    """However long it was held there, and however far beyond the rate was."""
    controller = ControlVAE(20.0, proportional=0.0, integral=0.01, low=0.5, high=2.0)
    assert betas(controller, [1e6] * 50 + [21.0])[-1] == 2.0
    assert betas(controller, [10.0])[-1] == pytest.approx(1.9)
    assert betas(controller, [-1e6] * 50 + [19.0])[-1] == 0.5
    assert betas(controller, [30.0])[-1] == pytest.approx(0.6)


def test_the_proportional_term_does_not_wind_up_either():
    controller = ControlVAE(20.0, proportional=0.2, integral=0.01, high=2.0)
    assert betas(controller, [1e6] * 50)[-1] == 2.0
    assert betas(controller, [10.0])[-1] == pytest.approx(2.0 - 0.2 - 0.1, abs=1e-4)


def test_a_controller_goes_on_from_its_state():
    first, second = ControlVAE(20.0, integral=0.01), ControlVAE(20.0, integral=0.01)
    betas(first, [25.3, 31.7, 18.1])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second(0.0) == first(0.0) != 0
    assert betas(second, [23.9, 26.1]) == betas(first, [23.9, 26.1])


def test_the_expression_of_a_controller_is_its_arguments():
    controller = ControlVAE(20.0, high=2.0)
    controller.update(30.0)
    assert expressions.write(controller, "anneal") == "ControlVAE(rate=20.0, high=2.0)"
    assert expressions.parse("ControlVAE(rate=20)", "anneal")(0.3) == 0


@pytest.mark.parametrize("arguments", [
    {"rate": 0}, {"rate": -3.0}, {"rate": math.nan}, {"rate": math.inf},
    {"integral": 0}, {"proportional": -1}, {"low": -0.1}, {"low": 10.0}, {"high": math.nan},
])  # fmt: skip
def test_the_arguments_of_a_controller_are_checked(arguments):
    with pytest.raises(ValueError, match=r"ControlVAE: expected .* got"):
        ControlVAE(**({"rate": 20.0} | arguments))


def test_a_rate_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="a finite rate, got nan"):
        ControlVAE(20.0).update(math.nan)
