"""beta scales latents and nothing else; record sees what the estimators compute."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, Mixture, TwoLatents
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate

from pyro_vae.handlers import beta, record

ESTIMATORS = {
    "Trace_ELBO": Trace_ELBO(),
    "Trace_ELBO, 3 particles": Trace_ELBO(num_particles=3),
    "Trace_ELBO, 3 vectorized": Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    "TraceMeanField_ELBO": TraceMeanField_ELBO(),
    "TraceGraph_ELBO": TraceGraph_ELBO(),
    "RenyiELBO": RenyiELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
}


@pytest.fixture
def problem():
    program = LinearGaussian(scale=1.3)
    return program, torch.randn(6, 3, dtype=torch.float64)


@pytest.mark.parametrize("value", [0, 0.3, 1, 4.0, torch.tensor(0.3)])
def test_mean_field_loss_is_distortion_plus_beta_rate(problem, value):
    program, x = problem
    torch.manual_seed(0)
    with beta(value):
        loss = TraceMeanField_ELBO().differentiable_loss(program.model, program.guide, x).item()
    torch.manual_seed(0)
    trace = poutine.trace(program.guide).get_trace(x)
    model = poutine.trace(poutine.replay(program.model, trace=trace)).get_trace(x)
    model.compute_log_prob()
    distortion = -model.nodes["x"]["log_prob"].sum().item()
    assert loss == pytest.approx(distortion + float(value) * program.rate(x).sum().item(), rel=1e-12)


@pytest.mark.parametrize("value", [0, 0.3, 4.0])
def test_trace_elbo_weighs_both_sides(problem, value):
    program, x = problem
    torch.manual_seed(0)
    with beta(value), record() as recorded:
        loss = Trace_ELBO().loss(recorded.model(program.model), recorded.guide(program.guide), x)
    assert loss == pytest.approx((recorded.distortion + value * recorded.rate).sum().item(), rel=1e-12)


def test_beta_zero_leaves_no_gradient_from_the_rate(problem):
    program, x = problem
    with beta(0):
        TraceMeanField_ELBO().differentiable_loss(program.model, program.guide, x).backward()
    torch.manual_seed(0)
    assert all(p.grad.isfinite().all() for p in program.parameters())


def test_beta_nests_with_scale_plates_and_itself():
    def model():
        with pyro.plate("data", 100, subsample_size=10), poutine.scale(scale=2.0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(10))

    with beta(0.5), poutine.scale(scale=3.0), beta(0.1):
        trace = poutine.trace(model).get_trace()
    assert trace.nodes["z"]["scale"] == pytest.approx(0.05 * 3 * 2 * 10)
    assert trace.nodes["x"]["scale"] == pytest.approx(3 * 2 * 10)


def test_beta_leaves_conditioned_sites_alone_and_refuses_negative_values():
    program, x = LinearGaussian(), torch.zeros(2, 3, dtype=torch.float64)
    with beta(0.5):
        trace = poutine.trace(poutine.condition(program.model, {"z": x[:, :2]})).get_trace(x)
    assert trace.nodes["z"]["scale"] == 1
    with pytest.raises(ValueError, match="at least 0"):
        beta(-0.1)


@pytest.mark.parametrize("value", [1.0, 0.3])
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("make", [LinearGaussian, TwoLatents])
def test_record_changes_no_loss_and_no_gradient(name, value, make):
    if make is TwoLatents and name == "TraceMeanField_ELBO":
        pytest.skip("a guide from the bottom up is not mean-field, as Pyro warns")
    program, estimator = make().double(), ESTIMATORS[name]
    x = torch.rand(6, 3 if make is LinearGaussian else 64, dtype=torch.float64).round()

    def run(*programs):
        torch.manual_seed(0)
        program.zero_grad()
        with beta(value), poutine.trace(param_only=True), pyro.get_param_store().scope():
            loss = estimator.loss_and_grads(*programs, x)
        return loss, [p.grad.clone() for p in program.parameters()]

    loss, gradients = run(program.model, program.guide)
    with record() as recorded:
        watched_loss, watched_gradients = run(recorded.model(program.model), recorded.guide(program.guide))
    assert watched_loss == pytest.approx(loss, rel=1e-12)
    for got, wanted in zip(watched_gradients, gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    assert recorded.rate.shape == recorded.distortion.shape == (6,)


def test_record_is_unbiased_for_rate_and_distortion(problem):
    """Means over 20,000 particles against closed forms; false alarm 4e-4 at 4 standard errors for 6 data, seed 0."""
    program, x = problem
    estimator = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
    with record() as recorded, torch.no_grad():
        estimator.loss(recorded.model(program.model), recorded.guide(program.guide), x)
    for got, wanted in ((recorded.rate, program.rate(x)), (recorded.distortion, program.distortion(x))):
        torch.testing.assert_close(got, wanted.detach(), rtol=0, atol=0.08)
        assert not torch.allclose(got, wanted + 0.2, rtol=0, atol=0.08)


def test_record_knows_the_data_set_behind_a_subsample(problem):
    program, x = problem
    program.size = 1000
    with record() as recorded:
        loss = Trace_ELBO().loss(recorded.model(program.model), recorded.guide(program.guide), x)
    assert recorded.num_data == 1000
    # The loss stands for all data: per datum it is the batch's mean.
    assert loss / 1000 == pytest.approx((recorded.rate + recorded.distortion).mean().item(), rel=1e-12)


def test_record_names_the_first_site_that_is_not_finite(problem):
    program, x = problem
    with torch.no_grad():
        program.weight[0, 0] = torch.nan
    with pyro.validation_enabled(False), pytest.warns(UserWarning, match="NaN"), record() as recorded:
        Trace_ELBO().loss(recorded.model(program.model), recorded.guide(program.guide), x)
    assert recorded.first_nonfinite() == "'z' of the guide (its value)"


def test_record_leaves_score_function_gradients_alone():
    """TraceGraph_ELBO with a discrete latent: the same seed gives the same gradient with and without record."""
    program, x = Mixture(), torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)

    def gradient(*programs):
        torch.manual_seed(3)
        program.zero_grad()
        with poutine.trace(param_only=True), pyro.get_param_store().scope():
            TraceGraph_ELBO().loss_and_grads(*programs, x)
        return program.posterior.grad.clone()

    plain = gradient(program.model, program.guide)
    with record() as recorded:
        watched = gradient(recorded.model(program.model), recorded.guide(program.guide))
    torch.testing.assert_close(watched, plain, rtol=1e-12, atol=0)
    assert (plain != 0).all()


def test_record_averages_over_particles_that_come_one_by_one(problem):
    program, x = problem
    with record() as recorded:
        loss = Trace_ELBO(num_particles=5).loss(recorded.model(program.model), recorded.guide(program.guide), x)
    assert loss == pytest.approx((recorded.rate + recorded.distortion).sum().item(), rel=1e-12)


def test_record_and_its_loss_know_masks(problem):
    program, x = problem
    mask = torch.tensor([True, False] * 3)
    model, guide = poutine.mask(program.model, mask=mask), poutine.mask(program.guide, mask=mask)
    model.__name__ = guide.__name__ = "masked"
    torch.manual_seed(0)
    plain = Trace_ELBO().loss(model, guide, x)
    torch.manual_seed(0)
    with record() as recorded:
        loss = Trace_ELBO().loss(recorded.model(model), recorded.guide(guide), x)
    assert loss == pytest.approx(plain, rel=1e-12)
    assert loss == pytest.approx((recorded.rate + recorded.distortion).sum().item(), rel=1e-12)
    assert (recorded.distortion[~mask] == 0).all()


def test_record_leaves_global_sites_out():
    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("shift", dist.Normal(0.3, 0.1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 0.5))

    with record() as recorded:
        loss = Trace_ELBO().loss(recorded.model(model), recorded.guide(guide), torch.zeros(4))
    assert abs(loss - (recorded.rate + recorded.distortion).sum().item()) > 0.1


@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_nothing_is_claimed_of_enumerated_latents(how):
    program, x = Mixture(), torch.ones(4, 2, dtype=torch.float64)
    with record() as recorded:
        guide = config_enumerate(recorded.guide(program.guide), how)
        TraceEnum_ELBO(max_plate_nesting=1).loss(recorded.model(program.model), guide, x)
    assert recorded.rate.isnan().all()
    assert recorded.distortion.isnan().all()
