"""Draws in the schema of ArviZ: names, dimensions, distributions, files, memory, and ArviZ's own functions on them.

Monte Carlo figures are within 4 standard errors at the seeds given (a false alarm in 16000 a figure, if seeds change).
"""

import json
import subprocess
import sys
import tracemalloc
from functools import partial

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
import yaml
from oracles import GlobalMean, LinearGaussian, Mixture, TwoLatents, TwoSites
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae
from pyro_vae import VAE, likelihoods, networks, posteriors, priors
from pyro_vae.export import to_arviz, write_arviz
from pyro_vae.export.chunks import Chunks
from pyro_vae.programs import data_plate

SAMPLE = ("chain", "draw")
GROUPS = {
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "sample_stats",
    "prior",
    "prior_predictive",
    "observed_data",
}


@pytest.fixture(scope="module")
def gaussian():
    """An exact program, its data, and their tree, drawn in chunks of 3 (and a last one of 1)."""
    torch.manual_seed(0)
    program, x = LinearGaussian(), torch.randn(7, 3, dtype=torch.float64)
    return program, x, to_arviz(program, x, num_samples=4000, chunk=3, progress=False)


class Clusters(nn.Module):
    """Global means of three clusters, in a plate of their own, and each datum's cluster: z = means[k] + noise."""

    def model(self, x):
        with pyro.plate("clusters", 3, dim=-1):
            means = pyro.sample("cluster/means", dist.Normal(x.new_zeros(()), 5.0))
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(means.mean(-1, keepdim=True), 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    def guide(self, x):
        with pyro.plate("clusters", 3, dim=-1):
            pyro.sample("cluster/means", dist.Normal(x.new_tensor([0.0, 1.0, 2.0]), 0.1))
        with data_plate(x):
            pyro.sample("z", dist.Normal((x + 1).log(), 0.5))


def table():
    """A program of a table of two reals, a category and two counts, and such a table."""
    parts = {
        ("height", "weight"): likelihoods.Gaussian,
        "sex": partial(likelihoods.Categorical, num_classes=2),
        ("visits", "calls"): likelihoods.Poisson,
    }
    program = VAE(
        prior=priors.StandardNormal(3),
        likelihood=likelihoods.Heterogeneous(networks.MLP(3, 8, hidden=(8,)), parts),
        posterior=posteriors.DiagonalNormal(networks.MLP(5, 6, hidden=(8,)), 3),
    )
    random = np.random.default_rng(0)
    columns = {"height": random.normal(size=8), "weight": random.normal(size=8)}
    columns |= {"sex": pd.Categorical(list("mfmmffmf")), "visits": random.poisson(2, size=8)}
    columns["calls"] = random.poisson(5, size=8)
    return program, pd.DataFrame(columns)


def close(draws, mean, variance, axis):
    """Mean and variance of normal draws, within 4 standard errors."""
    count = draws.shape[axis]
    mean_error = np.abs(draws.mean(axis) - np.asarray(mean)) / np.sqrt(np.asarray(variance) / count)
    variance_error = np.abs(draws.var(axis, ddof=1) / np.asarray(variance) - 1) / np.sqrt(2 / (count - 1))
    return mean_error.max() < 4 and variance_error.max() < 4


def test_groups_and_dimensions_are_those_of_the_schema(gaussian):
    _, x, tree = gaussian
    assert set(tree.children) == GROUPS
    for group in ("posterior", "prior"):
        assert tree[group].z.dims == (*SAMPLE, "datum", "latent")
    for group in ("posterior_predictive", "prior_predictive"):
        assert tree[group].x.dims == (*SAMPLE, "datum", "x_dim_0")
    assert tree.log_likelihood.x.dims == tree.sample_stats.log_weights.dims == (*SAMPLE, "datum")
    assert tree.sample_stats.khat.dims == tree.sample_stats.ess.dims == ("datum",)
    assert dict(tree.posterior.sizes) == {"chain": 1, "draw": 4000, "datum": 7, "latent": 2}
    for group in tree.children.values():
        for dim in group.dims:
            assert group[dim].values.tolist() == list(range(group.sizes[dim]))
    np.testing.assert_array_equal(tree.observed_data.x, x)


def test_draws_are_of_posterior_and_prior(gaussian):
    program, x, tree = gaussian
    mean, std = (value.detach().numpy() for value in program.posterior(x))
    assert close(tree.posterior.z.values[0], mean, std**2, 0)
    assert close(tree.prior.z.values[0], 0.0, 1.0, 0)


def test_predictive_distributions_are_exact(gaussian):
    """x given z ~ N(m, diag(v)) is N(Wm + b, W diag(v) W' + s^2 I), and with the prior's m = 0, v = 1 the evidence."""
    program, x, tree = gaussian
    weight, bias = program.weight.detach().numpy(), program.bias.detach().numpy()
    mean, std = (value.detach().numpy() for value in program.posterior(x))
    variance = std**2 @ (weight**2).T + program.noise**2
    assert close(tree.posterior_predictive.x.values[0], mean @ weight.T + bias, variance, 0)
    assert close(tree.prior_predictive.x.values[0], bias, (weight**2).sum(1) + program.noise**2, 0)
    # Draws of x are at the very z that stand beside them.
    residual = tree.posterior_predictive.x.values[0] - tree.posterior.z.values[0] @ weight.T - bias
    assert close(residual, 0.0, program.noise**2, 0)


def test_the_data_are_never_handed_back(gaussian):
    """Data drawn from densities are other than the data with probability one."""
    tree = gaussian[2]
    for group in ("posterior_predictive", "prior_predictive"):
        assert not (tree[group].x == tree.observed_data.x).any()


def test_log_densities_are_exact(gaussian):
    program, x, tree = gaussian
    z = torch.from_numpy(tree.posterior.z.values[0])
    log_prob = dist.Normal(z @ program.weight.T + program.bias, program.noise).to_event(1).log_prob(x)
    np.testing.assert_allclose(tree.log_likelihood.x.values[0], log_prob.detach(), atol=1e-10)
    evidence = program.evidence(x).detach()  # all weights of an exact posterior are this
    np.testing.assert_allclose(tree.sample_stats.log_weights.values[0], evidence.expand(4000, -1), atol=1e-10)
    np.testing.assert_allclose(tree.sample_stats.ess, 4000)
    assert (tree.sample_stats.khat == -np.inf).all()


def test_log_likelihood_says_what_it_is_given(gaussian):
    assert "given the decoder's weights" in gaussian[2].log_likelihood.x.attrs["description"]


def test_seed_and_chunk_fix_the_draws(gaussian):
    program, x, _ = gaussian
    draw = partial(to_arviz, program, x, num_samples=30, progress=False)
    xr.testing.assert_identical(draw(chunk=3), draw(chunk=3))
    assert not draw(chunk=3).posterior.z.equals(draw(chunk=3, seed=1).posterior.z)
    xr.testing.assert_equal(draw(chunk=3).observed_data.to_dataset(), draw(chunk=7).observed_data.to_dataset())


@pytest.mark.parametrize("chunk", [1, 7])
def test_the_distribution_does_not_depend_on_the_chunk(gaussian, chunk):
    program, x, _ = gaussian
    tree = to_arviz(program, x, num_samples=2000, num_prior_samples=0, chunk=chunk, progress=False)
    mean, std = (value.detach().numpy() for value in program.posterior(x))
    assert close(tree.posterior.z.values[0], mean, std**2, 0)
    assert set(tree.children) == GROUPS - {"prior", "prior_predictive"}


def test_nothing_is_left_changed(gaussian):
    program, x, _ = gaussian
    program.train()
    state = torch.get_rng_state()
    to_arviz(program, x, num_samples=30, progress=False)
    assert program.training
    assert torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())


def test_reweighted_draws_are_of_the_posterior():
    """The guide's scale is 1.5 times too large, so that weights are bounded."""
    program, x = LinearGaussian(scale=1.5), torch.randn(4, 3, dtype=torch.float64)
    mean, std = (value.detach().numpy() for value in program.posterior(x))
    raw = to_arviz(program, x, num_samples=4000, progress=False)
    assert close(raw.posterior.z.values[0], mean, (1.5 * std) ** 2, 0)
    tree = to_arviz(program, x, num_samples=4000, reweight="psis", progress=False)
    # The variance of a mean of resampled draws: that of the weighted mean, and that of resampling.
    z = tree.posterior.z.values[0]
    error = np.sqrt(1 / 4000 + 1 / tree.sample_stats.ess.values.min())
    assert (np.abs(z.mean(0) - mean) / std).max() < 4 * error
    assert np.abs(z.var(0) / std**2 - 1).max() < 4 * np.sqrt(2) * error
    assert (tree.sample_stats.khat < 0.7).all()
    xr.testing.assert_equal(tree.sample_stats.khat, raw.sample_stats.khat)
    # What stands beside the draws belongs to them.
    at_z = torch.from_numpy(z) @ program.weight.T + program.bias
    log_prob = dist.Normal(at_z, program.noise).to_event(1).log_prob(x).detach()
    np.testing.assert_allclose(tree.log_likelihood.x.values[0], log_prob, atol=1e-10)
    assert close(tree.posterior_predictive.x.values[0] - at_z.detach().numpy(), 0.0, program.noise**2, 0)
    at_z = torch.from_numpy(z)
    q, p = dist.Normal(torch.from_numpy(mean), torch.from_numpy(1.5 * std)), dist.Normal(*program.posterior(x))
    expected = program.evidence(x) + (p.log_prob(at_z) - q.log_prob(at_z)).sum(-1)
    np.testing.assert_allclose(tree.sample_stats.log_weights.values[0], expected.detach(), atol=1e-10)


def test_discrete_latents_are_integers_and_can_be_reweighted():
    program, x = Mixture(), torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    tree = to_arviz(program, x, num_samples=6000, reweight="psis", progress=False)
    assert tree.posterior.z.dtype == np.int64
    assert tree.posterior.z.dims == (*SAMPLE, "datum")
    exact = program.prior.softmax(0) * dist.Bernoulli(logits=program.logits).to_event(1).log_prob(x[:, None]).exp()
    exact = (exact / exact.sum(1, keepdim=True)).detach().numpy()
    share = np.stack([(tree.posterior.z.values[0] == k).mean(0) for k in range(3)], 1)
    error = np.sqrt(exact * (1 - exact) * (1 / 6000 + 1 / tree.sample_stats.ess.values[:, None]))
    assert (np.abs(share - exact) < 4 * error).all()


def test_global_latents_have_no_datum_and_are_shared_by_all_chunks():
    """Given m, z ~ N((m + x) / 2, 1/2) for each datum; with an m of each chunk's own it would vary more."""
    x = torch.randn(6, dtype=torch.float64)
    tree = to_arviz(GlobalMean(6), x, num_samples=4000, chunk=2, progress=False)
    m, z = tree.posterior.m, tree.posterior.z
    assert m.dims == tree.prior.m.dims == SAMPLE
    assert z.dims == (*SAMPLE, "datum")
    assert close((z - (m + tree.observed_data.x) / 2).values[0], 0.0, 0.5, 0)
    # In the prior, m is the model's, m ~ N(0, 1), z ~ N(m, 1), x ~ N(z, 1), for all chunks too.
    m, z, x = tree.prior.m, tree.prior.z, tree.prior_predictive.x
    for draws in (m, z - m, x - z):
        assert close(draws.values[0], 0.0, 1.0, 0)


def test_global_latents_cannot_be_reweighted():
    with pytest.raises(ValueError, match="reweight: expected latents of single data alone, got m, of which all data"):
        to_arviz(GlobalMean(3), torch.zeros(3, dtype=torch.float64), reweight="psis", progress=False)


def test_latents_in_a_plate_of_their_own_and_values_that_follow():
    tree = to_arviz(Clusters(), torch.tensor([0.0, 3.0, 1.0]), num_samples=300, chunk=2, progress=False)
    means = tree.posterior["cluster.means"]  # "/" would be a group
    assert means.dims == (*SAMPLE, "cluster.means_dim_0")
    assert np.abs(means.mean(SAMPLE) - [0, 1, 2]).max() < 4 * 0.1 / np.sqrt(300)
    assert tree.prior["cluster.means"].std() > 4
    assert list(tree.log_likelihood.data_vars) == ["x"]  # "twice" is no data
    assert tree.observed_data.x.dtype == tree.posterior_predictive.x.dtype == np.int64


@pytest.mark.parametrize(("program", "sites"), [(TwoSites(), 1), (TwoLatents(2).double(), 2)])
def test_programs_of_two_sites(program, sites):
    tree = to_arviz(program, torch.ones(5, 2, dtype=torch.float64), num_samples=30, progress=False)
    assert tree.posterior.z2.dims == tree.prior.z2.dims == (*SAMPLE, "datum", "z2_dim_0")
    assert tree.posterior.z2.sizes["z2_dim_0"] == sites
    assert set(tree.posterior.data_vars) == set(tree.prior.data_vars) == {"z1", "z2"}


def test_images_labels_and_dtypes(digits):
    vae, test = pyro_vae.build((1, 8, 8), latent=2), digits[2].select(slice(5))
    tree = to_arviz(vae, test, num_samples=30, num_prior_samples=10, progress=False)
    assert tree.posterior_predictive.x.dims == (*SAMPLE, "datum", "channel", "height", "width")
    assert tree.posterior.z.dtype == np.float32
    assert tree.log_likelihood.x.dtype == np.float64
    assert tree.prior_predictive.sizes["draw"] == 10
    # ArviZ draws ranks of ties at random where data are integers, and only there.
    assert tree.posterior_predictive.x.dtype == tree.observed_data.x.dtype == np.int8
    np.testing.assert_array_equal(tree.constant_data.label, test.y)
    named = to_arviz(vae, test, num_samples=30, labels=list("abcde"), chunk=2, progress=False)
    assert named.constant_data.label.values.tolist() == list("abcde")


def test_images_of_a_density_keep_their_dtype():
    vae = pyro_vae.build((1, 4, 4), latent=2, likelihood="ContinuousBernoulli")
    tree = to_arviz(vae, torch.rand(3, 1, 4, 4), num_samples=30, progress=False)
    assert tree.posterior_predictive.x.dtype == tree.observed_data.x.dtype == np.float32


@pytest.mark.filterwarnings("ignore:.*grey values under a Bernoulli")
def test_grey_targets_of_a_bernoulli_are_not_rounded():
    x = torch.rand(3, 1, 4, 4)
    tree = to_arviz(pyro_vae.build((1, 4, 4), latent=2), x, num_samples=30, progress=False)
    np.testing.assert_array_equal(tree.observed_data.x, x)


def test_tables_have_a_variable_for_each_part():
    program, frame = table()
    tree = to_arviz(program, frame, num_samples=30, chunk=3, progress=False)
    names = ["x.height_weight", "x.sex", "x.visits_calls"]
    for group in ("posterior_predictive", "prior_predictive", "observed_data", "log_likelihood"):
        assert list(tree[group].data_vars) == names
    for name, columns in ((names[0], ["height", "weight"]), (names[2], ["visits", "calls"])):
        assert tree.observed_data[name][f"{name}_dim_0"].values.tolist() == columns
        np.testing.assert_allclose(tree.observed_data[name], frame[columns], rtol=1e-6)
    np.testing.assert_array_equal(tree.observed_data["x.sex"], frame.sex.cat.codes)
    assert tree.posterior_predictive["x.sex"].dims == (*SAMPLE, "datum")
    assert tree.posterior_predictive["x.visits_calls"].dtype == tree.observed_data["x.sex"].dtype == np.int64
    assert set(np.unique(tree.posterior_predictive["x.sex"])) <= {0, 1}


def test_columns_of_a_table_of_one_kind_are_named(gaussian):
    program, x, _ = gaussian
    frame = pd.DataFrame(x.numpy(), columns=["a", "b", "c"])
    tree = to_arviz(program, frame, num_samples=30, progress=False)
    assert tree.posterior_predictive.x.column.values.tolist() == ["a", "b", "c"]


def test_coordinates_of_ones_own(gaussian):
    program, x, _ = gaussian
    coords = {"latent": ["shape", "size"], "datum": [f"n{i}" for i in range(7)]}
    tree = to_arviz(program, x, num_samples=30, chunk=3, coords=coords, progress=False)
    for group in ("posterior", "prior"):
        assert tree[group].latent.values.tolist() == coords["latent"]
    for group in tree.children.values():
        assert group.datum.values.tolist() == coords["datum"]


def test_what_the_program_takes_beside_x():
    vae = VAE(
        prior=priors.StandardNormal(2),
        likelihood=likelihoods.Poisson(networks.MLP(2, 3), (3,), exposure=True),
        posterior=posteriors.DiagonalNormal(networks.MLP(3, 4), 2),
    )
    x, exposure = torch.ones(5, 3), torch.arange(1.0, 6.0)
    tree = to_arviz(vae, (x, exposure), num_samples=30, chunk=2, progress=False)
    np.testing.assert_array_equal(tree.constant_data.exposure, exposure)
    assert "label" not in tree.constant_data


def test_a_loader_keeps_its_order_and_may_leave_data_out(gaussian):
    program, x, _ = gaussian
    loader = DataLoader(TensorDataset(x), batch_size=5, drop_last=True)
    tree = to_arviz(program, loader, num_samples=30, chunk=2, progress=False)
    np.testing.assert_array_equal(tree.observed_data.x, x[:5])
    assert tree.posterior.sizes["datum"] == 5


def test_attributes_say_what_was_done(gaussian):
    program, x, _ = gaussian
    config = {"program": "VAE(...)", "fit": {"epochs": 3}}
    attributes = to_arviz(program, x, num_samples=30, seed=3, config=config, progress=False).attrs
    assert yaml.safe_load(attributes["config"]) == config
    assert attributes["program"] == "oracles.LinearGaussian"
    assert attributes["torch_version"].split("+")[0] == torch.__version__.split("+")[0]
    assert (attributes["seed"], attributes["num_samples"], attributes["reweight"]) == (3, 30, "none")


def test_few_draws_have_no_shape(gaussian):
    program, x, _ = gaussian
    tree = to_arviz(program, x, num_samples=10, progress=False)
    assert tree.sample_stats.khat.isnull().all()
    np.testing.assert_allclose(tree.sample_stats.ess, 10)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_samples": 0}, "num_samples: expected a whole number, at least 1, got 0"),
        ({"num_prior_samples": -1}, "num_prior_samples: expected a whole number, at least 0, got -1"),
        ({"num_samples": 30.5}, "num_samples: expected a whole number, at least 1, got 30.5"),
        ({"num_samples": "30"}, "num_samples: expected a whole number, at least 1, got '30'"),
        ({"chunk": 1.5}, "chunk: expected a whole number, at least 1, got 1.5"),
        ({"config": [1, 2]}, "config: expected text, or a mapping of text, numbers"),
        ({"config": {"a": object()}}, "config: expected text, or a mapping of text, numbers"),
        ({"coords": {"draw": range(30)}, "num_prior_samples": 5}, "coords: expected none for 'draw' .*got 30 and.* 5"),
        ({"chunk": 0}, "chunk: expected a whole number, at least 1, got 0"),
        ({"reweight": "is"}, "reweight: expected None or 'psis', got 'is'"),
        ({"labels": [1, 2]}, "labels: expected 7, one a datum, got an array of shape"),
        ({"coords": {"latnt": [1, 2]}}, "coords: expected some of the dimensions .*'latent'.*, got .'latnt'"),
        ({"coords": {"latent": [1]}}, "coords: expected 2 values for 'latent', got an array of shape"),
        ({"coords": {"datum": [1]}}, "coords: expected 7 values for 'datum'"),
    ],
)
def test_errors_say_what_was_expected(gaussian, options, said):
    program, x, _ = gaussian
    with pytest.raises(ValueError, match=said):
        to_arviz(program, x, **{"num_samples": 30, "progress": False, **options})


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_files_hold_what_memory_does(gaussian, tmp_path, suffix):
    program, x, _ = gaussian
    options = {"num_samples": 30, "chunk": 3, "labels": list("abcdefg"), "progress": False}
    options |= {"coords": {"datum": [f"n{i}" for i in range(7)], "latent": ["a", "bb"]}, "config": {"a": 1}}
    path = tmp_path / "new" / f"posterior{suffix}"
    for _ in range(2):  # the second replaces the first
        assert write_arviz(program, x, path, **options) == path
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with xr.open_datatree(path) as tree:
        xr.testing.assert_identical(tree.load(), to_arviz(program, x, **options))


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_global_latents_in_files(tmp_path, suffix):
    program, x = GlobalMean(5), torch.randn(5, dtype=torch.float64)
    options = {"num_samples": 30, "num_prior_samples": 0, "chunk": 3, "progress": False}
    with xr.open_datatree(write_arviz(program, x, tmp_path / f"a{suffix}", **options)) as tree:
        xr.testing.assert_identical(tree.load(), to_arviz(program, x, **options))


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_what_fails_leaves_what_was_there(gaussian, tmp_path, suffix, monkeypatch):
    program, x, _ = gaussian
    path = write_arviz(program, x, tmp_path / f"a{suffix}", num_samples=30, progress=False)
    with xr.open_datatree(path) as tree:
        before = tree.load()
    groups = Chunks._groups

    def failing(self, batch, rows):
        if rows.start > 0:
            raise RuntimeError("disk full")
        return groups(self, batch, rows)

    monkeypatch.setattr(Chunks, "_groups", failing)
    with pytest.raises(RuntimeError, match="disk full"):
        write_arviz(program, x, path, num_samples=40, chunk=3, progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with xr.open_datatree(path) as tree:
        xr.testing.assert_identical(tree.load(), before)


def test_folders_of_others_are_not_replaced(gaussian, tmp_path):
    program, x, _ = gaussian
    folder = tmp_path / "a.zarr"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"path: expected a place for a file, or a Zarr store .*, got the folder"):
        write_arviz(program, x, folder, num_samples=30, progress=False)
    with pytest.raises(ValueError, match=r"path: expected one that ends in \.nc or \.zarr, got"):
        write_arviz(program, x, tmp_path / "a.pkl", num_samples=30, progress=False)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_legacy_inference_data_opens_it(gaussian, tmp_path):
    arviz = pytest.importorskip("arviz", reason="the legacy InferenceData")
    if not hasattr(arviz, "InferenceData"):
        pytest.skip("ArviZ 1 has no InferenceData")
    program, x, _ = gaussian
    options = {"num_samples": 50, "chunk": 3, "progress": False}
    tree = to_arviz(program, x, **options)
    opened = arviz.from_netcdf(write_arviz(program, x, tmp_path / "a.nc", **options))
    for legacy in (opened, arviz.InferenceData.from_datatree(tree)):
        assert set(legacy.groups()) == GROUPS
        xr.testing.assert_equal(legacy.posterior.load(), tree.posterior.to_dataset())
        assert len(arviz.summary(legacy, var_names=["z"])) == 14
    opened.posterior.close()


def test_arrays_are_not_held_twice(gaussian):
    """Arrays of the tree are counted (those of torch are not): concatenated at the end they would be held twice."""
    program, x, _ = gaussian
    x = x[:1].expand(2000, -1)
    tracemalloc.start()
    try:
        tree = to_arviz(program, x, num_samples=200, chunk=100, progress=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert tree.nbytes > 20e6
    assert peak < 1.3 * tree.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_memory_of_writing_follows_the_chunk(tmp_path, suffix):
    """5 times the data, 300 MB of draws in place of 60, in chunks of 12 MB: less than 60 MB more (a sixth of them)."""

    def peak(num_data):
        script = f"""
import resource, torch, pyro_vae
from pyro_vae.export import write_arviz
vae = pyro_vae.build((1, 28, 28), latent=5, network="MLP(hidden=[32])", likelihood="Gaussian")
write_arviz(vae, torch.rand({num_data}, 1, 28, 28), "a{suffix}", num_samples=200, chunk=10, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
        environment = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return json.loads(done.stdout) / 2**10

    assert peak(250) - peak(50) < 60


@pytest.fixture(scope="module")
def scalars():
    """Trees of one real number a datum, of a guide that is exact and of one that is too wide."""
    torch.manual_seed(0)
    x = torch.randn(30, 1, dtype=torch.float64)
    found = {
        name: to_arviz(LinearGaussian(latent=1, features=1, scale=scale), x[:, :1], num_samples=100, progress=False)
        for name, scale in {"exact": 1.0, "wide": 1.5}.items()
    }
    return {name: tree.isel(x_dim_0=0, drop=True) for name, tree in found.items()}


def _uniform(stats, tree):
    return xr.DataTree.from_dict({"loo_pit": stats.loo_pit(tree).rename(datum="draw").expand_dims("chain")})


CALLS = {
    "summary": lambda stats, plots, tree, both: stats.summary(tree),
    "loo": lambda stats, plots, tree, both: stats.loo(tree),
    "compare": lambda stats, plots, tree, both: plots.plot_compare(stats.compare(both)),
    "khat": lambda stats, plots, tree, both: plots.plot_khat(stats.loo(tree, pointwise=True)),
    "posterior predictive": lambda stats, plots, tree, both: plots.plot_ppc_dist(tree, num_samples=5),
    "prior predictive": lambda s, plots, tree, b: plots.plot_ppc_dist(tree, num_samples=5, group="prior_predictive"),
    "statistic": lambda stats, plots, tree, both: plots.plot_ppc_tstat(tree),
    "PIT": lambda stats, plots, tree, both: plots.plot_ppc_pit(tree),
    "LOO-PIT": lambda stats, plots, tree, both: plots.plot_loo_pit(tree),
    "ECDF": lambda stats, plots, tree, both: plots.plot_ecdf_pit(_uniform(stats, tree), group="loo_pit"),
    "rank": lambda stats, plots, tree, both: plots.plot_rank(tree, coords={"datum": [0]}),
    "forest": lambda stats, plots, tree, both: plots.plot_forest(tree, coords={"datum": [0, 1]}),
    "forest of two": lambda stats, plots, tree, both: plots.plot_forest(both, coords={"datum": [0]}),
    "prior and posterior": lambda stats, plots, tree, both: plots.plot_prior_posterior(tree, coords={"datum": [0]}),
}


@pytest.mark.filterwarnings("ignore:Estimated shape parameter", "ignore:The inplace keyword")
@pytest.mark.parametrize("call", CALLS)
def test_functions_of_arviz_run_on_the_tree(scalars, call):
    import arviz_plots
    import arviz_stats
    from matplotlib import pyplot

    assert CALLS[call](arviz_stats, arviz_plots, scalars["exact"], scalars) is not None
    pyplot.close("all")


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_numbers_of_arviz_are_those_of_the_tree(scalars):
    """`p` of `loo` is log mean p(x given z) minus `elpd`."""
    import arviz_stats

    tree = scalars["exact"]
    found = arviz_stats.loo(tree, pointwise=True)
    log_likelihood = torch.from_numpy(tree.log_likelihood.x.values[0])
    log_mean = log_likelihood.logsumexp(0) - np.log(100)
    np.testing.assert_allclose(found.p, (log_mean - torch.from_numpy(found.elpd_i.values)).sum())
    mean = arviz_stats.summary(tree, var_names=["z"], round_to="none")["mean"].to_numpy(dtype=float)
    np.testing.assert_allclose(mean, tree.posterior.z.mean(SAMPLE).values.ravel(), rtol=1e-6)


def test_loo_of_latents_of_single_data_estimates_the_evidence():
    """Its ratios 1 / p(x given z) have a variance here: w^2 / s^2 = 9/16 < 1, so that their mean has an error."""
    import arviz_stats

    program, x = LinearGaussian(noise=2.0), torch.randn(5, 3, dtype=torch.float64)
    tree = to_arviz(program, x, num_samples=8000, num_prior_samples=0, progress=False)
    ratios = (-torch.from_numpy(tree.log_likelihood.x.values[0])).exp()
    error = ratios.std(0) / ratios.mean(0) / 8000**0.5
    found = torch.from_numpy(arviz_stats.loo(tree, pointwise=True).elpd_i.values)
    assert ((found - program.evidence(x)).abs() < 4 * error).all()
    assert error.max() < 0.05


class Named(nn.Module):
    """Local latents by any names, under x ~ N(their sum, 1)."""

    def __init__(self, *names):
        super().__init__()
        self.names = names

    def model(self, x):
        with data_plate(x):
            sites = [pyro.sample(name, dist.Normal(x.new_zeros(2), 1.0).to_event(1)) for name in self.names]
            pyro.sample("x", dist.Normal(sum(sites), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with data_plate(x):
            for name in self.names:
                pyro.sample(name, dist.Normal(x / 2, 0.7).to_event(1))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("z", "latent"), "other names than dimensions, got latent"),
        (("draw",), "other names than dimensions, got draw"),
        (("datum",), "other names than dimensions, got datum"),
        (("chain",), "other names than dimensions, got chain"),
        (("u_dim_0", "u"), "other names than dimensions, got u_dim_0"),
        (("a/b", "a.b"), "names differ by more than '/' and '.', got 'a/b' and 'a.b'"),
    ],
)
def test_no_site_is_lost_to_a_name(names, said):
    with pytest.raises(ValueError, match=said):
        to_arviz(Named(*names), torch.randn(5, 2), num_samples=30, progress=False)


@pytest.mark.parametrize("given", [{"labels": range(7)}, {"coords": {"datum": range(7)}}])
def test_labels_stand_beside_their_own_data(gaussian, given):
    program, x, _ = gaussian

    def draw(**options):
        return to_arviz(program, DataLoader(TensorDataset(x), **options), num_samples=30, progress=False, **given)

    draw(batch_size=5)
    with pytest.raises(ValueError, match="expected a DataLoader that keeps the order of its data"):
        draw(batch_size=5, shuffle=True)
    with pytest.raises(ValueError, match="expected a DataLoader that keeps the order of its data"):
        draw(batch_sampler=[[6, 5, 4, 3], [0, 1, 2]])
    with pytest.raises(ValueError, match="expected a DataLoader that gives all 7 data, got 5"):
        draw(batch_size=5, drop_last=True)


def test_a_loader_that_repeats_data(gaussian):
    program, x, _ = gaussian
    loader = DataLoader(TensorDataset(x), batch_size=5, sampler=[0, 1, 2, 3, 4, 5, 6, 0])
    with pytest.raises(ValueError, match="expected each of 7 data at most once, got more"):
        to_arviz(program, loader, num_samples=30, progress=False)


class Beside(nn.Module):
    """A program that observes labels too, and weighs its latents by a factor."""

    def model(self, x, label):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.factor("f", -(z**2).sum(-1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
            pyro.sample("y", dist.Bernoulli(logits=z[..., 0]), obs=label)

    def guide(self, x, label):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 3, 0.5).to_event(1))


def test_what_is_observed_beside_x():
    x, label = torch.randn(6, 2), torch.tensor([0.0, 1, 1, 0, 1, 0])
    tree = to_arviz(Beside(), (x, label), num_samples=30, chunk=4, progress=False)
    variables = {name: set(group.data_vars) for name, group in tree.children.items()}
    assert variables["posterior"] == variables["prior"] == {"z"}
    assert variables["log_likelihood"] == variables["observed_data"] == {"x", "y"}
    assert variables["posterior_predictive"] == variables["prior_predictive"] == {"x"}
    np.testing.assert_array_equal(tree.observed_data.y, label)
    # The factor is part of the weights nonetheless.
    z = torch.from_numpy(tree.posterior.z.values[0]).double()
    rest = dist.Normal(0.0, 1.0).log_prob(z) - z**2 - dist.Normal(x.double() / 3, 0.5).log_prob(z)
    expected = tree.log_likelihood.x.values[0] + tree.log_likelihood.y.values[0] + rest.sum(-1).numpy()
    np.testing.assert_allclose(tree.sample_stats.log_weights.values[0], expected, atol=1e-4)


def test_labels_of_ones_own_do_not_give_way_to_a_companion():
    with pytest.raises(ValueError, match="labels: expected none, as the program takes some by that name"):
        to_arviz(Beside(), (torch.randn(6, 2), torch.ones(6)), labels=range(6), num_samples=30, progress=False)


class Impossible(nn.Module):
    """Counts above 0 have no probability where z is below 0, and the guide is, for those above 3."""

    def model(self, x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Poisson(z.clamp(min=0)), obs=x)

    def guide(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(-100.0 * (x > 3), 1.0))


def test_data_whose_weights_are_nothing_are_named():
    x = torch.tensor([0.0, 1.0, 1.0, 5.0])
    to_arviz(Impossible(), x[:3], num_samples=30, chunk=2, reweight="psis", progress=False)
    with pytest.raises(ValueError, match="reweight: expected weights .* got others for 1 data: 3; leave reweight=None"):
        to_arviz(Impossible(), x, num_samples=30, chunk=2, reweight="psis", progress=False)


class OnePlate(Clusters):
    """The same, with a plate of one cluster."""

    def model(self, x):
        with pyro.plate("clusters", 1, dim=-1):
            mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 5.0))
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    def guide(self, x):
        with pyro.plate("clusters", 1, dim=-1):
            pyro.sample("mean", dist.Normal(x.new_zeros(()), 0.1))
        with data_plate(x):
            pyro.sample("z", dist.Normal((x + 1).log(), 0.5))


def test_a_plate_of_one_keeps_its_dimension():
    tree = to_arviz(OnePlate(), torch.tensor([0.0, 3.0]), num_samples=30, progress=False)
    assert tree.posterior["mean"].dims == tree.prior["mean"].dims == (*SAMPLE, "mean_dim_0")


@pytest.mark.parametrize("given", ["labels", "datum"])
def test_times_are_not_for_netcdf(gaussian, tmp_path, given):
    program, x, _ = gaussian
    days = pd.date_range("2020-01-01", periods=7).values
    options = {"labels": days} if given == "labels" else {"coords": {"datum": days}}
    options |= {"num_samples": 30, "chunk": 3, "progress": False}
    with pytest.raises(ValueError, match=f"{given}.*: expected numbers or text in NetCDF, got datetime64"):
        write_arviz(program, x, tmp_path / "a.nc", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["a.zarr", "a.zarr/b.nc"])
def test_files_are_not_taken_for_folders(gaussian, tmp_path, path):
    program, x, _ = gaussian
    (tmp_path / "a.zarr").write_text("mine")
    with pytest.raises(ValueError, match=r"path: expected a place for a folder or file, got the file .*a\.zarr"):
        write_arviz(program, x, tmp_path / path, num_samples=30, progress=False)
    assert (tmp_path / "a.zarr").read_text() == "mine"
