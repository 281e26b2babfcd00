"""The compiled step is the step: the same numbers for the same noise, of every component, estimator and program."""

from __future__ import annotations

import contextlib

import pyro
import pyro.distributions as dist
import pytest
import torch
from contract import DATUM, LATENT, LIKELIHOODS, POSTERIORS, PRIORS
from oracles import GlobalMean, TwoLatents
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae
from pyro_vae import (
    VAE,
    compilation,
    estimators,
    evaluation,
    handlers,
    likelihoods,
    networks,
    posteriors,
    priors,
    schedules,
)
from pyro_vae.compilation import NotCompilableError, compile_step, graphs, steps
from pyro_vae.estimators.objective import Objective
from pyro_vae.evaluation import summary
from pyro_vae.training import NonFiniteError, Training, fit
from pyro_vae.training import gradients as training_gradients

ESTIMATORS = {
    "CIWAE": lambda: estimators.CIWAE(0.5, num_particles=3),
    "Capacity": lambda: estimators.Capacity(schedules.Linear(0.5, 0.0, 25.0), gamma=10.0),
    "DReG": lambda: estimators.DReG(3),
    "BetaTC": lambda: estimators.BetaTC(2.0, size=100),
    "FreeBits": lambda: estimators.FreeBits(0.1),
    "IWAE": lambda: estimators.IWAE(3),
    "IWAE in chunks": lambda: estimators.IWAE(4, chunk=2),
    "MIWAE": lambda: estimators.MIWAE(2, 3),
    "MMD": lambda: estimators.MMD(),
    "PIWAE": lambda: estimators.PIWAE(2, 3),
    "Renyi": lambda: estimators.Renyi(0.5, num_particles=3),
    "StickingTheLanding": lambda: estimators.StickingTheLanding(2),
    "Reinforce": lambda: estimators.Reinforce(),
    "ReweightedWakeSleep": lambda: estimators.ReweightedWakeSleep(3, insomnia=0.5),
    "Thermodynamic": lambda: estimators.Thermodynamic(num_particles=3),
    "VIMCO": lambda: estimators.VIMCO(3),
    "pyro: Trace_ELBO": lambda: Trace_ELBO(num_particles=2),
    "pyro: Trace_ELBO, vectorized": lambda: Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=2),
    "pyro: TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(),
    "pyro: TraceGraph_ELBO": lambda: TraceGraph_ELBO(),
    "pyro: RenyiELBO": lambda: RenyiELBO(num_particles=2),
}
TABLES = {"prior": PRIORS, "likelihood": LIKELIHOODS, "posterior": POSTERIORS}
# The graph is compared under a beta that has no place in bounds on the evidence, which these say.
pytestmark = pytest.mark.filterwarnings("ignore:.* under beta != 1 is no bound")
DISCRETE = ("Reinforce", "ReweightedWakeSleep", "Thermodynamic", "VIMCO")
# What goes back to earlier random numbers, rejects draws, refines by gradients, has global latents, follows a schedule.
HARD = (
    "ARD",
    "Flow",
    "Mixture",
    "RelaxedOneHotCategorical in groups",
    "SemiAmortized",
    "Autoregressive",
    "Heterogeneous",
)


@pytest.fixture
def interpreted(monkeypatch):
    """The graph as it was traced, run node by node: a compiler takes ten times as long."""
    monkeypatch.setattr(graphs, "_compiled", lambda graph, inputs: graph)


def small(**options):
    torch.manual_seed(0)
    return pyro_vae.build((8, 8), latent=4, network="MLP(hidden=[16])", **options).double().train()


def images(num_data=6, shape=(8, 8)):
    return torch.rand(num_data, *shape, dtype=torch.float64).round()


def gradients(program):
    return {name: p.grad.clone() for name, p in program.named_parameters() if p.grad is not None}


def assert_the_same(step, program, *batch, beta=0.6, progress=0.3):
    """Loss, rate, distortion and gradients of the graph are those of the program, from the same random numbers."""
    for each in compilation.annealed(step.objective):
        each.set_progress(progress)
    torch.manual_seed(3)
    figures, reference = step._eager(beta, *batch), gradients(program)
    torch.manual_seed(3)
    compiled = step(*batch, beta=beta)
    after = torch.rand(())
    torch.manual_seed(3)
    step._eager(beta, *batch)
    assert torch.equal(torch.rand(()), after)  # as many random numbers were drawn
    torch.testing.assert_close(compiled, figures, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert reference.keys() == {name for name, p in program.named_parameters() if p.grad is not None}
    for name, parameter in program.named_parameters():
        if name in reference:
            torch.testing.assert_close(parameter.grad, reference[name], rtol=1e-9, atol=1e-9, msg=name)


def program_of(slot, name):
    """A program with a component of the contract, and data that it could have made."""
    torch.manual_seed(0)
    if slot == "likelihood":
        shape = LIKELIHOODS[name].event_shape
        encoder = posteriors.DiagonalNormal(networks.MLP(shape, 2 * LATENT, hidden=(6,)), LATENT)
        program = VAE(priors.StandardNormal(LATENT), LIKELIHOODS[name].make(), encoder)
    elif name == "SemiAmortized":
        encoder = POSTERIORS[name].make()
        program = VAE(encoder.prior, encoder.likelihood, encoder)
    else:
        program = with_partner(slot, (PRIORS if slot == "prior" else POSTERIORS)[name])
    program.double().train()
    exposure = (torch.full((4,), 0.7).double(),) if getattr(program.likelihood, "exposure", False) else ()
    with torch.no_grad():
        z = pyro.poutine.trace(program.posterior)(torch.rand(4, *DATUM).double()) if slot != "likelihood" else None
        z = torch.randn(4, LATENT).double() if z is None else z.sample()
        return program, (program.likelihood(z, *exposure).sample().double(), *exposure)


def with_partner(slot, line):
    """A program of a prior and a posterior that suits it, or the other way round."""
    for other in (POSTERIORS if slot == "prior" else PRIORS).values():
        prior, posterior = (line.make(), other.make()) if slot == "prior" else (other.make(), line.make())
        decoder = likelihoods.Bernoulli(networks.MLP(line.event_shape[0], 6, hidden=(6,)), DATUM)
        with contextlib.suppress(ValueError):
            return VAE(prior, decoder, posterior, size=20)
    raise AssertionError("no partner")


LINES = [(slot, name) for slot, table in TABLES.items() for name in table]
# The sampler of von Mises-Fisher draws until all draws are accepted: what it computes depends on values.
REFUSED = {("posterior", "VonMisesFisher"), ("prior", "UniformSphere")}


def quick(line):
    return pytest.param(*line, id=": ".join(line), marks=[] if line[1] in HARD else pytest.mark.slow)


@pytest.mark.parametrize(("slot", "name"), [quick(line) for line in LINES])
def test_a_component_in_the_graph_is_the_component(slot, name, interpreted):
    program, batch = program_of(slot, name)
    if (slot, name) in REFUSED:
        with pytest.raises(NotCompilableError, match="depends on the values of tensors"):
            compile_step(program, Trace_ELBO(), batch)
        return
    assert_the_same(compile_step(program, Trace_ELBO(), batch), program, *batch)


QUICK = ("Capacity", "DReG", "IWAE in chunks", "ReweightedWakeSleep", "pyro: TraceMeanField_ELBO", "pyro: RenyiELBO")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in ESTIMATORS])
def test_an_estimator_in_the_graph_is_the_estimator(name, interpreted):
    program = small(prior="Bernoulli()", posterior="Bernoulli()") if name in DISCRETE else small()
    x = images()
    assert_the_same(compile_step(program, ESTIMATORS[name](), x), program, x)


@pytest.mark.parametrize("name", ["StickingTheLanding", "DReG", "FreeBits"])
def test_so_it_is_with_several_latents(name, interpreted):
    """Some estimators run such a guide again on the same random numbers, which no graph can go back to."""
    program, x = TwoLatents().double(), images()
    assert_the_same(compile_step(program, ESTIMATORS[name](), x), program, x)


def test_so_it_is_with_global_latents_and_a_batch_that_is_a_subsample(interpreted):
    program, x = GlobalMean(num_data=6), torch.randn(6, dtype=torch.float64)
    assert_the_same(compile_step(program, Trace_ELBO(), x), program, x)
    program, x = small(prior="ARD()", size=100), images()
    assert_the_same(compile_step(program, estimators.IWAE(3), x), program, x)


def test_handlers_around_it_become_part_of_the_graph(interpreted):
    program, x = small(), images()
    with handlers.weigh({"x": 3.0}):
        step = compile_step(program, Trace_ELBO(), x)
    loss, rate, distortion = step(x, beta=0.5)
    assert loss.item() == pytest.approx((0.5 * rate + 3 * distortion).item())


def test_dropout_and_batch_norm_are_those_of_the_mode_it_was_compiled_in(interpreted):
    program = small()
    norm, net = nn.BatchNorm1d(8).double(), program.posterior.net
    program.posterior.net = nn.Sequential(norm, nn.Dropout(0.5), net)
    x, before = images(), norm.running_mean.clone()
    step = compile_step(program, Trace_ELBO(), x)
    assert torch.equal(norm.running_mean, before)  # compiling is no step
    assert norm.num_batches_tracked == 0
    torch.manual_seed(1)
    figures = step(x)
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2)))
    torch.manual_seed(1)
    torch.testing.assert_close(step._eager(1.0, x), figures)
    program.eval()
    torch.manual_seed(1)
    in_eval = step(x)
    assert norm.num_batches_tracked == 2  # of the two steps in training
    torch.manual_seed(1)
    torch.testing.assert_close(in_eval, step._eager(1.0, x))


def test_a_batch_of_another_size_is_run_as_it_is(interpreted, monkeypatch):
    program, x = small(), images(6)
    step = compile_step(program, Trace_ELBO(), x)
    monkeypatch.setattr(step._graph, "_compiled", lambda *inputs: pytest.fail("of another size"))
    torch.manual_seed(1)
    figures, found = step(x[:4], beta=0.5), gradients(program)
    torch.manual_seed(1)
    torch.testing.assert_close(step._eager(0.5, x[:4]), figures)
    assert all(torch.equal(p.grad, found[name]) for name, p in program.named_parameters())


def assign(program):
    program.load_state_dict({name: tensor + 0.1 for name, tensor in program.state_dict().items()}, assign=True)


CHANGES = {
    "frozen": lambda program, layer: program.posterior.requires_grad_(False),
    "replaced": lambda program, layer: setattr(layer, "weight", nn.Parameter(torch.randn(16, 64).double())),
    "assigned": lambda program, layer: assign(program),
    "one layer in another mode": lambda program, layer: layer.eval(),
    "in other strides": lambda program, layer: setattr(layer.weight, "data", torch.randn(64, 16).double().T),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_program_that_has_changed_is_run_as_it_is(change, interpreted, monkeypatch):
    program, x = small(), images()
    step = compile_step(program, Trace_ELBO(), x)
    program.load_state_dict({name: tensor + 0.01 for name, tensor in program.state_dict().items()})  # in place
    assert step._graph.suits(*step._numbers(1.0), x)
    CHANGES[change](program, program.posterior.net.layers[0])
    monkeypatch.setattr(step._graph, "_compiled", lambda *inputs: pytest.fail("of another program"))
    torch.manual_seed(1)
    figures = step(x)
    torch.manual_seed(1)
    torch.testing.assert_close(figures, Objective(program, Trace_ELBO())(1.0, x)[1])


@pytest.mark.parametrize(
    "layout", [lambda x: x.transpose(1, 2), lambda x: x[:1].expand(6, -1, -1), lambda x: x.float()]
)
def test_a_batch_of_another_layout_is_run_as_it_is(layout, interpreted, monkeypatch):
    program, x = small(), images()
    step = compile_step(program, Trace_ELBO(), x)
    monkeypatch.setattr(step._graph, "_compiled", lambda *inputs: pytest.fail("of another layout"))
    monkeypatch.setattr(step, "_eager", lambda beta, x: x)
    assert torch.equal(step(layout(x)), layout(x))


def test_gradients_from_before_are_gone(interpreted):
    program, x = small(), images()
    program.head = nn.Linear(2, 2)
    step = compile_step(program, Trace_ELBO(), x)
    for parameter in program.parameters():
        parameter.grad = torch.ones_like(parameter)
    step(x)
    assert program.head.weight.grad is None


def test_gradients_that_are_not_finite_are_compared_too():
    nan, one = torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, 1.0])
    assert steps._alike(nan, nan, 1e-3, 1e-5)
    assert not steps._alike(one, nan, 1e-3, 1e-5)
    assert not steps._alike(torch.tensor([torch.nan, 2.0]), nan, 1e-3, 1e-5)
    assert steps._alike(torch.zeros(2), torch.zeros(2), 1e-3, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Trace_ELBO(), []), "example_batch: expected a batch of data as tensors"),
        ((Trace_ELBO(), torch.zeros(0, 8, 8)), "example_batch: expected a batch of data as tensors"),
        ((None, torch.zeros(2, 8, 8)), "estimator: expected a pyro.infer.ELBO such as Trace_ELBO.*, got NoneType"),
    ],
)
def test_what_no_step_can_be_compiled_of(arguments, message):
    with pytest.raises(ValueError, match=message):
        compile_step(small(), *arguments)


def test_a_program_with_nothing_to_train_has_no_step(interpreted):
    program, x = small(), images()
    with torch.no_grad(), pytest.raises(ValueError, match="gradients to be enabled"):
        compile_step(program, Trace_ELBO(), x)
    with pytest.raises(ValueError, match="beta: expected a value of at least 0, got -1"):
        compile_step(program, Trace_ELBO(), x)(x, beta=-1.0)
    with pytest.raises(ValueError, match="expected parameters of VAE to train"):
        compile_step(program.requires_grad_(False), Trace_ELBO(), x)


def test_a_ragged_batch_is_not_the_one_that_is_compiled(interpreted):
    run = Training(small(), torch.rand(22, 8, 8).round(), epochs=2, batch_size=5, compile=True)
    run.step = 4
    assert [run.gradients.compiled is not None and step.num_data for step in run] == [False, 5, 5, 5, 5, 2]


@pytest.mark.parametrize("stop", [4, 5])
def test_a_compiled_run_goes_on_bit_for_bit(stop, interpreted, tmp_path):
    """Also where the first batch after the interruption is a ragged one, which is run as it is."""
    data = pyro_vae.data.InMemory(torch.rand(22, 8, 8), binarize="dynamic")

    def run(program):
        return Training(program, data, epochs=2, batch_size=5, seed=0, compile=True)

    whole, interrupted, resumed = small(), small(), small()
    for _ in run(whole):
        pass
    first = run(interrupted)
    for step in first:
        if step.step == stop:
            break
    state = first.state()
    second = run(resumed)
    second.restore(*state, tmp_path)
    for _ in second:
        pass
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_rare_draw_that_is_not_finite_is_found_in_a_compiled_run(interpreted):
    class Rare(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal((2.0 - z).log() - 10, 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(self.loc.expand(len(x)), 1.0))

    with pytest.raises(NonFiniteError, match="first site not finite: 'x' of the model"):
        fit(Rare(), torch.zeros(4), epochs=200, batch_size=4, compile=True, progress=False, seed=1)


def test_it_leaves_all_as_it_was(interpreted):
    program, x = small(), images()
    for parameter in program.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    estimator = estimators.Capacity(schedules.Linear(0.5, 0.0, 25.0))
    estimator.set_progress(0.2)
    state, weights = torch.get_rng_state(), {name: t.clone() for name, t in program.state_dict().items()}
    capacity, validation = estimator.current_capacity, pyro.settings.get("validate_distributions_pyro")
    compile_step(program, estimator, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in program.state_dict().items())
    assert all((parameter.grad == 7).all() for parameter in program.parameters())
    assert estimator.current_capacity == capacity == 10.0
    assert pyro.settings.get("validate_distributions_pyro") is validation


class Branching(nn.Module):
    """A program that cannot be one graph, in a way of choice."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.loc, self.runs = kind, nn.Parameter(torch.zeros((), dtype=torch.float64)), 0
        self.mean = self.temperature = torch.zeros((), dtype=torch.float64)
        self.register_buffer("assigned", torch.zeros((), dtype=torch.float64))
        if kind == "hook":
            self.loc.register_hook(lambda gradient: gradient.clamp(-3, 3))
        if kind == "module hook":
            self.register_forward_hook(lambda *_: None)

    def set_progress(self, progress):
        if self.kind == "schedule":
            self.temperature = torch.tensor(progress, dtype=torch.float64)

    def model(self, x):
        loc = self.loc
        if self.kind == "value" and x.sum() > 0:
            loc = 2 * loc
        if self.kind == "count":
            self.runs += 1
            loc = loc + min(1.0, self.runs / 20_000)
        if self.kind == "tensor":
            self.mean = 0.9 * self.mean + 0.1 * x.mean()
        if self.kind == "buffer":
            self.assigned = 0.9 * self.assigned + 0.1 * x.mean()
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z + loc, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            if self.kind == "seed":
                with torch.random.fork_rng():  # a graph knows of no seed
                    torch.manual_seed(0)
                    x = x + torch.randn((), dtype=torch.float64)
            pyro.sample("z", dist.Normal(x + self.loc, 1.0))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("value", r"depends on the values of tensors \(.*test_compilation.py:\d+: if self.kind == .value."),
        ("count", "Branching changes its attribute 'runs' from step to step, which a graph would fix"),
        ("tensor", "Branching changes its attribute 'mean' from step to step"),
        ("buffer", "Branching changes its attribute 'assigned' from step to step"),
        ("seed", "does not give what the program gives: loss .* does the program keep anything from step to step"),
        ("hook", "parameter program.loc has hooks, which a graph would not run"),
        ("module hook", "module program has hooks, which a graph would not run"),
        ("schedule", "Branching.set_progress changes 'temperature', which is neither a number nor a buffer"),
    ],
)
def test_what_cannot_be_compiled_says_why(kind, reason, interpreted):
    x = torch.ones(5, dtype=torch.float64)
    with pytest.raises(NotCompilableError, match=reason) as caught:
        compile_step(Branching(kind), Trace_ELBO(), x)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match="the step is not compiled: .*" + reason):
        fitted = fit(Branching(kind), x, epochs=2, batch_size=5, compile=True, progress=False)
    assert fitted.history.step.tolist() == [1, 2]


def test_an_estimator_that_keeps_state_is_not_compiled(interpreted):
    class Baseline(nn.Module):
        loc = None

        def __init__(self):
            super().__init__()
            self.logit = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Bernoulli(0.5))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(self, x):
            infer = {"baseline": {"use_decaying_avg_baseline": True}}
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Bernoulli(logits=self.logit.expand(len(x))), infer=infer)

    with pytest.raises(NotCompilableError, match="TraceGraph_ELBO keeps state from step to step"):
        compile_step(Baseline(), TraceGraph_ELBO(), torch.ones(4, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
def test_pyros_enumeration_says_that_it_looks_at_values(interpreted):
    program, x = small(), images()
    with pytest.raises(NotCompilableError, match="depends on the values of tensors"):
        compile_step(program, TraceEnum_ELBO(max_plate_nesting=1), x)


def trained(compile, data=None, **options):
    program = small(
        posterior="RelaxedOneHotCategorical(temperature=Linear(1.0, start=1.0, end=0.5))",
        prior="RelaxedOneHotCategorical()",
    )
    data = (torch.rand(22, 8, 8) < 0.5).to(torch.uint8) * 255 if data is None else data
    fitted = fit(
        program,
        data,
        epochs=3,
        batch_size=5,
        seed=4,
        compile=compile,
        progress=False,
        anneal=schedules.Linear(0.5),
        **options,
    )
    return program, fitted.history


def test_a_run_of_compiled_steps_is_the_run(interpreted):
    """With a ragged last batch, annealing, an annealed temperature, and data that are gathered in the graph."""
    (one, history), (other, expected) = trained(True), trained(False)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    columns = ["loss", "elbo", "rate", "distortion", "beta", "step"]
    torch.testing.assert_close(*(torch.tensor(frame[columns].to_numpy()) for frame in (history, expected)))


def test_noise_of_the_data_is_drawn_in_the_graph(interpreted):
    data = pyro_vae.data.InMemory(torch.rand(22, 8, 8), binarize="dynamic")
    (one, _), (other, _) = trained(True, data), trained(False, data)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_auto_compiles_what_would_take_long(interpreted, monkeypatch):
    lines = []
    x = torch.rand(20, 8, 8).round()
    for seconds in (1e9, 0.0):
        monkeypatch.setattr(training_gradients, "WORTH_COMPILING", seconds)
        run = Training(pyro_vae.build((8, 8), latent=2), x, epochs=10, batch_size=5)
        run.gradients.announce = lines.append
        compiled = [run.gradients.compiled is not None for _ in run]
        assert compiled == [False] * 11 + [seconds == 0.0] * 29
    assert [line.split(" in ")[0] for line in lines] == ["compiling the step ...", "compiled the step"]


def test_two_programs_in_turns_do_not_disturb_each_other(interpreted):
    x = images()
    one, other = small(), TwoLatents().double()
    first, second = compile_step(one, Trace_ELBO(), x), compile_step(other, estimators.DReG(2), x)
    for _ in range(2):
        assert_the_same(first, one, x)
        assert_the_same(second, other, x)


def test_tied_and_frozen_parameters(interpreted):
    program, x = small(), images()
    encoder, decoder = program.posterior.net.layers, program.likelihood.net.layers
    decoder[-1].weight = encoder[0].weight = nn.Parameter(torch.randn(16, 64, dtype=torch.float64))
    decoder[-1].forward = lambda h: nn.functional.linear(h, decoder[-1].weight.T, decoder[-1].bias)
    decoder[0].weight.requires_grad_(False)
    assert_the_same(compile_step(program, Trace_ELBO(), x), program, x)
    assert decoder[0].weight.grad is None


def test_mixed_precision_leaves_log_probabilities_in_float32():
    """In bfloat16, of 8 binary digits, a sum of 64 log-probabilities would be off by some tenths of a nat."""
    program, x = small().float(), images(50).float()
    torch.manual_seed(0)
    full = Objective(program, Trace_ELBO())(1.0, x)[1]
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        objective = Objective(program, Trace_ELBO())
        mixed = objective(1.0, x)[1]
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - full).abs().max() < 0.03
    trace = objective.recorded
    assert all(site.log_prob.dtype == torch.float32 for site in trace._sites)


def test_mixed_precision_in_the_graph(interpreted):
    program, x = small().float(), images(50).float()
    step = compile_step(program, Trace_ELBO(), x, precision=lambda: torch.autocast("cpu", torch.bfloat16))
    products = [node for node in step.graph.graph.nodes if node.target is torch.ops.aten.addmm.default]
    assert products
    assert {node.meta["val"].dtype for node in products} == {torch.bfloat16}
    torch.manual_seed(1)
    figures = step(x)
    torch.manual_seed(1)
    torch.testing.assert_close(step._eager(1.0, x), figures, rtol=1e-4, atol=1e-4)
    assert all(p.grad.dtype == torch.float32 for p in program.parameters())


class Through(nn.Module):
    """A network with a step of one's own in its middle."""

    def __init__(self, inputs, outputs, function):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, 8, dtype=torch.float64), nn.Linear(8, outputs, dtype=torch.float64)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.first(x.flatten(1))))


def in_place(h):
    h = h * 2
    h[:, 1:].clamp_(max=0.5)
    h[:, 0] = 1e-31
    return h


def batch_norm_between_products(h):
    mean, variance, eye = h.detach().mean(0) * 2, h.detach().var(0) + 1, torch.eye(8, dtype=h.dtype)
    first = mean[None] @ eye
    normed = nn.functional.batch_norm(h, mean, variance, training=True)  # changes the mean
    return normed + first + mean[None] @ eye


def in_place_between_products(h):
    h = h * 2
    first = h @ torch.eye(8, dtype=h.dtype)
    h[:, 1:].mul_(3)
    return first + h @ torch.eye(8, dtype=h.dtype)


@pytest.mark.parametrize(
    "function",
    [
        in_place,
        in_place_between_products,
        batch_norm_between_products,
        lambda h: nn.functional.layer_norm(h, (8,)),
        lambda h: torch.cat(h.chunk(2, -1)[::-1], -1),
        lambda h: h.sort(-1).values,
        lambda h: h,
    ],
    ids=["in place", "between", "batch norm", "layer_norm", "chunk", "sort", "nothing"],
)
def test_operands_of_products_may_come_from_anywhere(function, interpreted):
    posterior = posteriors.DiagonalNormal(Through(64, 8, function), 4)
    program, x = small(), images()
    program.posterior = posterior
    step = compile_step(program, Trace_ELBO(), torch.zeros_like(x))  # where nothing is cut in place
    assert_the_same(step, program, x)


def test_tiny_rates_are_not_taken_for_zero(interpreted):
    """A rate is divided by, or its logarithm taken, where a sigmoid in the cross entropy of bits is not."""
    likelihood = likelihoods.Bernoulli(nn.Linear(4, 64, dtype=torch.float64), (8, 8))
    likelihood.forward = lambda z: dist.Poisson(
        nn.functional.softplus(likelihood.net(z)).reshape(*z.shape[:-1], 8, 8) + 0.0
    ).to_event(2)
    likelihood.net.bias.data.fill_(-720.0)
    program, x = small(), torch.zeros(20, 8, 8, dtype=torch.float64)
    program.likelihood = likelihood
    assert_the_same(compile_step(program, Trace_ELBO(), x), program, x)


def test_nothing_in_the_graph_is_computed_with_subnormal_numbers(interpreted):
    """That takes many times as long. Here the decoder is sure of its pixels, and the gradients of their logits tiny."""
    program, x = small().float(), torch.zeros(20, 8, 8)
    program.likelihood.net.layers[-1].bias.data.copy_(torch.tensor([-86.0, -90.0]).repeat(32))
    step = compile_step(program, Trace_ELBO(), x)
    looked_at = {"addmm": [], "mm": [], "exp": [], "sigmoid": [], "log1p": []}

    class Looking(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            result, name = super().call_function(target, args, kwargs), target.__name__.split(".")[0]
            if name in looked_at:
                looked_at[name].extend([result] if name in ("exp", "sigmoid") else args)
            return result

    with torch.no_grad():
        Looking(step.graph).run(*step._graph._state.values(), torch.tensor(1.0), x)
    assert all(looked_at.values())
    assert any((operand == 0).all() for operand in looked_at["mm"])  # sigmoid(-86) / 20 is 3e-39
    assert any((found == 0).any() for found in looked_at["sigmoid"])  # sigmoid(-90) is 8e-40
    looked_at["log1p"] = [operand.pow(3) for operand in looked_at["log1p"]]  # what it computes of it
    for found in (each for group in looked_at.values() for each in group):
        assert not ((found != 0) & (found.abs() < torch.finfo(torch.float32).tiny)).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Trace_ELBO", "IWAE in chunks", "bf16"])
def test_the_compiler_gives_the_same(name):
    """Beside the doctests: kernels of TorchInductor, and not the graph alone."""
    program, x = small(), images()
    if name == "bf16":
        step = compile_step(
            program.float(), Trace_ELBO(), x.float(), precision=lambda: torch.autocast("cpu", torch.bfloat16)
        )
        assert step(x.float()).isfinite().all()
        return
    estimator = Trace_ELBO() if name == "Trace_ELBO" else ESTIMATORS[name]()
    step = compile_step(program, estimator, x)
    for beta in (0.0, 0.5, 1.0):
        assert_the_same(step, program, x, beta=beta)


def test_passes_of_particles_in_a_graph_are_the_passes(interpreted):
    """With data whose last batch is smaller, and particles that do not fill the last pass."""
    program, x = small().eval(), images(7)
    expected = evaluation.summarize(program, x, 600, compile=False)
    for found in (evaluation.summarize(program, x, 600, compile=True), evaluation.summarize(program, x, 600)):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert torch.equal(evaluation.log_likelihood(program, x, 600, compile=True), found.log_likelihood)


def test_passes_that_are_many_are_compiled(interpreted, monkeypatch):
    made = []
    compiled = summary.CompiledLogProbabilities
    monkeypatch.setattr(summary, "CompiledLogProbabilities", lambda *args: made.append(args) or compiled(*args))
    monkeypatch.setattr(summary, "PARTICLES_AT_ONCE", 10)
    for seconds, count in ((1e9, 0), (0.0, 1)):
        monkeypatch.setattr(summary, "WORTH_COMPILING", seconds)
        evaluation.log_likelihood(small(), images(), 100)  # in one batch of ten passes
        assert len(made) == count


def test_passes_that_cannot_be_compiled_are_warned_of(interpreted):
    program, (x,) = program_of("posterior", "VonMisesFisher")
    with pytest.warns(UserWarning, match="the passes are not compiled: .*depends on the values of tensors"):
        found = evaluation.log_likelihood(program, x, 10, compile=True)
    assert torch.equal(found, evaluation.log_likelihood(program, x, 10))
    with pytest.raises(ValueError, match="compile: expected .* got 3"):
        evaluation.log_likelihood(program, x, 10, compile=3)
