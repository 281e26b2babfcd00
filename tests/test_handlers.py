"""beta scales latents and nothing else, weigh the sites it names; record sees what the estimators compute."""

import gc
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, Mixture, TwoLatents
from pyro import poutine
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)

from pyro_vae import estimators
from pyro_vae.handlers import beta, record, weigh

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


@pytest.mark.parametrize("estimator", [Trace_ELBO(), TraceGraph_ELBO()], ids=lambda e: type(e).__name__)
def test_each_site_has_the_weight_of_its_name(estimator):
    program, x = TwoLatents().double(), torch.rand(6, 64, dtype=torch.float64).round()
    weights = {"z1": 0.0, "z2": torch.tensor(0.3), "x": 2.0}
    torch.manual_seed(0)
    with weigh(weights):
        loss = estimator.loss(program.model, program.guide, x)
    torch.manual_seed(0)
    guide = poutine.trace(program.guide).get_trace(x)
    model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(x)
    total = sum(
        sign * float(weights[name]) * site["fn"].log_prob(site["value"]).sum().item()
        for sign, trace in ((-1, model), (1, guide))
        for name, site in trace.nodes.items()
        if name in weights
    )
    assert loss == pytest.approx(total, rel=1e-12)


def test_weights_nest_with_beta_scale_and_plates():
    def model():
        with pyro.plate("data", 100, subsample_size=10), poutine.scale(scale=2.0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(10))

    with weigh({"z": 0.5}), beta(0.1), weigh({"z": 3.0, "x": 7.0}):
        trace = poutine.trace(model).get_trace()
    assert trace.nodes["z"]["scale"] == pytest.approx(0.5 * 0.1 * 3 * 2 * 10)
    assert trace.nodes["x"]["scale"] == pytest.approx(7 * 2 * 10)


def _failing(model, x):
    model(x)
    raise ValueError("this one first")


def test_weights_of_no_site_are_warned_of_and_negative_ones_refused(problem):
    program, x = problem
    with (
        pytest.warns(UserWarning, match="names among the sites z, x, got data, z1") as caught,
        weigh({"z1": 1, "data": 1}),
    ):
        Trace_ELBO().loss(program.model, program.guide, x)
    assert caught[0].filename == __file__
    with weigh({"z": 2.0, "x": 2.0}):
        Trace_ELBO().loss(program.model, program.guide, x)
    weigh({"x": 2.0})(program.guide)(x)  # which does not have it, as no guide has
    with pytest.raises(ValueError, match="this one first"), weigh({"z1": 1}):
        _failing(program.model, x)
    with pytest.raises(ValueError, match=r"weigh, site 'x': expected a value of at least 0, got -0.1"):
        weigh({"z": 1.0, "x": -0.1})


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


@pytest.mark.parametrize("ours", [True, False])
def test_dreams_do_not_count(ours):
    """The guide is exact: rate and distortion of each particle make up the log-evidence, but not those of dreams."""

    def guide(x, observations=None):
        program.guide(x)

    program, x = LinearGaussian(), torch.randn(4, 3, dtype=torch.float64)
    if ours:
        estimator = estimators.ReweightedWakeSleep(2, insomnia=0.5)
    else:
        estimator = ReweightedWakeSleep(num_particles=2, insomnia=0.5, vectorize_particles=True, max_plate_nesting=1)
    with record() as recorded:
        model = recorded.model(lambda x, observations=None: program.model(x))
        estimator.loss_and_grads(model, recorded.guide(guide), x)
    torch.testing.assert_close(recorded.rate + recorded.distortion, -program.evidence(x))


def test_a_guide_that_no_model_follows_is_no_particle(problem):
    """An estimator may run the guide to look for global latents, and once more for its gradient."""
    program, x = problem
    with record() as recorded:
        recorded.guide(program.guide)(x)
        loss = Trace_ELBO(num_particles=2).loss(recorded.model(program.model), recorded.guide(program.guide), x)
        recorded.guide(program.guide)(x)
    assert loss == pytest.approx((recorded.rate + recorded.distortion).sum().item(), rel=1e-12)


def test_what_the_particles_of_a_run_share_weighs_as_many_times():
    def model(x, shift, size):
        with pyro.plate("particles", size, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(shift, 1.0), obs=x)

    x = torch.zeros(3, dtype=torch.float64)
    shifts = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    with record() as recorded:
        for shift, size in zip(shifts, (4, 4, 2), strict=True):
            recorded.model(model)(x, shift, size)
    normal = dist.Normal(shifts, 1.0).log_prob(torch.zeros(()))
    expected = -(4 * normal[0] + 4 * normal[1] + 2 * normal[2]) / 10
    torch.testing.assert_close(recorded.distortion, expected.expand(3), rtol=1e-12, atol=0)


def test_record_forgets_when_it_is_entered_again(problem):
    program, x = problem
    recorded = record()
    for data in (x, x + 1.0):
        with recorded:
            loss = Trace_ELBO().loss(recorded.model(program.model), recorded.guide(program.guide), data)
        assert loss == pytest.approx((recorded.rate + recorded.distortion).sum().item(), rel=1e-12)


def test_record_keeps_neither_distributions_nor_graphs():
    """What a decoder gives for every particle, and all that was computed on the way, is free once the loss is."""
    kept = []

    class Watched(TwoLatents):
        def model(self, x):
            hook = self.down.register_forward_hook(lambda module, inputs, output: kept.append(weakref.ref(output)))
            super().model(x)
            hook.remove()

    program = Watched()
    with record() as recorded:
        Trace_ELBO().loss_and_grads(recorded.model(program.model), recorded.guide(program.guide), torch.ones(6, 64))
    pyro.clear_param_store()
    gc.collect()
    assert len(kept) == 1
    assert kept[0]() is None
    assert recorded.rate.shape == (6,)
    assert not any(tensor.requires_grad for site in recorded._sites for tensor in (site.value, site.log_prob))
