"""Training: it fits, records the truth, resumes bit for bit, and fails cleanly."""

import copy
import inspect
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import yaml
from oracles import LinearGaussian, Mixture, TwoLatents
from pyro.infer import (
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    config_enumerate,
)
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae
from pyro_vae import evaluation, handlers, schedules
from pyro_vae.estimators import checks
from pyro_vae.training import NonFiniteError, Training, fit, steps
from pyro_vae.training.optimizers import FusedStep
from pyro_vae.training.options import Options

QUIET = {"progress": False, "batch_size": 5}


@pytest.fixture
def x():
    return torch.rand(20, 8, 8).round()


def make(**options):
    torch.manual_seed(0)
    return pyro_vae.build((8, 8), latent=2, network="MLP(hidden=[16])", **options)


def equal(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_it_learns_the_digits(digits):
    vae = pyro_vae.build(digits.train.event_shape, latent=8, network="MLP(hidden=[64])")
    fitted = fit(vae, digits.train, valid=digits.valid, epochs=40, lr=3e-3, seed=0, start_at_mean=True, progress=False)
    nll = -evaluation.log_likelihood(vae, digits.test, 100).mean()
    # Independent pixels at their means give 27.2 nats; seed 0 gives 24.0, and other seeds differ in the first decimal.
    mean = digits.train.x.mean(0).clamp(1e-3, 1 - 1e-3)
    independent = -dist.Bernoulli(mean).to_event(3).log_prob(digits.test.x.float()).mean()
    assert nll < independent - 2.5
    history = fitted.history
    assert list(history.columns) == [
        "epoch", "step", "beta", "loss", "elbo", "rate", "distortion", "valid_elbo", "seconds",
    ]  # fmt: skip
    assert history.elbo.iloc[-1] > history.elbo.iloc[0]
    np.testing.assert_allclose(history.elbo, -(history.rate + history.distortion))
    assert history.valid_elbo.notna().all()


def test_it_finds_the_maximum_likelihood_of_a_linear_gaussian_model():
    """Its guide is exact for every weight, so that the ELBO is the evidence and its maximum is known: probabilistic PCA
    (Tipping and Bishop, 1999). 300 data, full batches, seed 0."""
    torch.manual_seed(0)
    truth = LinearGaussian()
    z = torch.randn(300, 2, dtype=torch.float64)
    x = z @ truth.weight.detach().T + truth.bias.detach() + 0.7 * torch.randn(300, 3, dtype=torch.float64)
    program = LinearGaussian()
    with torch.no_grad():
        program.bias.zero_()
    fit(program, x, epochs=600, batch_size=300, lr=0.02, lr_schedule="cosine", precision="64-true", progress=False)
    torch.testing.assert_close(program.bias.detach(), x.mean(0), rtol=0, atol=0.01)


@pytest.mark.parametrize("make_data", [
    lambda x: x,
    lambda x: x.numpy(),
    lambda x: (x, torch.arange(20)),
    lambda x: TensorDataset(x, torch.arange(20)),
    lambda x: DataLoader(TensorDataset(x), batch_size=5),
])  # fmt: skip
def test_it_takes_any_data(make_data, x):
    vae = make()
    history = fit(vae, make_data(x), epochs=2, seed=0, **QUIET).history
    assert history.step.tolist() == [4, 8]
    assert not equal(vae, make())


@pytest.mark.filterwarnings("ignore:Found no sample sites|TraceEnum_ELBO found no")
@pytest.mark.filterwarnings("ignore:(TraceTailAdaptive_ELBO|ReweightedWakeSleep) .*; use estimators")
@pytest.mark.parametrize("estimator", [
    Trace_ELBO(num_particles=2),
    Trace_ELBO(num_particles=2, vectorize_particles=True),
    TraceMeanField_ELBO(),
    TraceGraph_ELBO(),
    TraceEnum_ELBO(),
    RenyiELBO(num_particles=2),
    RenyiELBO(num_particles=2, vectorize_particles=True),
    TraceTailAdaptive_ELBO(num_particles=2, vectorize_particles=True),
    ReweightedWakeSleep(num_particles=2, vectorize_particles=True),
], ids=lambda e: type(e).__name__)  # fmt: skip
def test_every_estimator_of_pyro_trains_every_parameter(estimator, x):
    vae = make()
    before = [p.clone() for p in vae.parameters()]
    history = fit(vae, x, estimator=estimator, epochs=2, seed=0, **QUIET).history
    assert all((a != b).any() for a, b in zip(before, vae.parameters(), strict=True))
    assert history.elbo.notna().all()


@pytest.mark.parametrize(
    "estimator", [Trace_ELBO(), TraceGraph_ELBO(), RenyiELBO(num_particles=2)], ids=lambda e: type(e).__name__
)
def test_the_gradient_is_that_of_the_mean_loss(estimator, x):
    """One step of plain gradient descent at learning rate 1 shows the gradient."""
    vae, other = make().double(), make().double()
    x = x.double()
    fit(vae, x, estimator=estimator, epochs=1, batch_size=20, lr=1.0, optimizer=torch.optim.SGD, seed=3, progress=False)
    torch.manual_seed(3)
    order = torch.Generator().manual_seed(int(np.random.SeedSequence((3, 0)).generate_state(1)[0]))
    rows = torch.randperm(20, generator=order)
    with pyro.get_param_store().scope(), pyro.poutine.trace(param_only=True):
        estimator.loss_and_grads(other.model, other.guide, x[rows])
    for got, start in zip(vae.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, start - start.grad / 20)


def test_hand_written_programs_train(x):
    program = TwoLatents()
    before = [p.clone() for p in program.parameters()]
    history = fit(program, x, epochs=2, **QUIET).history
    assert all((a != b).any() for a, b in zip(before, program.parameters(), strict=True))
    np.testing.assert_allclose(history.loss, -history.elbo, rtol=1e-5)


def test_discrete_latents_train_by_score_function_and_by_enumeration():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).repeat(10, 1)
    history = fit(Mixture(), x, epochs=2, precision="64-true", **QUIET).history
    assert history.elbo.notna().all()

    class Enumerated(Mixture):
        @config_enumerate
        def guide(self, x):
            super().guide(x)

    program = Enumerated()
    history = fit(program, x, estimator=TraceEnum_ELBO(), epochs=2, precision="64-true", **QUIET).history
    assert history.elbo.isna().all()
    assert history.loss.notna().all()


def test_pyro_modules_train_apart_and_leave_the_param_store_as_it_was(x):
    class Program(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(64, 2)
            self.scale = PyroParam(torch.ones(2), constraint=dist.constraints.positive)
            self.decoder = nn.Linear(2, 64)

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x.flatten(1))

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(self.net(x.flatten(1)), self.scale).to_event(1))

    with pyro.get_param_store().scope():
        pyro.param("mine", torch.tensor(3.0))
        first, second = Program(), Program()
        kept = [p.clone() for p in second.parameters()]
        before = [p.clone() for p in first.parameters()]
        fit(first, x, epochs=2, **QUIET)
        assert all((a != b).any() for a, b in zip(before, first.parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(kept, second.parameters(), strict=True))
        assert list(pyro.get_param_store()) == ["mine"]


def test_a_parameter_that_would_not_be_trained_is_refused(x):
    class Loose(TwoLatents):
        def model(self, x):
            pyro.param("loose", torch.tensor(1.0))
            super().model(x)

    with pytest.raises(ValueError, match=r"param site 'loose' is no \(contiguous\) parameter of Loose"):
        fit(Loose(), x, epochs=1, **QUIET)


def test_annealing_keeps_the_true_elbo_in_the_history(x):
    vae = make()
    history = fit(
        vae, x, anneal=schedules.Linear(1.0), epochs=4, seed=0, estimator=TraceMeanField_ELBO(), **QUIET
    ).history
    assert history.beta.tolist() == pytest.approx([3 / 16, 7 / 16, 11 / 16, 15 / 16])
    np.testing.assert_allclose(history.elbo, -(history.rate + history.distortion), rtol=1e-6)
    taken = list(steps(make(), x, anneal=schedules.Linear(1.0), epochs=1, batch_size=5, seed=0))
    assert [s.beta for s in taken] == [0, 0.25, 0.5, 0.75]


def test_trace_elbo_loss_under_annealing_is_distortion_plus_beta_rate(x):
    for step in steps(make(), x, anneal=lambda t: 1 - 0.9 * (t < 0.9), epochs=2, batch_size=5, seed=0):
        assert step.loss == pytest.approx(step.distortion + step.beta * step.rate, rel=1e-5)


def test_a_run_that_ends_below_one_warns(x):
    for run in (fit, lambda *given, **options: list(steps(*given, **{**options, "batch_size": 20}))):
        with pytest.warns(UserWarning, match=r"ends with beta = 0.5 < 1") as caught:
            run(make(), x, anneal=schedules.Constant(0.5), epochs=1, **(QUIET if run is fit else {}))
        assert caught[0].filename == __file__


@pytest.mark.parametrize("rate", [4.0, 10.0])
def test_a_controller_steers_the_rate_to_its_set_point(digits, rate):
    """Without one, this run has a rate of 2 nats. Over its last 10 epochs of 50 it was off the set points by 0.14 to
    0.18 and by 0.01 to 0.05 nats with seeds 0 to 7; 0.3 are allowed, seed 0."""
    vae = make_digits(digits)
    controller = schedules.ControlVAE(rate, integral=3e-3, high=10.0)
    history = fit(
        vae, digits.train, anneal=controller, epochs=50, lr=3e-3, seed=0, start_at_mean=True, progress=False
    ).history
    assert history.rate.iloc[-10:].mean() == pytest.approx(rate, abs=0.3)
    assert 0 < history.beta.iloc[-1] < 10


def make_digits(digits):
    torch.manual_seed(0)
    return pyro_vae.build(digits.train.event_shape, latent=8, network="MLP(hidden=[32])")


def test_a_controller_is_told_every_rate_and_is_not_changed(x):
    told = []

    class Own:
        beta = 0.3

        def __call__(self, progress):
            return self.beta

        def update(self, rate):
            self.beta += 0.1
            told.append(rate)

        def state_dict(self):
            return {"beta": self.beta}

        def load_state_dict(self, state):
            self.beta = state["beta"]

    own = Own()
    taken = list(steps(make(), x, anneal=own, epochs=2, batch_size=5, seed=0))
    assert told == [step.rate for step in taken]
    assert [step.beta for step in taken] == pytest.approx([0.3 + 0.1 * step for step in range(8)])
    assert own.beta == 0.3
    del Own.state_dict
    with pytest.raises(ValueError, match="with update, state_dict and load_state_dict, got Own without state_dict"):
        fit(make(), x, anneal=own, epochs=1, **QUIET)


def test_one_controller_serves_two_runs(x):
    controller = schedules.ControlVAE(5.0, integral=0.01)
    first, second = (fit(make(), x, anneal=controller, epochs=2, seed=0, **QUIET) for _ in range(2))
    assert equal(first.program, second.program)
    assert first.history.beta.equals(second.history.beta)
    assert controller == schedules.ControlVAE(5.0, integral=0.01)


@pytest.mark.parametrize("interrupted_at", [8, 6])
def test_a_controller_resumes_bit_for_bit(tmp_path, x, interrupted_at):
    controller = schedules.ControlVAE(0.3, proportional=0.05, integral=0.05)
    options = {"epochs": 4, "anneal": controller, "seed": 5, **QUIET}
    straight, resumed = make(), make()
    whole = fit(straight, x, **options).history
    stop_after(interrupted_at, lambda: fit(make(), x, out=tmp_path / "run", **options))
    history = fit(resumed, x, out=tmp_path / "run", resume=True, **options).history
    assert whole.beta.nunique() == 4
    assert equal(resumed, straight)
    pd.testing.assert_frame_equal(history.drop(columns="seconds"), whole.drop(columns="seconds"))
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["anneal"] == "ControlVAE(rate=0.3, proportional=0.05, integral=0.05)"
    with pytest.raises(ValueError, match="expected controller None, got ControlVAE"):
        fit(make(), x, epochs=5, out=tmp_path / "run", resume=True, **QUIET)


def test_weights_of_sites_work_around_fit(x):
    with handlers.weigh({"z1": 0.0, "z2": 0.0, "x": 2.0}):
        history = fit(TwoLatents(), x, epochs=2, seed=0, **QUIET).history
    np.testing.assert_allclose(history.loss, 2 * history.distortion, rtol=1e-5)
    np.testing.assert_allclose(history.elbo, -(history.rate + history.distortion), rtol=1e-6)
    assert (history.rate != 0).all()
    with pytest.warns(UserWarning, match="among the sites z1, z2, x, got z"), handlers.weigh({"z": 0.5}):
        fit(TwoLatents(), x, epochs=1, **QUIET)


def test_an_estimator_may_follow_the_progress(x):
    class Following(Trace_ELBO):
        def set_progress(self, progress):
            self.progress = progress

        def loss_and_grads(self, *arguments):
            seen.append(self.progress)
            return super().loss_and_grads(*arguments)

    seen = []
    fit(make(), x, estimator=Following(), epochs=2, **QUIET)
    assert seen == [step / 8 for step in range(8)]


@pytest.fixture
def checked(monkeypatch):
    """What the check of an estimator is called with, and the program's state: it runs the program as the real one."""
    calls = []

    def check(estimator, model, guide, *batch):
        calls.append((estimator, [tensor.shape for tensor in batch]))
        trace = pyro.poutine.trace(guide).get_trace(*batch)
        pyro.poutine.trace(pyro.poutine.replay(model, trace=trace)).get_trace(*batch)
        calls.append((trace.nodes["z"]["scale"], model.__self__.training))
        pyro.param("left", torch.tensor(1.0))

    monkeypatch.setattr(checks, "check", check)
    return calls


def normalized():
    """With running statistics, and noise of its own."""
    torch.manual_seed(0)
    vae = make()
    vae.posterior.net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.1), nn.Linear(64, 4))
    return vae


def test_the_estimator_is_checked_once_and_nothing_is_disturbed(checked, monkeypatch, tmp_path, x):
    estimator, anneal = Trace_ELBO(), schedules.Linear(1.0, start=0.25)
    options = {"estimator": estimator, "anneal": anneal, "epochs": 4, "seed": 0, **QUIET}
    resumed, straight = normalized(), normalized()
    with pytest.warns(UserWarning, match="cannot name the program"):
        stop_after(6, lambda: fit(normalized(), x, out=tmp_path / "run", **options))
    fit(resumed, x, out=tmp_path / "run", resume=True, **options)
    assert checked == [(estimator, [(5, 8, 8)]), (0.25, True)] * 2
    monkeypatch.setattr(checks, "check", lambda *arguments: None)
    fit(straight, x, **options)
    assert equal(resumed, straight)


def test_an_estimator_that_is_refused_leaves_the_old_run(monkeypatch, tmp_path, x):
    def refuse(*arguments):
        raise ValueError("no")

    fit(make(), x, epochs=1, out=tmp_path / "run", **QUIET)
    monkeypatch.setattr(checks, "check", refuse)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="no"):
        fit(make(), x, epochs=1, out=tmp_path / "run", overwrite=True, **QUIET)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_fit_has_the_options_of_a_training_and_their_defaults():
    taken, options = (inspect.signature(each).parameters for each in (fit, Options))
    assert {name: taken[name].default for name in options} == {name: p.default for name, p in options.items()}
    assert taken.keys() - options.keys() == {"program", "data", "valid", "out", "resume", "overwrite", "progress"}


def test_the_loop_is_the_callback(x):
    vae, seen = make(), []
    for step in steps(vae, x, epochs=5, batch_size=5, seed=0):
        seen.append(step.step)
        if step.step == 7:
            break
    assert seen == list(range(1, 8))


def test_averages_of_gradients_that_have_become_zero_do_not_decay_to_subnormal_numbers():
    """Those are computed ten times as slowly; here of a pixel that only the first datum lights."""
    x = torch.ones(600, 5)
    x[1:, 2] = 0
    vae = pyro_vae.build((5,), latent=2)
    loader = DataLoader(TensorDataset(x), batch_size=1)
    training = Training(vae, loader, epochs=1, compile=False, optimizer=partial(torch.optim.Adam, betas=(0.7, 0.999)))
    for _ in training:
        pass
    moments = [kept["exp_avg"] for kept in training.optimizer.state.values()]
    assert sum((moment == 0).sum() for moment in moments) > 0
    for moment in moments:
        assert not ((moment != 0) & (moment.abs() < torch.finfo(moment.dtype).tiny)).any()


@pytest.mark.parametrize("adam", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.float64)])
def test_the_fused_step_is_the_optimizer_s(adam, dtypes):
    """Bit for bit, also where the learning rate changes, or a gradient is missing; and so are its state and counts."""
    torch.manual_seed(0)
    gradients = [[torch.randn(300, 5, dtype=dtype) for dtype in dtypes] for _ in range(12)]
    found = []
    for stepping in (lambda optimizer: lambda: optimizer.step(), FusedStep):
        weights = [nn.Parameter(torch.ones(300, 5, dtype=dtype)) for dtype in dtypes]
        optimizer = adam(weights, lr=0.1, fused=True)
        step, schedule = stepping(optimizer), torch.optim.lr_scheduler.StepLR(optimizer, 3)
        for i, given in enumerate(gradients):
            for weight, gradient in zip(weights, given, strict=True):
                weight.grad = None if i in (0, 6) and weight is weights[1] else gradient
            step()
            schedule.step()
            if i == 8:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        kept = [optimizer.state[weight][name] for weight in weights for name in ("step", "exp_avg", "exp_avg_sq")]
        found.append([*weights, *kept])
    assert [int(tensor) for tensor in found[1] if tensor.dim() == 0] == [12, 10]
    assert all(map(torch.equal, *found))


def test_the_optimizer_s_own_step_where_others_have_it(x):
    """A schedule of the user's may look at its steps, and 16-mixed scales its gradients."""
    for options, fused in (({}, True), ({"lr_schedule": "cosine"}, True), ({"optimizer": torch.optim.SGD}, False)):
        assert isinstance(Training(make(), x, batch_size=5, **options)._optimizer_step, FusedStep) is fused
    seen = []

    def watching(optimizer):
        optimizer.register_step_post_hook(lambda *_: seen.append(1))
        return torch.optim.lr_scheduler.StepLR(optimizer, 3)

    fit(make(), x, epochs=2, lr_schedule=watching, **QUIET)
    assert len(seen) == 8
    hook = register_optimizer_step_post_hook(lambda *_: seen.append(2))
    try:
        fit(make(), x, epochs=2, **QUIET)
    finally:
        hook.remove()
    assert seen.count(2) == 8


def test_parameters_between_which_there_are_others_are_trained_whole(x):
    """The fused kernel would go through the memory between their numbers, and not to their end."""
    vae = make()
    vae.likelihood.net.layers[-1].bias = bias = nn.Parameter(torch.zeros(128)[::2])
    fit(vae, x, epochs=1, **QUIET)
    assert (bias != 0).all()


@pytest.mark.filterwarnings("ignore:config.yaml cannot name the anneal")
@pytest.mark.parametrize("one", [torch.tensor(1.0), np.float32(1), True])
def test_beta_may_be_any_number(tmp_path, x, one):
    fit(make(), x, epochs=1, anneal=lambda progress: one, out=tmp_path / "run", **QUIET)
    assert pd.read_csv(tmp_path / "run" / "history.csv").beta.tolist() == [1.0]


def test_subsampled_plates_give_the_loss_per_datum():
    program, x = LinearGaussian(scale=1.2), torch.randn(20, 3, dtype=torch.float64)
    program.size = 1000
    for step in steps(program, x, epochs=1, batch_size=5, precision="64-true"):
        assert step.loss == pytest.approx(-step.elbo)


@pytest.mark.filterwarnings("ignore:config.yaml cannot name the lr_schedule")
@pytest.mark.parametrize("lr_schedule", [None, "cosine", "one-cycle", lambda o: torch.optim.lr_scheduler.StepLR(o, 3)])
@pytest.mark.parametrize("interrupted_at", [8, 6])
def test_resume_is_bit_for_bit(tmp_path, x, lr_schedule, interrupted_at):
    """A run stopped at the end of an epoch, or within one, and resumed, against one in one go."""
    options = {"epochs": 4, "lr_schedule": lr_schedule, "anneal": schedules.Linear(0.7), "seed": 5, **QUIET}
    grey = pyro_vae.data.InMemory(x * 0.7, binarize="dynamic")
    straight, stopped, resumed = make(), make(), make()
    whole = fit(straight, grey, out=tmp_path / "straight", **options).history

    stop_after(interrupted_at, lambda: fit(stopped, grey, out=tmp_path / "run", **options))
    for parameter in resumed.parameters():
        nn.init.zeros_(parameter)
    torch.manual_seed(99)
    history = fit(resumed, grey, out=tmp_path / "run", resume=True, **options).history
    assert not equal(stopped, straight)
    assert equal(resumed, straight)
    pd.testing.assert_frame_equal(history.drop(columns="seconds"), whole.drop(columns="seconds"))
    read = pd.read_csv(tmp_path / "run" / "history.csv")
    pd.testing.assert_frame_equal(read.drop(columns="seconds"), whole.drop(columns="seconds"))


def stop_after(step, call):
    """Press Ctrl-C during the given step."""
    taken = Training._take

    def take(self, *arguments):
        result = taken(self, *arguments)
        if result.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_take", take)
        with pytest.raises(KeyboardInterrupt):
            call()


@pytest.mark.parametrize("data", ["memory", "stream"])
def test_two_epochs_and_two_more_are_four(tmp_path, x, data):
    given = x if data == "memory" else TensorDataset(x)
    straight, resumed = make(), make()
    fit(straight, given, epochs=4, seed=5, **QUIET)
    fit(resumed, given, epochs=2, seed=5, out=tmp_path / "run", **QUIET)
    fit(resumed, given, epochs=4, seed=5, out=tmp_path / "run", resume=True, **QUIET)
    assert equal(straight, resumed)
    finished = fit(make(), given, epochs=4, seed=5, out=tmp_path / "run", resume=True, **QUIET)
    assert equal(finished.program, straight)
    assert len(finished.history) == 4


def test_a_resumed_run_keeps_what_others_have_written_to_it(tmp_path, x):
    fit(make(), x, epochs=1, out=tmp_path / "run", **QUIET)
    (tmp_path / "run" / "metrics.json").write_text("{}")
    fit(make(), x, epochs=2, out=tmp_path / "run", resume=True, **QUIET)
    assert (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("loader", [False, True])
def test_streams_resume_within_an_epoch(tmp_path, x, loader):
    grey = TensorDataset(x)
    given = DataLoader(grey, batch_size=5) if loader else grey
    straight, resumed = make(), make()
    fit(straight, given, epochs=3, seed=5, **QUIET)
    stop_after(6, lambda: fit(resumed, given, epochs=3, seed=5, out=tmp_path / "run", **QUIET))
    fit(resumed, given, epochs=3, seed=5, out=tmp_path / "run", resume=True, **QUIET)
    assert equal(straight, resumed)


@pytest.mark.parametrize(("changed", "message"), [
    ({"batch_size": 10}, "expected steps in an epoch 2, got 4"),
    ({"optimizer": torch.optim.SGD}, "expected optimizer SGD, got Adam"),
])  # fmt: skip
def test_another_run_is_not_resumed(tmp_path, x, changed, message):
    fit(make(), x, epochs=1, out=tmp_path / "run", **QUIET)
    with pytest.raises(ValueError, match=message):
        fit(make(), x, epochs=2, out=tmp_path / "run", resume=True, **{**QUIET, **changed})


@pytest.mark.filterwarnings("ignore:config.yaml cannot name the anneal")
def test_a_run_that_cannot_take_a_step_leaves_the_old_one(tmp_path, x):
    fit(make(), x, epochs=1, out=tmp_path / "run", **QUIET)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for options in ({"anneal": lambda progress: 2 * progress - 1}, {"valid": torch.zeros(3, 9, 9)}):
        with pytest.raises(ValueError, match="expected"):
            fit(make(), x, epochs=1, out=tmp_path / "run", overwrite=True, **options, **QUIET)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_history_weighs_batches_by_their_data(x):
    taken = list(steps(make(), x[:7], epochs=1, batch_size=5, seed=0))
    history = fit(make(), x[:7], epochs=1, seed=0, **QUIET).history
    assert history.loss[0] == pytest.approx((5 * taken[0].loss + 2 * taken[1].loss) / 7)
    assert taken[0].num_data == 5


def test_an_estimator_is_used_by_what_its_own_class_defines(x):
    class Own(Trace_ELBO):
        called = 0

        def loss_and_grads(self, *arguments):
            Own.called += 1
            return super().loss_and_grads(*arguments)

    fit(make(), x, estimator=Own(), epochs=1, **QUIET)
    assert Own.called == 4


def test_the_seed_decides(x):
    first, second, third = make(), make(), make()
    fit(first, x, epochs=1, seed=1, **QUIET)
    fit(second, x, epochs=1, seed=1, **QUIET)
    fit(third, x, epochs=1, seed=2, **QUIET)
    assert equal(first, second)
    assert not equal(first, third)


def test_validation_does_not_change_training(x):
    first, second = make(), make()
    fit(first, x, epochs=2, seed=1, **QUIET)
    fit(second, x, valid=x[:7], epochs=2, seed=1, **QUIET)
    assert equal(first, second)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_loss_that_is_not_finite_names_step_and_site_and_keeps_the_checkpoint(tmp_path, x):
    vae = make()
    taken = Training._take

    def take(self, epoch, batch):
        if self.step == 6:
            with torch.no_grad():
                vae.likelihood.net.output_bias[0] = torch.nan
        return taken(self, epoch, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_take", take)
        with pytest.raises(NonFiniteError, match=r"nan at step 7; first site not finite: 'x' of the model"):
            fit(vae, x, epochs=4, seed=0, out=tmp_path / "run", **QUIET)
    resumed = fit(make(), x, epochs=4, seed=0, out=tmp_path / "run", resume=True, **QUIET)
    assert equal(resumed.program, fit(make(), x, epochs=4, seed=0, **QUIET).program)


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path, x):
    vae = make()
    taken = Training._take

    def take(self, epoch, batch):
        step = taken(self, epoch, batch)
        if self.step == 8:
            with torch.no_grad():
                vae.likelihood.net.output_bias[0] = torch.inf
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_take", take)
        with pytest.raises(NonFiniteError, match="likelihood.net.layers.2.bias is not finite after step 8"):
            fit(vae, x, epochs=4, seed=0, out=tmp_path / "run", **QUIET)
        with pytest.raises(NonFiniteError, match="is not finite after step 8"):
            fit(make_again(vae), x, epochs=2, seed=0, **QUIET)
    resumed = fit(make(), x, epochs=4, seed=0, out=tmp_path / "run", resume=True, **QUIET)
    assert len(resumed.history) == 4


def make_again(vae):
    vae.load_state_dict(make().state_dict())
    return vae


def test_the_first_step_already_leaves_a_checkpoint(tmp_path, x):
    taken = Training._take

    def take(self, epoch, batch):
        if self.step == 2:
            raise RuntimeError("the third step fails")
        return taken(self, epoch, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_take", take)
        with pytest.raises(RuntimeError, match="third"):
            fit(make(), x, epochs=2, seed=0, out=tmp_path / "run", **QUIET)
    resumed = fit(make(), x, epochs=2, seed=0, out=tmp_path / "run", resume=True, **QUIET)
    assert equal(resumed.program, fit(make(), x, epochs=2, seed=0, **QUIET).program)


def test_a_killed_run_leaves_a_good_checkpoint(tmp_path):
    script = textwrap.dedent("""
        import os, torch, pyro_vae
        from pyro_vae.training import Training
        taken = Training._take
        def take(self, *arguments):
            if self.step == 6:
                os.kill(os.getpid(), 9)
            return taken(self, *arguments)
        Training._take = take
        torch.manual_seed(0)
        vae = pyro_vae.build((8, 8), latent=2, network="MLP(hidden=[16])")
        pyro_vae.fit(vae, torch.ones(20, 8, 8), epochs=4, batch_size=5, seed=0, out="run", progress=False)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == -9
    x = torch.ones(20, 8, 8)
    resumed = fit(make(), x, epochs=4, seed=0, out=tmp_path / "run", resume=True, **QUIET)
    assert len(resumed.history) == 4
    assert {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()} == {
        "config.yaml", "history.csv", "last.safetensors", "model.safetensors",
    }  # fmt: skip


def test_start_at_mean(x):
    grey = x * 0.3
    vae = make()
    with pytest.warns(UserWarning, match="grey"):
        Training(vae, grey, batch_size=5, start_at_mean=True)
    torch.testing.assert_close(vae.likelihood.net.output_bias.sigmoid().reshape(8, 8), grey.mean(0).clamp(1e-3, 0.999))
    with pytest.raises(ValueError, match=r"start_at\(mean\), got TwoLatents"):
        fit(TwoLatents(), x, start_at_mean=True, **QUIET)


def test_start_at_mean_of_counts_is_the_rate_of_an_exposure():
    x, exposure = torch.tensor([[2.0, 0.0], [4.0, 9.0]]), torch.tensor([1.0, 2.0])
    vae = pyro_vae.build((2,), latent=2, likelihood="Poisson(exposure=True)", prior="VampPrior(components=3)")
    before = vae.prior.inputs.detach().clone()
    Training(vae, (x, exposure), batch_size=2, start_at_mean=True)
    torch.testing.assert_close(vae.likelihood.net.output_bias.exp(), torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(vae.prior.inputs - before, torch.tensor([[2.0, 3.0]]).expand(3, 2))


def test_a_temperature_follows_its_schedule():
    vae = pyro_vae.build(
        (8, 8),
        latent=4,
        prior="RelaxedOneHotCategorical()",
        posterior="RelaxedOneHotCategorical(temperature=Linear(1.0, start=1.0, end=0.5))",
    )
    x = torch.ones(20, 8, 8)
    seen = [vae.posterior.current_temperature.item() for _ in steps(vae, x, epochs=2, batch_size=5)]
    assert seen == pytest.approx([1 - 0.5 * step / 8 for step in range(8)])


@pytest.mark.parametrize(("options", "message"), [
    ({"epochs": 0}, "positive epochs"),
    ({"lr": -1.0}, "positive epochs and lr"),
    ({"batch_size": 0}, "batch size: expected 1 to 20"),
    ({"batch_size": 21}, "batch size: expected 1 to 20"),
    ({"lr_schedule": "warm"}, "one of cosine, one-cycle, got 'warm'"),
    ({"resume": True}, "expected a run directory"),
    ({"anneal": "Linear(0.1)"}, "expected a function of progress"),
    ({"estimator": JitTrace_ELBO()}, "expected Trace_ELBO"),
    ({"device": "cuda:x"}, "expected a name such as cpu, cuda or cuda:1, got 'cuda:x'"),
])  # fmt: skip
def test_bad_arguments(options, message, x):
    with pytest.raises(ValueError, match=message):
        fit(make(), x, **{**QUIET, **options})


def test_half_precision_trains(x):
    vae = make()
    history = fit(vae, x, epochs=2, precision="bf16-mixed", seed=0, **QUIET).history
    assert next(vae.parameters()).dtype == torch.float32
    assert history.elbo.notna().all()


@pytest.mark.gpu
def test_it_trains_and_resumes_on_an_accelerator(accelerator, tmp_path, x):
    vae = make()
    fit(vae, x.to(torch.uint8) * 255, epochs=2, device=accelerator, seed=0, out=tmp_path / "run", **QUIET)
    assert next(vae.parameters()).device.type == accelerator
    fit(vae, x.to(torch.uint8) * 255, epochs=4, device=accelerator, seed=0, out=tmp_path / "run", resume=True, **QUIET)
    summary = evaluation.summarize(vae, x, 50)
    assert summary.elbo.isfinite().all()
    loaded = pyro_vae.load(tmp_path / "run")
    torch.testing.assert_close(evaluation.summarize(loaded, x, 5000).elbo.mean(), summary.elbo.mean(), rtol=0, atol=1.0)


def test_the_progress_bar_tells_where_the_run_is(x, capfd):
    fit(make(), x, epochs=2, batch_size=5, seed=0)
    shown = capfd.readouterr().err
    assert "epoch 2/2" in shown
    assert "8/8" in shown
    assert "steps/s" in shown
    assert "ELBO -" in shown
    assert "beta 1.00" in shown


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5])
def test_a_seed_is_a_whole_number_that_all_take(seed, x):
    vae, before = make(), torch.get_rng_state()
    with pytest.raises(ValueError, match="seed: expected a whole number from 0 to 4294967295"):
        fit(vae, x, epochs=1, seed=seed, **QUIET)
    assert torch.equal(torch.get_rng_state(), before)
    Training(make(), x, epochs=1, batch_size=5, seed=np.int64(3))


def test_optimizers_of_ones_own_may_keep_anything(x):
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.state["steps"] = self.state.get("steps", 0) + 1
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["exp_avg"] = [1e-31]

    training = Training(make(), x, epochs=60, batch_size=5, optimizer=partial(Counting, momentum=0.9), compile=False)
    assert len(list(training)) > 100
