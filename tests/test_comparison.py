"""The comparison of estimators: each column against exact values, and nothing left behind."""

import gc
import math
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, Mixture, TwoLatents
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceTailAdaptive_ELBO
from torch import nn

import pyro_vae
from pyro_vae import estimators
from pyro_vae.estimators import comparison, evidence, terminal
from pyro_vae.estimators.comparison import _Bench
from pyro_vae.estimators.measures import peak_memory

compare = estimators.compare
EXACT = {  # of these each draw is the evidence, where the guide is the posterior
    "Trace_ELBO": Trace_ELBO(),
    "TraceGraph_ELBO": TraceGraph_ELBO(),
    "TraceEnum_ELBO": TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    "RenyiELBO": RenyiELBO(alpha=0.5, num_particles=3),
    "IWAE": estimators.IWAE(3),
    "IWAE in chunks": estimators.IWAE(3, chunk=2),
    "DReG": estimators.DReG(3),
    "Renyi": estimators.Renyi(0.5, 3),
    "CIWAE": estimators.CIWAE(0.5, 3),
    "MIWAE": estimators.MIWAE(2, 2),
    "PIWAE": estimators.PIWAE(2, 2),
    "StickingTheLanding": estimators.StickingTheLanding(),
    "VIMCO": estimators.VIMCO(3),
    "Reinforce": estimators.Reinforce(3),
    "ReweightedWakeSleep": estimators.ReweightedWakeSleep(3),
    "Thermodynamic": estimators.Thermodynamic(3),
}


class Scripted(ELBO):
    """A loss that is linear in all parameters, with normal slopes that are kept."""

    def __init__(self, program, signal=1.0, seconds=()):
        super().__init__()
        self.program, self.signal, self.seconds, self.slopes = program, signal, list(seconds), []

    def _get_trace(self, *args):
        raise NotImplementedError

    def differentiable_loss(self, model, guide, *args):
        time.sleep(self.seconds.pop(0) if self.seconds else 0)
        parameters = dict(self.program.named_parameters())
        self.slopes.append({name: self.signal + torch.randn_like(p) for name, p in parameters.items()})
        return sum((self.slopes[-1][name] * parameter).sum() for name, parameter in parameters.items())

    @property
    def measured(self):
        """Without the first, a trial, and the last, whose memory was measured."""
        return self.slopes[1:-1]


class Shared(nn.Module):
    """A parameter of the model, one of the guide, one of both, and one of neither."""

    def __init__(self):
        super().__init__()
        for name, size in {"of_model": 2, "of_guide": 3, "of_both": 1, "of_none": 4}.items():
            setattr(self, name, nn.Parameter(torch.ones(size, dtype=torch.float64)))

    def model(self, x):
        pyro_vae.programs.declare_parameters(self)
        with pyro_vae.programs.data_plate(x, size=20):
            z = pyro.sample("z", dist.Normal(self.of_both, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.of_model.sum(), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro_vae.programs.declare_parameters(self)
        with pyro_vae.programs.data_plate(x, size=20):
            pyro.sample("z", dist.Normal(x * self.of_guide.sum(), self.of_both.exp()).to_event(1))


@pytest.fixture
def shared():
    return Shared(), torch.randn(4, 1, dtype=torch.float64)


@pytest.mark.parametrize("size", [None, 1000])
def test_at_the_exact_posterior_every_bound_is_the_evidence(size):
    """Of all data and of a subsample, whose loss is that of 1,000 data: to 1e-10, without an error to speak of."""
    program, x = LinearGaussian(), torch.randn(5, 3, dtype=torch.float64)
    program.size = size
    chosen = {name: estimator for name, estimator in EXACT.items() if size is None or name != "RenyiELBO"}
    found = compare(program, x, chosen, repeats=2, reference_particles=10, progress=False)
    exact = program.evidence(x).mean().item()
    assert list(found.estimator.values) == list(chosen)
    np.testing.assert_allclose(found.bound, exact, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.bound_se, 0, atol=1e-10)
    np.testing.assert_allclose(found.gap, 0, atol=1e-10)
    assert found.reference.item() == pytest.approx(exact, abs=1e-10)
    assert found.reference_se.item() < 1e-7  # the root of a rounding error
    assert found.attrs["num_data"] == (size or 5)


def test_bound_and_gap_off_the_posterior():
    """200 draws; the bound within 4 of its standard errors of the closed form, which are below 0.05; the reference and
    the gap likewise. False alarm 2e-4 in all, seed 0."""
    program, x = LinearGaussian(scale=1.3), torch.randn(20, 3, dtype=torch.float64)
    found = compare(program, x, {"ELBO": Trace_ELBO()}, repeats=200, reference_particles=2000, progress=False)
    elbo = -(program.rate(x) + program.distortion(x)).mean().item()
    exact = program.evidence(x).mean().item()
    bound_se, reference_se = found.bound_se.item(), found.reference_se.item()
    assert bound_se < 0.05
    assert reference_se < 0.01
    assert found.bound.item() == pytest.approx(elbo, abs=4 * bound_se)
    assert found.reference.item() == pytest.approx(exact, abs=4 * reference_se)
    assert found.gap.item() == pytest.approx(exact - elbo, abs=4 * math.hypot(bound_se, reference_se))
    assert exact - elbo > 8 * bound_se  # or the gap could not be seen


def test_the_error_of_the_evidence_is_its_spread():
    """The same datum 400 times over: the error given is the spread of the estimates, within 4 standard errors of a
    standard deviation (14 %). False alarm 6e-5, seed 0."""
    program, x = LinearGaussian(scale=1.3), torch.ones(400, 3, dtype=torch.float64)
    found = evidence.estimate_evidence(program.model, program.guide, x, num_particles=200, at_once=64)
    assert found.log_evidence.std().item() == pytest.approx(found.error.mean().item(), rel=0.15)


@pytest.mark.parametrize("signal", [0.0, 1.0])
def test_gradient_variance_and_snr_against_stored_gradients(shared, signal):
    """By numpy, from the gradients that the estimator has kept; the loss is per datum of 20, the batch being 4."""
    program, x = shared
    scripted = Scripted(program, signal)
    found = compare(program, x, {"scripted": scripted}, repeats=7, reference_particles=5, progress=False)
    assert len(scripted.measured) == 7
    parts = {"model": ("of_model", "of_both"), "guide": ("of_guide", "of_both")}
    for part, names in parts.items():
        slopes = np.array([np.concatenate([s[name].numpy() for name in names]) for s in scripted.measured]) / 20
        variance = slopes.var(0, ddof=1)
        signal_squared = max((slopes.mean(0) ** 2).sum() - variance.sum() / 7, 0)
        got = found.sel(estimator="scripted", part=part)
        assert got.gradient_variance.item() == pytest.approx(variance.mean(), rel=1e-12)
        assert got.gradient_snr.item() == pytest.approx(np.sqrt(signal_squared / variance.sum()), rel=1e-9)
    losses = [sum(slope.sum().item() for slope in slopes.values()) for slopes in scripted.measured]
    assert found.bound.item() == pytest.approx(-np.mean(losses) / 20, rel=1e-12)
    assert found.bound_se.item() == pytest.approx(np.std(losses, ddof=1) / np.sqrt(7) / 20, rel=1e-12)


def test_all_estimators_see_the_same_seeds_and_a_seed_repeats_them(shared):
    program, x = shared
    first, second, third = (Scripted(program) for _ in range(3))
    found = compare(program, x, {"a": first, "b": second}, repeats=5, reference_particles=5, progress=False)
    again = compare(program, x, {"a": third}, repeats=5, reference_particles=5, progress=False)
    values = [[s["of_model"].tolist() for s in e.measured] for e in (first, second, third)]
    assert values[0] == values[1] == values[2]
    assert len({tuple(value) for value in values[0]}) == 5  # each repeat has a seed of its own
    assert found.reference.item() == again.reference.item()
    other = Scripted(program)
    compare(program, x, {"a": other}, repeats=5, reference_particles=5, seed=1, progress=False)
    assert not {tuple(value) for value in values[0]} & {tuple(s["of_model"].tolist()) for s in other.measured}


def test_a_parameter_without_gradient_counts_as_zero(shared):
    program, x = shared

    class Silent(Scripted):
        def differentiable_loss(self, model, guide, *args):
            super().differentiable_loss(model, guide, *args)
            return (self.slopes[-1]["of_model"] * self.program.of_model).sum()

    found = compare(program, x, {"silent": Silent(program)}, repeats=4, reference_particles=5, progress=False)
    assert found.gradient_variance.sel(part="guide").item() == 0
    assert math.isnan(found.gradient_snr.sel(part="guide").item())
    assert found.gradient_variance.sel(part="model").item() > 0


def test_whose_parameters_are_whose():
    vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)
    parts = _Bench(vae, x).parts
    assert set(parts["model"]) == set(vae.likelihood.parameters())
    assert set(parts["guide"]) == set(vae.posterior.parameters())
    vamp = pyro_vae.build((8, 8), latent=2, prior="VampPrior(components=3)")
    parts = _Bench(vamp, x).parts
    assert set(parts["model"]) == set(vamp.parameters())
    assert set(parts["guide"]) == set(vamp.posterior.parameters())
    for parameter in vamp.likelihood.parameters():
        parameter.requires_grad_(False)
    assert not set(_Bench(vamp, x).parts["model"]) & set(vamp.likelihood.parameters())
    two = TwoLatents()
    parts = _Bench(two, x).parts
    assert set(parts["model"]) == {*two.middle.parameters(), *two.down.parameters()}
    assert set(parts["guide"]) == {*two.up.parameters(), *two.top.parameters()}


def test_a_part_without_parameters():
    vae = pyro_vae.build((8, 8), latent=2)
    vae.likelihood.requires_grad_(False)
    found = compare(vae, torch.ones(3, 8, 8), {"ELBO": Trace_ELBO()}, repeats=2, reference_particles=5, progress=False)
    assert found[["gradient_variance", "gradient_snr"]].sel(part="model").to_dataarray().isnull().all()
    assert found[["gradient_variance", "gradient_snr"]].sel(part="guide").to_dataarray().notnull().all()


def test_point_estimates_are_the_guides(cleared_store):
    """Param sites of a guide of deltas: at their trained values, and left at these."""

    class Program(nn.Module):
        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(self, x):
            loc = pyro.param("loc", lambda: x.new_zeros(len(x)))
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Delta(loc))

    x = torch.tensor([1.0, -2.0])
    pyro.param("loc", x / 2)
    found = compare(Program(), x, {"ELBO": Trace_ELBO()}, repeats=2, reference_particles=2, progress=False)
    joint = dist.Normal(0.0, 1.0).log_prob(x / 2) + dist.Normal(x / 2, 1.0).log_prob(x)
    assert found.bound.item() == pytest.approx(joint.mean().item(), rel=1e-6)
    assert found.gradient_variance.sel(part="guide").item() == 0
    assert pyro.param("loc").tolist() == [0.5, -1.0]
    assert list(pyro.get_param_store()) == ["loc"]


def test_dreg_learns_the_guide_from_a_clearer_signal():
    """SNR of 16 particles, 300 repeats: DReG's is above twice IWAE's (it is near four times), seed 0."""
    program, x = LinearGaussian(scale=1.3), torch.randn(20, 3, dtype=torch.float64)

    class Apart(LinearGaussian):
        """The guide has a copy of the weights, slightly off."""

        def __init__(self):
            super().__init__(scale=1.1)
            self.own = nn.Parameter(self.weight.detach() * 1.1)

        def posterior(self, x):
            precision = 1 + (self.own**2).sum(0) / self.noise**2
            mean = (x - self.bias.detach()) @ self.own / self.noise**2 / precision
            return mean, precision.rsqrt().expand(len(x), -1)

    program = Apart()
    chosen = {"IWAE": estimators.IWAE(16), "DReG": estimators.DReG(16)}
    found = compare(program, x, chosen, repeats=300, reference_particles=5, progress=False)
    guide, model = (found.gradient_snr.sel(part=part) for part in ("guide", "model"))
    assert guide.sel(estimator="DReG").item() > 2 * guide.sel(estimator="IWAE").item()
    # The model's gradient is the same in both.
    assert model.sel(estimator="DReG").item() == pytest.approx(model.sel(estimator="IWAE").item(), rel=1e-6)


def kept_and_freed():
    first = torch.ones(2**20)  # 4 MiB
    second = torch.ones(2**19)  # 2 MiB
    del first
    return second, torch.ones(2**18)  # 1 MiB


def one_after_another():
    for _ in range(5):
        torch.ones(2**20)


def backward():
    layer, x = nn.Linear(1024, 1024), torch.ones(1024, 1024)  # 4 MiB each, and 4 KiB
    layer(x).relu().sum().backward()  # then 4 MiB of outputs, 4 of relu, and never more than two at once


@pytest.mark.parametrize(("step", "mebibytes"), [(kept_and_freed, 6), (one_after_another, 4), (backward, 16)])
def test_memory_of_known_steps(step, mebibytes):
    for _ in range(2):
        assert peak_memory(step, torch.device("cpu")) == pytest.approx(mebibytes, rel=0.02)


def test_no_garbage_is_collected_in_the_middle():
    """Memory from before the step, let go of within it, would count against what the step takes."""
    seen = []
    peak_memory(lambda: seen.append(gc.isenabled()), torch.device("cpu"))
    assert seen == [False]
    assert gc.isenabled()


def test_memory_and_time_of_an_estimator(shared, capfd):
    """4 MiB and 20 milliseconds beside next to nothing; neither a slow first step nor one that is slow counts."""
    program, x = shared

    class Costly(Scripted):
        def differentiable_loss(self, model, guide, *args):
            self.room = torch.ones(2**20)
            loss = super().differentiable_loss(model, guide, *args)
            del self.room
            return loss

    costly, cheap = Costly(program, seconds=[1.0, 0.02, 0.6, 0.02]), Scripted(program)
    found = compare(program, x, {"costly": costly, "cheap": cheap}, repeats=3, reference_particles=5, progress=False)
    memory, milliseconds = (found[name].sel(estimator="costly").item() for name in ("memory", "milliseconds"))
    assert memory == pytest.approx(4, rel=0.02)
    assert 20 <= milliseconds < 150
    assert found.memory.sel(estimator="cheap").item() < 0.1
    assert found.milliseconds.sel(estimator="cheap").item() < milliseconds
    assert capfd.readouterr() == ("", "")  # nothing of torch's profiler


def test_memory_of_the_reference_does_not_grow_with_particles():
    vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(50, 8, 8)
    peaks = [
        peak_memory(
            lambda k=k: evidence.estimate_evidence(vae.model, vae.guide, x, num_particles=k, at_once=20),
            torch.device("cpu"),
        )
        for k in (40, 400)
    ]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)
    assert peaks[0] > 0.2  # a megabyte of decoder outputs, some of it more than once


class Failing(Trace_ELBO):
    """In the middle of the work."""

    steps = 0

    def differentiable_loss(self, *args):
        self.steps += 1
        if self.steps == 3:
            raise FloatingPointError("at the third step")
        return super().differentiable_loss(*args)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(fails):
    vae = pyro_vae.build((8, 8), latent=2)
    vae.posterior.net.layers.append(nn.Dropout(0.5))
    vae.train()
    vae.prior.eval()
    weights = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    first = next(vae.likelihood.parameters())
    first.grad = gradient = torch.ones_like(first)
    modes = [module.training for module in vae.modules()]
    rng = torch.get_rng_state()
    x = torch.ones(3, 8, 8)
    chosen = {"ELBO": Trace_ELBO(), "Renyi": RenyiELBO(num_particles=2)}
    if fails:
        chosen["fails"] = Failing()
        with pytest.raises(FloatingPointError, match="at the third step"):
            compare(vae, x, chosen, repeats=2, reference_particles=5, progress=False)
    else:
        compare(vae, x, chosen, repeats=2, reference_particles=5, progress=False)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in vae.modules()] == modes
    assert first.grad is gradient
    assert gradient.eq(1).all()
    assert all(parameter.grad is None for parameter in vae.parameters() if parameter is not first)
    assert all(torch.equal(weights[name], tensor) for name, tensor in vae.state_dict().items())
    assert torch.is_grad_enabled()
    assert not list(pyro.get_param_store())


def test_the_program_is_in_eval_mode():
    """Dropout of everything would show: the bound is that without it."""
    vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)
    plain = compare(vae, x, {"ELBO": Trace_ELBO()}, repeats=2, reference_particles=5, progress=False)
    vae.likelihood.net.layers.append(nn.Dropout(0.9))
    vae.train()
    dropped = compare(vae, x, {"ELBO": Trace_ELBO()}, repeats=2, reference_particles=5, progress=False)
    assert plain.bound.item() == dropped.bound.item()


def test_other_programs():
    x = torch.rand(6, 8, 8).round()
    chosen = {"ELBO": Trace_ELBO(), "Renyi": RenyiELBO(num_particles=2), "graph": TraceGraph_ELBO()}
    vamp = pyro_vae.build((8, 8), latent=2, prior="VampPrior(components=3)")
    ard = pyro_vae.build((8, 8), latent=2, prior="ARD()", size=60)
    for program in (TwoLatents(), vamp, ard):
        own = {"IWAE": estimators.IWAE(2), "DReG": estimators.DReG(2)}
        asked = own | {name: e for name, e in chosen.items() if program is not ard or name != "Renyi"}
        found = compare(program, x, asked, repeats=4, reference_particles=5, progress=False)
        assert np.isfinite(found.to_dataarray()).all()
        assert (found.gradient_variance > 0).all()
    mixture, data = Mixture(), torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    found = compare(
        mixture, data, {"VIMCO": estimators.VIMCO(3)}, repeats=4, reference_particles=20_000, progress=False
    )
    assert found.reference.item() == pytest.approx(mixture.evidence(data).mean().item(), abs=0.05)
    assert (found.gradient_variance > 0).all()


def test_a_loss_that_is_no_number_and_a_warning():
    vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)
    tail = TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    with pytest.warns(UserWarning, match="TraceTailAdaptive_ELBO"):
        found = compare(vae, x, {"tail": tail}, repeats=2, reference_particles=5, progress=False)
    assert found[["bound", "bound_se", "gap"]].to_dataarray().isnull().all()
    assert (found.gradient_variance > 0).all()


def test_labels_beside_the_data_are_left_out_and_floats_fit_the_program():
    vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)
    chosen = {"ELBO": Trace_ELBO()}
    plain = compare(vae, x, chosen, repeats=2, reference_particles=5, progress=False)
    labelled = compare(vae, (x.double(), torch.arange(3)), chosen, repeats=2, reference_particles=5, progress=False)
    assert plain.bound.item() == labelled.bound.item()


@pytest.mark.parametrize(("chosen", "options", "message"), [
    ([Trace_ELBO()], {}, "estimators by name"),
    ({}, {}, "estimators by name"),
    ({"ELBO": Trace_ELBO}, {}, "ELBO: expected an estimator such as"),
    ({"ELBO": Trace_ELBO()}, {"repeats": 1}, "repeats: expected at least 2"),
    ({"ELBO": Trace_ELBO()}, {"reference_particles": 0}, "reference_particles: expected a positive number, got 0"),
    ({"ELBO": Trace_ELBO(), "mine": estimators.IWAE(2)}, {}, "mine: expected a guide whose draws are differentiable"),
])  # fmt: skip
def test_errors_come_before_the_work(chosen, options, message, monkeypatch):
    def work(*args, **kwargs):
        raise AssertionError("too late")

    monkeypatch.setattr(comparison, "estimate_evidence", work)
    with pytest.raises(ValueError, match=message):
        compare(Mixture(), torch.ones(2, 2, dtype=torch.float64), chosen, progress=False, **options)


def test_parameters_that_an_estimator_cannot_see():
    """Without declared parameters Pyro's RenyiELBO leaves backward out, and all would seem to be zero."""

    class Undeclared(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(1))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(self.loc, 1.0)), 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x + self.loc, 1.0))

    program, x = Undeclared(), torch.ones(3)
    assert (compare(program, x, {"ELBO": Trace_ELBO()}, repeats=2, progress=False).gradient_variance > 0).all()
    with pytest.raises(ValueError, match=r"Renyi: no parameter of Undeclared .* declare_parameters"):
        compare(program, x, {"Renyi": RenyiELBO(num_particles=2)}, repeats=2, progress=False)


def test_what_is_shown_and_what_is_not(capsys):
    vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)
    chosen = {"ELBO": Trace_ELBO(), "IWAE(num_particles=8)": estimators.IWAE(8)}
    found = compare(vae, x, chosen, repeats=2, reference_particles=5)
    out = capsys.readouterr().out
    for word in (*chosen, "bound", "gap", "SNR", "var", "model", "guide", "ms", "MiB", "nats per datum"):
        assert word in out
    assert max(map(len, out.splitlines())) <= 80
    bound, error = found.bound[0].item(), found.bound_se[0].item()
    assert f"{bound:.2f} ± {error:.2f}" in out
    close = {"IWAE": estimators.IWAE(200)}
    found = compare(LinearGaussian(scale=1.01), x.double()[:, 0, :3], close, repeats=2, reference_particles=500)
    assert f"± {found.bound_se.item():.4f}" in capsys.readouterr().out
    compare(vae, x, chosen, repeats=2, reference_particles=5, progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("seconds", "visible", "shown"), [(1.9, True, False), (2.1, True, True), (2.1, False, False)])
def test_a_bar_past_two_seconds(seconds, visible, shown, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: clock[0])
    with terminal.progress_bar(2, visible) as begin:
        advance = begin("IWAE(num_particles=8)")
        clock[0] = seconds
        for _ in range(2):
            advance(0.5)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("IWAE(num_particles=8)" in err) == shown


def test_the_data_set_says_what_it_holds_and_goes_to_disk(tmp_path):
    pytest.importorskip("scipy", reason="needs a NetCDF backend")
    import xarray as xr

    vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)
    found = compare(vae, x, {"ELBO": Trace_ELBO()}, repeats=2, reference_particles=5, progress=False)
    assert all({"units", "long_name"} <= set(found[name].attrs) for name in found.data_vars)
    assert found.attrs["repeats"] == 2
    assert found.attrs["reference_particles"] == 5
    assert {"pyro_vae", "torch", "pyro"} <= set(found.attrs)
    found.to_netcdf(tmp_path / "found.nc")
    with xr.open_dataset(tmp_path / "found.nc") as read:
        xr.testing.assert_identical(read.load().astype(found.dtypes), found)


@pytest.mark.gpu
def test_on_an_accelerator(accelerator):
    vae, x = pyro_vae.build((8, 8), latent=2).to(accelerator), torch.ones(3, 8, 8)
    rng = torch.get_rng_state()
    found = compare(vae, x, {"IWAE": estimators.IWAE(8)}, repeats=2, reference_particles=5, progress=False)
    assert np.isfinite(found.drop_vars("memory").to_dataarray()).all()
    assert found.memory.item() > 0 or accelerator != "cuda"
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_batch_of_booleans_is_one_of_floats():
    vae, x = pyro_vae.build((8, 8), latent=2), torch.rand(3, 8, 8) > 0.5
    some = {"repeats": 2, "reference_particles": 2, "progress": False}
    one, other = (compare(vae, batch, {"IWAE": estimators.IWAE(2)}, **some) for batch in (x, x.float()))
    assert one.bound.item() == other.bound.item()
    with pytest.raises(ValueError, match="got uint8; data.to_float"):
        compare(vae, x.to(torch.uint8), {"IWAE": estimators.IWAE(2)}, **some)
