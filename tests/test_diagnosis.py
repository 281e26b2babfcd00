"""All checks of a program: which ran, which could not, and what they say."""

import math

import pytest
import torch
from oracles import LinearGaussian, Mixture, TwoLatents

from pyro_vae import diagnostics, plots
from pyro_vae.diagnostics import CHECKS, Refusal, Verdict


@pytest.fixture
def quick(monkeypatch):
    """The dear checks in a small form."""
    small = {
        "inference_gap": {"num_data": 1, "num_particles": 100, "num_chains": 2, "num_temperatures": 5, "steps": 5},
        "nuts": {"num_data": 1, "num_samples": 10, "warmup_steps": 10, "num_chains": 2},
        "calibration": {"num": 50, "num_samples": 20},
    }
    for name, options in small.items():
        check = CHECKS[name]
        monkeypatch.setitem(CHECKS, name, lambda *a, _check=check, _options=options, **k: _check(*a, **_options, **k))


def test_all_checks_run_on_a_program_of_several_sites(quick, tmp_path):
    program, x = TwoLatents(), torch.rand(20, 8, 8).round()
    before = torch.get_rng_state()
    found = diagnostics.diagnose(program, x, progress=False)
    assert list(found.results) == list(CHECKS)
    assert not any(isinstance(result, Refusal) for result in found.results.values())
    assert all(isinstance(verdict, Verdict) and verdict.finding for verdict in found.verdicts.values())
    assert torch.equal(before, torch.get_rng_state())
    for name, result in found.results.items():
        getattr(plots, name)(result).savefig(tmp_path / f"{name}.png")


def test_a_check_that_a_program_cannot_have_is_passed_over_with_the_reason(quick):
    found = diagnostics.diagnose(
        Mixture(), torch.ones(20, 2, dtype=torch.float64), only=["nuts", "khat"], progress=False
    )
    assert isinstance(found.results["nuts"], Refusal)
    assert found.verdicts["nuts"].holds is None
    assert "Categorical at site 'z'" in found.verdicts["nuts"].finding
    assert not isinstance(found.results["khat"], Refusal)


def test_one_name_by_itself():
    x = torch.zeros(5, 3, dtype=torch.float64)
    assert list(diagnostics.diagnose(LinearGaussian(), x, only="khat", progress=False).results) == ["khat"]
    with pytest.raises(ValueError, match="expected names among collapse, .*, got k-hat$"):
        diagnostics.diagnose(LinearGaussian(), x, only="k-hat")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_parameters_that_are_not_finite_are_an_error(value):
    program = LinearGaussian()
    program.bias.data[1] = value
    with pytest.raises(ValueError, match=r"^parameter bias: expected finite values, .* smaller lr$"):
        diagnostics.diagnose(program, torch.zeros(5, 3, dtype=torch.float64), only=["khat"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("alone", [True, False])
def test_the_figure_of_nuts_has_room_for_finite_numbers_alone(value, alone, tmp_path):
    values = torch.tensor([[value]] if alone else [[value], [1.0], [3.0]], dtype=torch.float64)
    good = {"rhat": torch.ones_like(values), "ess": torch.full_like(values, 500.0)}
    names = ("guide_mean", "guide_scale", "mean", "scale", "distance", "error")
    none = torch.zeros(len(values), dtype=torch.float64)
    found = diagnostics.Nuts(("z",), **dict.fromkeys(names, values), **good, divergences=none, threshold=0.2)
    figure = plots.nuts(found)
    figure.savefig(tmp_path / "figure.png")
    low, high = figure.axes[0].get_xlim()
    assert (low, high) == pytest.approx((-1.0, 1.0) if alone else (0.88, 3.12))


def test_what_is_wrong_with_the_data_is_an_error():
    with pytest.raises(ValueError, match="expected at least one datum"):
        diagnostics.diagnose(LinearGaussian(), torch.zeros(0, 3, dtype=torch.float64))


def test_a_wrong_guide_fails_and_a_right_one_does_not():
    """Exact values but for calibration, whose false alarms are 5 %; seed 0."""
    program, names = LinearGaussian(), ["khat", "calibration"]
    with torch.no_grad():
        x = torch.randn(50, 3, dtype=torch.float64)
    assert diagnostics.diagnose(program, x, only=names, progress=False).failed == []
    assert diagnostics.diagnose(LinearGaussian(scale=0.4), x, only=names, progress=False).failed == names
