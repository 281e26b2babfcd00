"""Posterior collapse: seen where it is, and not where it is not."""

import pytest
import torch
from oracles import LinearGaussian, TwoLatents, TwoSites
from test_decomposition import Idle

from pyro_vae import VAE, likelihoods, networks, plots, posteriors, priors
from pyro_vae.diagnostics import collapse


class Shifted(LinearGaussian):
    """A guide that moves with the datum by `slope` about `offset`, in units of its scale, which is `unit`."""

    def __init__(self, slope, offset=0.0, unit=1.0):
        super().__init__()
        self.slope, self.offset, self.unit = slope, offset, unit

    def posterior(self, x):
        return self.unit * (self.offset + self.slope * x[:, :2]), self.unit * x.new_ones(len(x), 2)


class HalfUsed(LinearGaussian):
    """A decoder that has no use for the second dimension, whose exact posterior is the prior."""

    def __init__(self):
        super().__init__()
        self.weight.data[:, 1] = 0


@pytest.fixture
def x():
    return 1.5 * torch.randn(300, 3, dtype=torch.float64)


def test_used_latents(x):
    """The exact posterior of a model whose data say something: mutual information above half a nat."""
    found = collapse(LinearGaussian(), x)
    assert found.verdict.holds is True
    assert found.mutual_information > 0.5
    assert found.active_units == 2
    assert found.dead_dimensions == ()
    assert found.verdict.advice == ""


def test_a_guide_that_is_the_prior(x):
    found = collapse(Idle(), x)
    assert found.verdict.holds is False
    assert "0.00 nats" in found.verdict.finding
    assert "FreeBits" in found.verdict.advice
    assert found.rate == pytest.approx(0, abs=1e-12)
    assert found.active_units == 0
    assert found.dead_dimensions == ("z[0]", "z[1]")


def test_what_is_not_a_number_is_a_failure(x):
    found = collapse(Shifted(slope=float("nan")), x)
    assert found.verdict.holds is False
    assert "nan nats" in found.verdict.finding
    assert "not finite" in found.verdict.finding
    with pytest.raises(ValueError, match="least_information: expected a positive number, got nan"):
        collapse(LinearGaussian(), x, least_information=float("nan"))


@pytest.mark.parametrize("used", [True, False])
def test_a_decoder_that_ignores_what_the_guide_says(x, used):
    """Another datum's latents change nothing then; where a wrong guide reconstructs badly, they do, to the better."""
    program = Shifted(slope=1.0)
    program.weight.data *= used
    found = collapse(program, x)
    assert found.verdict.holds is True
    assert ("ignores them" in found.verdict.finding) is not used
    assert (found.decoded > 0.1) if used else (found.decoded == 0)


def test_one_dead_dimension_is_named_and_no_failure(x):
    found = collapse(HalfUsed(), x)
    assert found.verdict.holds is True
    assert found.dead_dimensions == ("z[1]",)
    assert "dead: z[1]" in found.verdict.finding
    assert "a latent of 1 would do" in found.verdict.advice
    assert found.active.tolist() == [True, False]
    assert found.variance[0] == pytest.approx(LinearGaussian().posterior(x)[0][:, 0].var(correction=0).item())


def test_active_units_do_not_hide_a_collapse(x):
    """Means that move by 0.15 are active (variance 0.02), and say 0.02 nats, log(1.0225) at most but for the draws."""
    found = collapse(Shifted(slope=0.1), x)
    assert found.active_units == 2
    assert 0 < found.mutual_information < 0.05
    assert found.verdict.holds is False


def test_a_rate_that_is_spent_on_all_data_alike_does_not_hide_a_collapse(x):
    found = collapse(Shifted(slope=0.0, offset=3.0), x)
    assert found.rate == pytest.approx(9, abs=0.2)
    assert found.verdict.holds is False
    assert found.dead_dimensions == ("z[0]", "z[1]")


def test_what_is_dead_does_not_depend_on_the_latents_unit(x):
    """With a guide of scale 0.05, no mean has a variance of 0.01."""
    found = collapse(Shifted(slope=1.0, unit=0.05), x)
    assert found.active_units == 0
    assert found.dead_dimensions == ()
    assert found.verdict.holds is True


def test_one_datum_cannot_tell():
    assert collapse(LinearGaussian(), torch.zeros(1, 3, dtype=torch.float64)).verdict.holds is None


def test_near_the_threshold_cannot_tell(x):
    information = collapse(LinearGaussian(), x).mutual_information
    near = collapse(LinearGaussian(), x, least_information=information + 1e-4)
    assert near.verdict.holds is None
    assert "num_samples" in near.verdict.advice
    assert collapse(LinearGaussian(), x, least_information=information + 1).verdict.holds is False


def test_first_data_alone(x):
    found = collapse(LinearGaussian(), x, num_data=50)
    assert found.decomposition.num_data == 50
    whole = LinearGaussian().posterior(x)[0].var(0, correction=0)
    torch.testing.assert_close(found.variance, whole.detach())


def of_full_covariance():
    posterior = posteriors.FullNormal(networks.MLP(3, 2 + 2 + 1), 2)
    return VAE(priors.StandardNormal(2), likelihoods.Gaussian(networks.MLP(2, 6), (3,)), posterior).double()


def many_dimensions():
    posterior = posteriors.DiagonalNormal(networks.MLP(3, 60), 30)
    return VAE(priors.StandardNormal(30), likelihoods.Gaussian(networks.MLP(30, 6), (3,)), posterior).double()


@pytest.mark.parametrize("make", [LinearGaussian, HalfUsed, TwoSites, TwoLatents, of_full_covariance, many_dimensions])
def test_any_program_and_its_figures(make, tmp_path):
    program = make().double()
    x = torch.rand(40, {TwoSites: 2, TwoLatents: 64}.get(make, 3), dtype=torch.float64).round()
    found = collapse(program, x)
    assert len(found.dead) == len(found.variance) == len(found.dimensions)
    assert str(found.verdict)
    figures = plots.collapse(found), plots.elbo_decomposition(found.decomposition)
    for figure in figures:
        figure.savefig(tmp_path / "figure.png")
    _, bars = figures[0].axes
    kl, information = found.decomposition.kl_per_dimension, found.decomposition.information_per_dimension
    expected = found.variance if kl is None else kl
    shown = torch.tensor([bar.get_height() for bar in bars.patches[: len(expected)]], dtype=torch.float64)
    order = (expected if information is None else information).argsort(descending=True, stable=True)
    torch.testing.assert_close(shown, expected[order])
