"""Expressions build what Python would, evaluate nothing, and say what there is."""

import functools
import sys

import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO

import pyro_vae
from pyro_vae import likelihoods, networks, posteriors, priors, schedules
from pyro_vae.expressions import build, parse, write


def test_builds_what_python_builds():
    net = parse("MLP(784, 40, hidden=[200, 200], activation='tanh')", "net")
    assert isinstance(net, networks.MLP)
    assert (net.in_features, net.out_features, net.hidden, net.activation) == (784, 40, (200, 200), "tanh")
    assert parse("networks.MLP(1, 2)", "net").out_features == 2
    assert parse("pyro_vae.networks.MLP(1, 2)", "net").out_features == 2
    assert isinstance(parse("StandardNormal(3)", "prior"), priors.StandardNormal)
    assert parse("RenyiELBO(alpha=0.5, num_particles=3)", "estimator").alpha == 0.5
    assert parse("Linear(0.1)", "anneal") == schedules.Linear(0.1)
    assert parse("Linear", "anneal") == schedules.Linear()
    assert parse("Linear(start=-1.0)", "anneal").start == -1


def test_fills_in_what_the_builder_knows():
    vae = build((1, 6, 5), latent=3, network="MLP(hidden=[7])")
    assert vae.prior.latent == vae.posterior.latent == 3
    assert (vae.posterior.net.in_features, vae.posterior.net.out_features) == ((1, 6, 5), 6)
    assert (vae.likelihood.net.in_features, vae.likelihood.net.out_features) == (3, 30)
    assert vae.likelihood.event_shape == (1, 6, 5)
    assert vae.likelihood.net.hidden == vae.posterior.net.hidden == (7,)
    own = build((1, 6, 5), latent=3, network="MLP(hidden=[7])", likelihood="Bernoulli(net=MLP(hidden=[9, 8]))")
    assert own.likelihood.net.hidden == (9, 8)
    assert (own.likelihood.net.in_features, own.likelihood.net.out_features) == (3, 30)
    assert own.posterior.net.hidden == (7,)
    with pytest.raises(ValueError, match="positive sizes, got latent=0"):
        build((2,), latent=0)


@pytest.mark.parametrize(("text", "slot", "message"), [
    ("MPL()", "net", "net: unknown name 'MPL'; there is .*MLP"),
    ("MLP(1, 2, hiden=[3])", "net", "'hiden'; it takes in_features, out_features, hidden, activation"),
    ("MLP(1, 2, [3], 'relu', False, False, 0.0, 5)", "net", "too many positional"),
    ("MLP(1)", "net", "expected a value for out_features"),
    ("MLP(1, 2, hidden=3)", "net", "MLP: 'int' object is not iterable"),
    ("MLP(1, 2, hidden=[0])", "net", "expected positive sizes"),
    ("MLP(1, 2, *[3])", "net", "expected literals"),
    ("MLP(1, 2, **{'hidden': 3})", "net", "expected literals"),
    ("MLP(1, 2, [n for n in (1, 2)])", "net", "expected a literal or a call"),
    ("MLP(1, 2, hidden=open('x'))", "net", "unknown name 'open'"),
    ("MLP(", "net", "expected a call such as"),
    (likelihoods.Gaussian, "likelihood", r"expected a text such as 'Gaussian\(\)', got Gaussian itself"),
    (priors.StandardNormal(2), "prior", r"expected a text such as 'StandardNormal\(\)', got StandardNormal itself"),
    ("1 + 1", "net", "expected a call such as"),
    ("lambda: 1", "net", "expected a call such as"),
    ("", "net", "expected a call such as"),
    ("os.system('true')", "net", "unknown name 'os.system'.*; there is .*MLP"),
    ("os.path.join('true')", "prior", "unknown name 'os.path.join'.*; there is .*StandardNormal"),
    ("__import__('os').system('true')", "net", "unknown name"),
    ("Bernoulli()", "estimator", "there is .*RenyiELBO.*Trace_ELBO"),
    ("ELBO()", "estimator", "unknown name 'ELBO'"),
    ("Schedule()", "anneal", "there is Constant, ControlVAE, Cosine, Cyclical, Linear, Sigmoid"),
    ("StandardNormal(3)", "net", "unknown name 'StandardNormal'"),
    ("priors.StandardNormal(3)", "anneal", "unknown name"),
])  # fmt: skip
def test_says_what_there_is(text, slot, message):
    with pytest.raises(ValueError, match=message):
        parse(text, slot)


def test_nothing_is_evaluated(tmp_path):
    target = tmp_path / "made"
    for text in (f"MLP(1, 2, hidden=open({str(target)!r}, 'w'))", f"pathlib.Path({str(target)!r}).touch()"):
        with pytest.raises(ValueError, match="expected|unknown"):
            parse(text, "net")
    assert not target.exists()


def test_names_outside_need_trust(tmp_path, monkeypatch):
    (tmp_path / "outside_module.py").write_text(
        "from pathlib import Path\nfrom pyro_vae.priors import StandardNormal\n"
        f"Path({str(tmp_path / 'imported')!r}).touch()\n"
        "class Wide(StandardNormal):\n"
        "    def __init__(self, latent, width=3):\n"
        "        super().__init__(latent)\n"
        "        self.width = width\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"outside pyro_vae .*trust=True \(--trust\)"):
        parse("outside_module.Wide(2)", "prior", trust=False)
    assert not (tmp_path / "imported").exists()
    assert "outside_module" not in sys.modules
    prior = parse("outside_module.Wide(width=5)", "prior", known={"latent": 2})
    assert (prior.width, prior.latent) == (5, 2)
    assert write(prior, "prior") == "outside_module.Wide(latent=2, width=5)"
    with pytest.raises(ValueError, match="trust=True"):
        parse("pyro_vae_other.Wide(2)", "prior", trust=False)
    assert isinstance(parse("StandardNormal(2)", "prior", trust=False), priors.StandardNormal)
    assert isinstance(parse("pyro.infer.Trace_ELBO()", "estimator", trust=False), Trace_ELBO)


@pytest.mark.parametrize(("value", "slot"), [
    (Trace_ELBO(), "estimator"),
    (TraceMeanField_ELBO(num_particles=4, vectorize_particles=True), "estimator"),
    (RenyiELBO(alpha=0.5, num_particles=3), "estimator"),
    (schedules.Cyclical(3, end=0.5), "anneal"),
    (networks.MLP((1, 2), 3, hidden=()), "net"),
    (posteriors.DiagonalNormal(networks.MLP(4, 6), 3), "posterior"),
    (pyro_vae.build((2, 3), latent=4, network="MLP(hidden=[5], activation='tanh')"), "program"),
])  # fmt: skip
def test_write_is_the_inverse(value, slot):
    text = write(value, slot)
    again = parse(text, slot, trust=False)
    assert type(again) is type(value)
    assert write(again, slot) == text
    if isinstance(value, torch.nn.Module):
        shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (value, again)]
        assert shapes[0] == shapes[1]
        again.load_state_dict(value.state_dict())


def test_an_optimizer_is_a_factory():
    assert parse("Adam()", "optimizer") is torch.optim.Adam
    made = parse("AdamW(weight_decay=0.1)", "optimizer")([torch.zeros(1, requires_grad=True)], lr=0.5)
    assert (made.defaults["weight_decay"], made.defaults["lr"]) == (0.1, 0.5)


def test_write_factories_and_what_cannot_be_written():
    with pytest.raises(ValueError, match="<lambda> is a function"):
        write(lambda progress: 1.0, "anneal")
    assert write(torch.optim.Adam, "optimizer") == "Adam()"
    assert write(functools.partial(torch.optim.AdamW, weight_decay=0.1), "optimizer") == "AdamW(weight_decay=0.1)"
    with pytest.raises(ValueError, match="which no expression can name"):
        write(torch.nn.Sequential(torch.nn.Linear(1, 2)))

    class Forgetful(torch.nn.Module):
        def __init__(self, width):
            super().__init__()

    with pytest.raises(ValueError, match="does not keep its argument 'width'"):
        write(Forgetful(3))


def test_a_pair_of_networks_is_the_encoders_and_the_decoders():
    vae = build(
        (1, 9, 7), latent=3, network="ConvEncoder(channels=[4]), ConvDecoder(channels=[5])", likelihood="Beta()"
    )
    assert (vae.posterior.net.in_shape, vae.posterior.net.out_features) == ((1, 9, 7), 6)
    assert (vae.likelihood.net.in_features, vae.likelihood.net.out_shape) == (3, (2, 9, 7))
    assert vae.likelihood(torch.zeros(2, 4, 3)).sample().shape == (2, 4, 1, 9, 7)
    with pytest.raises(ValueError, match="a pair Encoder"):
        build((2,), network="MLP(), MLP(), MLP()")


def test_networks_are_as_large_as_the_component_says():
    vae = build((5,), latent=6, posterior="FullNormal()", likelihood="DiscretizedLogisticMixture(components=2, bins=4)")
    assert vae.posterior.net.out_features == 6 + 6 + 15
    assert vae.likelihood.net.out_features == 3 * 2 * 5


def test_what_parts_share_is_written_once_and_shared_again():
    vae = build((4,), latent=3, prior="VampPrior(components=7)", network="MLP(hidden=[5])")
    text = write(vae, "program")
    assert text.count("DiagonalNormal") == 1
    again = parse(text, "program", trust=False)
    assert again.prior.posterior is again.posterior
    assert (again.prior.components, again.prior.event_shape) == (7, (4,))
    semi = build((4,), latent=3, posterior="SemiAmortized(base=DiagonalNormal(), steps=2)")
    again = parse(write(semi, "program"), "program")
    assert again.posterior.prior is again.prior
    assert again.posterior.likelihood is again.likelihood
    other = priors.VampPrior(posteriors.DiagonalNormal(networks.MLP(4, 6), 3), (2, (4,)))
    apart = pyro_vae.VAE(other, vae.likelihood, vae.posterior)
    assert write(apart, "program").count("DiagonalNormal") == 2
    with pytest.raises(ValueError, match=r"a tensor of shape \(9, 4\) is no literal"):
        write(priors.VampPrior(vae.posterior, torch.zeros(9, 4)), "prior")


@pytest.mark.parametrize(("text", "slot"), [
    ("Flow(flow=NSF(transforms=2, hidden_features=[8]))", "prior"),
    ("Flow(flow=RealNVP, context=5)", "posterior"),
    ("RelaxedOneHotCategorical(classes=2, temperature=Linear(1.0, start=1.0, end=0.5))", "posterior"),
    ("Autoregressive(channels=2, blocks=1, pixel=DiscretizedLogistic(bins=4))", "likelihood"),
    ("Heterogeneous(parts={'a': Gaussian(scale='global'), ('b', 'c'): Poisson, 'd': Categorical(num_classes=3)})",
     "likelihood"),
])  # fmt: skip
def test_factories_and_schedules_within(text, slot):
    shape = (1, 2, 2) if "Auto" in text else (4,)
    parts = {"prior": "RelaxedOneHotCategorical(classes=2)"} if "Relaxed" in text else {}
    vae = build(shape, latent=4, network="MLP(hidden=[3])", **parts | {slot: text})
    written = write(vae, "program")
    assert write(parse(written, "program", trust=False), "program") == written
    if slot == "posterior":
        vae.posterior(torch.zeros(2, *shape)).rsample()


def test_a_factory_takes_no_network_of_its_own():
    with pytest.raises(ValueError, match="net is given apart"):
        parse("Autoregressive(MLP(1, 1), (1, 2, 2), pixel=Bernoulli(net=MLP()))", "likelihood")


def test_the_first_literal_comes_after_what_is_filled_in():
    assert build((4,), likelihood="Categorical(5)").likelihood.num_classes == 5
    assert build((4,), likelihood="Heterogeneous({'a': Gaussian, 'b': Categorical(3)})").likelihood.columns == (
        "a",
        "b",
    )
    assert build((4,), posterior="LowRankNormal(3)").posterior.rank == 3
    assert build((4,), posterior="DiagonalNormal(MLP(hidden=[3]))").posterior.net.hidden == (3,)
