"""Log-weights against exact models."""

import pytest
import torch
from oracles import LinearGaussian, Mixture, TwoLatents
from pyro import poutine

from pyro_vae.estimators import log_probabilities, log_weights
from pyro_vae.handlers import beta


def test_at_the_exact_posterior_every_weight_is_the_evidence():
    program = LinearGaussian()
    x = torch.randn(5, 3, dtype=torch.float64)
    weights = log_weights(program.model, program.guide, x, num_particles=7)
    torch.testing.assert_close(weights, program.evidence(x).expand(7, 5), rtol=0, atol=1e-10)


def test_scales_do_not_enter():
    """Neither a subsampled plate, nor beta, nor poutine.scale."""
    program = LinearGaussian()
    x = torch.randn(10, 3, dtype=torch.float64)
    program.size = 1000
    with beta(0.1), poutine.scale(scale=3.0):
        weights = log_weights(program.model, program.guide, x, num_particles=2)
    torch.testing.assert_close(weights, program.evidence(x).expand(2, 10), rtol=0, atol=1e-10)


def test_masks_do():
    program = LinearGaussian()
    x = torch.randn(4, 3, dtype=torch.float64)
    mask = torch.tensor([True, False, True, False])
    parts = log_probabilities(poutine.mask(program.model, mask=mask), program.guide, x, num_particles=3)
    assert (parts.likelihood[:, ~mask] == 0).all()
    assert (parts.likelihood[:, mask] != 0).all()


def test_weights_average_to_the_evidence_of_a_discrete_model():
    """40,000 particles against a sum of three; false alarm 2e-4 for 3 data at 4 standard errors, seed 0."""
    program = Mixture()
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    weights = log_weights(program.model, program.guide, x, num_particles=40_000).detach().exp()
    error = weights.std(0) / 200
    evidence = program.evidence(x).exp().detach()
    assert ((weights.mean(0) - evidence).abs() < 4 * error).all()
    assert (error < 0.02 * evidence).all()  # or the check could not fail


def test_sites_are_summed():
    program, x = TwoLatents(), torch.rand(5, 64).round()
    parts = log_probabilities(program.model, program.guide, x, num_particles=3)
    assert all(part.shape == (3, 5) for part in parts)
    torch.manual_seed(1)
    weights = log_weights(program.model, program.guide, x, num_particles=1)
    torch.manual_seed(1)
    guide = poutine.trace(program.guide).get_trace(x)
    model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(x)
    assert weights.sum().item() == pytest.approx((model.log_prob_sum() - guide.log_prob_sum()).item(), rel=1e-5)


def test_a_program_without_the_plate_is_refused():
    import pyro
    import pyro.distributions as dist

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ValueError, match='plate named "data"'):
        log_weights(model, guide, torch.zeros(3))
