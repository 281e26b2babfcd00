"""The command, as a person would use it: in a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import yaml

import pyro_vae
from pyro_vae import cli, diagnostics

FIT = [
    "fit",
    "--data",
    "digits",
    "--epochs",
    "2",
    "--network",
    "MLP(hidden=[16])",
    "--latent",
    "2",
    "--num-particles",
    "20",
]


def run(*arguments, cwd, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, "-m", "pyro_vae", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, **options)


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """The command in this process, which is faster: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        path = list(sys.path)
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        sys.path[:] = path
        out, err = capfd.readouterr()
        return caught.value.code or 0, out, err

    return call


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    done = run(*FIT, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_fit_writes_a_run_and_prints_a_table(fitted):
    folder, done = fitted
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "runs/digits/config.yaml",
        "runs/digits/model.safetensors",
        "runs/digits/history.csv",
        "runs/digits/metrics.json",
        "runs/digits/checkpoint/last.safetensors",
        *(f"runs/digits/figures/{name}.png" for name in ("training", "samples", "reconstructions", "latent_space")),
    }
    assert "bits/dim" not in done.stdout
    for word in ("NLL", "ELBO", "rate", "distortion", "active units", "nats per datum", "binarized dynamically"):
        assert word in done.stdout
    metrics = json.loads((folder / "runs/digits/metrics.json").read_text())
    assert set(metrics) == {
        "test_nll", "test_nll_se", "test_elbo", "rate", "distortion", "active_units", "num_particles",
    }  # fmt: skip
    assert metrics["test_elbo"] == pytest.approx(-metrics["rate"] - metrics["distortion"])
    assert metrics["test_nll"] < -metrics["test_elbo"]
    assert len(pd.read_csv(folder / "runs/digits/history.csv")) == 2


def test_evaluate_and_sample_work_later(fitted, call, tmp_path):
    folder, _ = fitted
    path = folder / "runs/digits"
    before = json.loads((path / "metrics.json").read_text())
    done = run("evaluate", path, "--num-particles", "20", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((path / "metrics.json").read_text()) == before
    assert call("evaluate", path, "--num-particles", 200)[0] == 0
    assert json.loads((path / "metrics.json").read_text())["test_nll"] < before["test_nll"]
    for name in ("samples.png", "samples.npy"):
        assert call("sample", path, "--n", 9, "--out", name)[0] == 0
    draws = np.load(tmp_path / "samples.npy")
    assert draws.shape == (9, 1, 8, 8)
    assert set(np.unique(draws)) == {0, 1}
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_a_configuration_repeats_the_run(fitted, call, tmp_path):
    folder, _ = fitted
    code, _, err = call(
        "fit", "--config", folder / "runs/digits/config.yaml", "--out", "again", "--num-particles", "20"
    )
    assert code == 0, err
    first, second = pyro_vae.load(folder / "runs/digits"), pyro_vae.load(tmp_path / "again")
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert a.equal(b)
    config = [
        yaml.safe_load((path / "config.yaml").read_text()) for path in (folder / "runs/digits", tmp_path / "again")
    ]
    assert config[0] == config[1]
    code, _, err = call("fit", "--config", folder / "runs/digits/config.yaml", "--out", "wider", "--latent", "3")
    assert (code, err.count("\n")) == (2, 1)
    assert "expected --program (which a configuration names) or its parts, got --latent too" in err


def test_options_of_an_optimizer_are_repeated(call, tmp_path):
    assert call(*FIT, "--optimizer", "AdamW(weight_decay=0.5)", "--anneal", "Linear(0.5)", "--out", "first")[0] == 0
    code, _, err = call("fit", "--config", "first/config.yaml", "--out", "second", "--num-particles", "20")
    assert (code, err.count("warning")) == (0, 0), err
    config = [yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("first", "second")]
    assert config[0] == config[1]
    assert config[0]["optimizer"] == "AdamW(weight_decay=0.5)"


@pytest.mark.filterwarnings("ignore:x. grey values")
def test_no_binarization_is_kept(call, tmp_path):
    assert call(*FIT, "--binarize", "none", "--out", "first")[0] == 0
    code, out, _ = call("fit", "--config", "first/config.yaml", "--out", "second", "--num-particles", "20")
    assert code == 0
    assert "binarized" not in out
    assert yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())["binarize"] == "none"


def test_a_run_without_names_is_not_taken_for_another(call, tmp_path):
    vae = pyro_vae.build((1, 8, 8), latent=2)
    with pytest.warns(UserWarning, match="cannot name the anneal"):
        pyro_vae.fit(
            vae, np.ones((40, 1, 8, 8)), batch_size=10, anneal=lambda t: 1.0, epochs=1, out="py", progress=False
        )
    code, _, err = call("fit", "--resume", "--out", "py", "--epochs", "2")
    assert (code, err.count("\n")) == (2, 1)
    assert "does not name the run's data" in err
    code, _, err = call("fit", "--resume", "--out", "py", "--epochs", "2", "--data", "digits")
    assert code == 2
    assert "anneal" in err


@pytest.mark.parametrize("line", ["trust: true", "overwrite: true", "out: victim", "help: true", "1: 2"])
def test_a_configuration_cannot_give_itself_rights(call, tmp_path, line):
    (tmp_path / "evil.yaml").write_text(f"data: digits\n{line}\n")
    code, _, err = call("fit", "--config", "evil.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert "unknown keys" in err


def test_an_error_of_ones_own_component_is_one_line(call, tmp_path):
    (tmp_path / "takes_z.py").write_text(
        "from torch import nn\nclass TakesZ(nn.Module):\n    def forward(self, z):\n        return z\n"
    )
    code, _, err = call(*FIT, "--prior", "takes_z.TakesZ()", "--out", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "TypeError (--debug shows where)" in err
    assert not (tmp_path / "run").exists()


def test_resume_goes_on_with_the_runs_own_configuration(call, tmp_path):
    assert call(*FIT, "--out", "run")[0] == 0
    assert call("fit", "--out", "run", "--resume", "--epochs", "4", "--num-particles", "20")[0] == 0
    assert call(*FIT, "--out", "straight", "--epochs", "4")[0] == 0
    first, second = pyro_vae.load(tmp_path / "run"), pyro_vae.load(tmp_path / "straight")
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert a.equal(b)
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 4


def test_files_of_ones_own(call, tmp_path):
    np.save(tmp_path / "counts.npy", np.random.default_rng(0).integers(0, 2, (50, 7)))
    code, out, err = call("fit", "--data", "counts.npy", "--batch-size", "10", *FIT[3:])
    assert code == 0, err
    assert "binarized" not in out
    assert (tmp_path / "runs/counts/metrics.json").exists()
    code, _, err = call("fit", "--data", "counts.npy", "--batch-size", "10", *FIT[3:])  # the first free name
    assert code == 0, err
    assert (tmp_path / "runs/counts-2/metrics.json").exists()
    assert call("evaluate", "runs/counts", "--num-particles", "20")[0] == 0


def test_dequantized_data_give_bits_per_dimension(call, tmp_path):
    code, out, err = call(*FIT, "--dequantize", "17", "--likelihood", "Gaussian()", "--out", "run")
    assert code == 0, err
    assert "bits/dim" in out
    assert "binarized" not in out
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    expected = metrics["test_nll"] / 64 / np.log(2) + np.log2(17)
    assert metrics["test_bits_per_dimension"] == pytest.approx(expected)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["dequantize"] == 17
    code, out, err = call("evaluate", "run", "--num-particles", "20")
    assert (code, "bits/dim" in out) == (0, True), err
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == metrics
    code, _, err = call("fit", "--config", "run/config.yaml", "--out", "again", "--num-particles", "20")
    assert code == 0, err
    assert json.loads((tmp_path / "again/metrics.json").read_text()) == metrics


def test_discretized_likelihoods_give_bits_per_dimension(call, tmp_path):
    code, out, err = call(*FIT, "--likelihood", "DiscretizedLogistic(bins=17)", "--out", "run")
    assert (code, "bits/dim" in out) == (0, True), err
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["test_bits_per_dimension"] == pytest.approx(metrics["test_nll"] / 64 / np.log(2))


TABLE = """
from pyro.distributions import Bernoulli, Normal
from torch import nn
from pyro_vae.distributions.joint import Joint

class Table(nn.Module):
    num_params = 2
    columns = ("age", "kind")

    def __init__(self, net, event_shape):
        super().__init__()
        self.net, self.event_shape = net, event_shape

    def forward(self, z):
        out = self.net(z)
        age = Normal(out[..., :1], out[..., 1:2].clamp(-2, 2).exp()).to_event(1)
        return Joint({"age": age, "kind": Bernoulli(logits=out[..., 2:3]).to_event(1)})
"""


def test_tables_in_and_out(call, tmp_path):
    (tmp_path / "my_table.py").write_text(TABLE)
    frame = pd.DataFrame({"age": np.random.default_rng(0).normal(size=60), "kind": ["yes", "no", "no"] * 20})
    frame.to_csv(tmp_path / "people.csv", index=False)
    arguments = ["fit", "--data", "people.csv", "--batch-size", "10", *FIT[3:], "--out", "run"]
    code, _, err = call(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert "text or categories in kind (a Heterogeneous likelihood takes them; --labels kind makes it the labels" in err
    code, out, err = call(*arguments, "--likelihood", "my_table.Table()", "--no-start-at-mean")
    assert code == 0, err
    assert "bits/dim" not in out
    recorded = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["recorded"]
    assert (recorded["columns"], recorded["categories"]) == (["age", "kind"], {"kind": ["no", "yes"]})
    code, _, err = call("sample", "run", "--n", "50", "--out", "draws.csv", "--trust")
    assert code == 0, err
    drawn = pd.read_csv(tmp_path / "draws.csv")
    assert (list(drawn.columns), len(drawn), set(drawn.kind)) == (["age", "kind"], 50, {"no", "yes"})
    assert call("evaluate", "run", "--num-particles", "20", "--trust")[0] == 0
    sys.modules.pop("my_table", None)


def test_samples_are_a_table_only_where_data_were(fitted, call):
    folder, _ = fitted
    code, _, err = call("sample", folder / "runs/digits", "--out", "samples.csv")
    assert (code, err.count("\n")) == (2, 1)
    assert "expected a run whose data were a table" in err


def test_components_of_ones_own(call, tmp_path):
    (tmp_path / "my_components.py").write_text(
        "from pyro_vae.priors import StandardNormal\nclass MyPrior(StandardNormal):\n"
        "    def __init__(self, latent, width=1):\n        super().__init__(latent)\n        self.width = width\n"
    )
    code, _, err = call(*FIT, "--prior", "my_components.MyPrior(width=3)", "--out", "run")
    assert code == 0, err
    code, _, err = call("evaluate", "run", "--num-particles", "20")
    assert (code, err.count("\n")) == (2, 1)
    assert "--trust" in err
    assert call("evaluate", "run", "--num-particles", "20", "--trust")[0] == 0
    assert call("fit", "--config", "run/config.yaml", "--out", "again")[0] == 2
    sys.modules.pop("my_components", None)


@pytest.mark.parametrize(("arguments", "message"), [
    (["fit", "--data", "mnits"], "expected one of digits, mnist, fashion_mnist, or a file"),
    (["fit", "--data", "none.npy"], "no such file"),
    (["fit", "--data", "mnist", "--data-root", "none"], r"MNIST/raw \(files train-images-idx3-ubyte"),
    (["fit", "--data", "text.npy"], "array of numbers"),
    (["fit", "--data", "junk.npy"], "holds no array"),
    (["fit", "--data", "nan.npy"], "finite values, got 1 NaN"),
    (["fit", "--data", "inf.npy"], "finite values, got 1 NaN or infinite"),
    (["fit", "--data", "negative.npy"], "support of the Bernoulli likelihood .* would fit: .*Gaussian"),
    (["fit", "--data", "counts.npy"], "would fit: .*Poisson"),
    (["fit", "--data", "empty.npy"], "at least one datum"),
    (["fit", "--batch-size", "2000"], r"expected 1 to 1258 \(the number of data\), got 2000"),
    (["fit", "--batch-size", "0"], "batch size: expected 1 to 1258"),
    (["fit", "--epochs", "0"], "positive epochs"),
    (["fit", "--epochs", "many"], "valid integer"),
    (["fit", "--lr", "0"], "positive epochs and lr"),
    (["fit", "--latent", "0"], "positive sizes, got latent=0"),
    (["fit", "--num-particles", "0"], "expected a positive number"),
    (["fit", "--network", "MPL()"], "unknown name 'MPL'; there is .*MLP"),
    (["fit", "--network", "MLP(hiden=[3])"], "it takes in_features, out_features, hidden, activation"),
    (["fit", "--network", "MLP(hidden=[0])"], "expected positive sizes"),
    (["fit", "--estimator", "ELBO()"], "there is .*Trace_ELBO"),
    (["fit", "--anneal", "Lin(0.1)"], "there is Constant, ControlVAE, Cosine"),
    (["fit", "--optimizer", "Adan()"], "unknown name 'Adan'"),
    (["fit", "--dequantize", "256"], r"on the grid i / 255 in \[0, 1\], got 0"),
    (["fit", "--dequantize", "17", "--binarize", "static"], "one of binarize and dequantize"),
    (["fit", "--binarize", "often"], "one of dynamic, static, threshold"),
    (["fit", "--lr-schedule", "warm"], "one of cosine, one-cycle"),
    (["fit", "--device", "tpux"], "device|accelerator"),
    (["fit", "--precision", "8"], "recision"),
    (["fit", "--out", "taken"], "taken exists"),
    (["fit", "--out", "taken", "--overwrite"], "no run directory"),
    (["fit", "--out", "none", "--resume"], "expected a run"),
    (["fit", "--resume"], "--resume: expected the run directory"),
    (["fit", "--config", "none.yaml"], "none.yaml"),
    (["fit", "--program", "VAE()", "--latent", "3"], r"--program .* or its parts"),
    (["fit", "--program", "VAE()"], "expected a value for prior, likelihood, posterior"),
    (["fit", "--frob", "1"], "No such option"),
    (["evaluate", "none"], "expected a run directory"),
    (["evaluate"], "Missing argument"),
    (["sample", "none", "--out", "samples.txt"], "ends in .png"),
    (["frob"], "No such command"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(call, tmp_path, arguments, message):
    np.save(tmp_path / "text.npy", np.array(["a"] * 20))
    (tmp_path / "junk.npy").write_bytes(b"junk")
    x = np.full((300, 4), 0.5)
    for name, value in {"nan": np.nan, "inf": np.inf, "negative": -1.0, "counts": 7.0}.items():
        x[3, 2] = value
        np.save(tmp_path / f"{name}.npy", x if name != "counts" else x.round() * 2 + 7)
    np.save(tmp_path / "empty.npy", np.zeros((0, 4)))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("all of it")
    before = set(tmp_path.rglob("*"))
    code, _, err = call(*arguments)
    assert code == 2
    assert err.count("\n") == 1, err
    assert re.search(message, err), err
    assert set(tmp_path.rglob("*")) == before


def test_estimators_are_compared(fitted, call, tmp_path):
    folder, _ = fitted
    path = folder / "runs/digits"
    few = ("--repeats", "2", "--reference-particles", "5", "--batch-size", "10")
    code, out, err = call("compare-estimators", path, "Trace_ELBO()", "DReG(num_particles=4)", *few, "--out", "a.csv")
    assert (code, err) == (0, "")
    assert "comparison: a.csv" in out
    frame = pd.read_csv("a.csv", index_col="estimator")
    assert list(frame.index) == ["Trace_ELBO()", "DReG(num_particles=4)"]
    assert any(f"{frame.bound.iloc[0]:.{digits}f} ±" in out for digits in (2, 3, 4))
    assert set(frame.columns) == {
        "bound", "bound_se", "gap", "milliseconds", "memory", "reference", "reference_se", "gradient_variance_model",
        "gradient_variance_guide", "gradient_snr_model", "gradient_snr_guide",
    }  # fmt: skip
    assert frame.notna().all(axis=None)
    assert call("compare-estimators", path, "Trace_ELBO()", *few, "--out", "a.nc")[0] == 0
    import xarray as xr

    with xr.open_dataset("a.nc") as found:
        assert found.attrs["num_data"] == 10
        assert found.bound.item() == frame.bound.iloc[0]
    other = [*few, "--seed", "1", "--out", "b.csv"]
    assert call("compare-estimators", path, "Trace_ELBO()", *other)[0] == 0
    assert pd.read_csv("b.csv").bound[0] != frame.bound.iloc[0]
    before = set(path.rglob("*"))
    assert call("compare-estimators", path, *few)[0] == 0  # the default set, and the default figure
    assert set(path.rglob("*")) - before == {path / "figures/estimators.png"}
    (path / "figures/estimators.png").unlink()


def test_default_estimators_suit_the_posterior(call):
    bits = ["--prior", "Bernoulli()", "--posterior", "Bernoulli()"]
    code, _, err = call(*FIT, *bits, "--epochs", "1", "--out", "bits")
    assert code == 0, err
    code, out, err = call("compare-estimators", "bits", "--repeats", "2", "--reference-particles", "5")
    assert code == 0, err
    assert "VIMCO(8)" in out
    assert "DReG" not in out


@pytest.mark.parametrize(("arguments", "message"), [
    (["Trace_ELBO()", "Trace_ELBO()"], r"different estimators, got Trace_ELBO\(\) more than once"),
    (["IWEA()"], "unknown name 'IWEA'; there is .*IWAE"),
    (["VIMCO(num_particles=1)"], "num_particles >= 2"),
    (["TraceGraph_ELBO()", "--repeats", "1"], "repeats: expected at least 2"),
    (["--reference-particles", "0"], "reference_particles: expected a positive number"),
    (["--batch-size", "0"], "batch size: expected 1 to 359"),
    (["--out", "a.txt"], "ends in .png, .pdf, .svg, .csv, .nc"),
    (["--data", "nan.npy"], "finite values, got 1 NaN"),
])  # fmt: skip
def test_bad_comparisons_are_one_line(fitted, call, tmp_path, arguments, message):
    folder, _ = fitted
    x = np.ones((30, 8, 8))
    x[3, 2, 1] = np.nan
    np.save(tmp_path / "nan.npy", x)
    code, _, err = call("compare-estimators", folder / "runs/digits", *arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert re.search(message, err), err
    assert not (folder / "runs/digits/figures/estimators.png").exists()


def test_export_writes_draws_for_arviz(fitted, call, tmp_path):
    import xarray as xr

    run = fitted[0] / "runs/digits"
    for name in ("draws.nc", "draws.zarr"):
        arguments = ["export", run, "--out", name, "--num-samples", 30, "--num-data", 5]
        code, out, err = call(*arguments)
        assert code == 0, err
        assert name in out
        with xr.open_datatree(tmp_path / name) as tree:
            assert dict(tree.posterior.z.sizes)["datum"] == 5
            assert tree.posterior.sizes["draw"] == 30
            assert tree.constant_data.label.shape == (5,)
            assert "program: VAE" in tree.attrs["config"]
            assert "num_data: 5" in tree.attrs["config"]
        code, _, err = call(*arguments)
        assert code == 2
        assert f"{name} exists: replace it (--overwrite)" in err
        assert call(*arguments, "--overwrite")[0] == 0


def test_diagnose_says_what_holds(fitted, call):
    run = fitted[0] / "runs/digits"
    arguments = ["diagnose", run, "--num-data", 30, "--only", "khat", "--only", "calibration"]
    code, out, err = call(*arguments)
    assert code == 0, err
    found = json.loads((run / "diagnostics.json").read_text())
    assert list(found) == ["khat", "calibration"]
    assert found["khat"]["numbers"]["share"] >= 0
    assert [found[name]["holds"] for name in found] == [True, False]  # after two epochs; p-values are below 1e-6
    assert "1 of 2 checks hold, 1 do not, 0 cannot tell" in out
    assert "1 of 2: khat holds" in err
    assert all((run / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in found)
    assert found["khat"]["num_data"] == 30
    assert call("diagnose", run, "--num-data", 20, "--only", "khat")[0] == 0
    again = json.loads((run / "diagnostics.json").read_text())
    assert again["khat"]["num_data"] == 20
    assert again["calibration"] == found["calibration"]
    assert call(*arguments, "--strict")[0] == 1
    assert call("diagnose", run, "--num-data", 30, "--only", "khat", "--strict")[0] == 0


def test_an_interrupted_diagnosis_shows_what_is_done(fitted, call, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setitem(diagnostics.CHECKS, "nuts", interrupted)
    code, out, err = call("diagnose", fitted[0] / "runs/digits", "--num-data", 20, "--only", "khat", "--only", "nuts")
    assert code == 130
    assert "1 of 1 checks hold" in out
    assert "interrupted" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diagnose", "--only", "luck"], "checks: expected names among collapse"),
        (["diagnose", "--num-data", "0"], "--num-data: expected a positive number, got 0"),
        (["export", "--out", "draws.txt"], "expected a name that ends in .nc, .zarr"),
        (["export", "--data", "other.npy"], "--out: expected a name"),
        (["export", "--num-samples", "0"], "num_samples"),
        (["export", "--reweight", "luck"], "psis"),
    ],
)
def test_bad_diagnoses_and_exports_are_one_line(fitted, call, arguments, message):
    code, _, err = call(arguments[0], fitted[0] / "runs/digits", *arguments[1:])
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_components_lists_all_with_arguments_and_support(call):
    code, out, _ = call("components")
    assert code == 0
    for kind in ("priors", "likelihoods", "posteriors", "networks"):
        module = getattr(pyro_vae, kind)
        listed = [name for name in module.__all__ if name[0].isupper()]
        assert all(f"  {name}(" in out for name in listed)
    assert "GaussianMixture(latent, components=10)\n      A mixture" in out
    assert "VonMisesFisher(net, latent)" in out
    assert "Over the unit sphere." in out


def test_other_components_from_the_command_line(call, tmp_path):
    code, out, err = call(
        *FIT, "--dequantize", "17", "--prior", "ARD()", "--posterior", "FullNormal()", "--likelihood", "Beta()",
        "--out", "run",
    )  # fmt: skip
    assert (code, err.count("error")) == (0, 0), err
    assert "bits/dim" in out
    loaded = pyro_vae.load(tmp_path / "run")
    assert (type(loaded.prior).__name__, loaded.size) == ("ARD", 1258)
    code, _, err = call(*FIT, "--prior", "UniformSphere()")
    assert code == 2
    assert "with UniformSphere fit the posteriors" in err


def test_grey_images_are_binarized_for_bernoulli_pixels_too(call, tmp_path):
    likelihood = "Autoregressive(channels=2, blocks=1, kernel_size=3)"
    code, out, err = call(*FIT, "--likelihood", likelihood, "--epochs", "1", "--out", "run")
    assert code == 0, err
    assert "grey values are binarized dynamically" in out
    assert "binarize: dynamic" in (tmp_path / "run" / "config.yaml").read_text()


def test_columns_of_a_table_are_standardized_for_the_encoder(call, tmp_path):
    frame = pd.DataFrame({"a": np.linspace(900, 1100, 60), "b": np.tile([0.1, 0.2, 0.3], 20)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    code, _, err = call("fit", "--data", "t.csv", "--likelihood", "Gaussian()", "--epochs", "1", "--batch-size", "10",
                        "--num-particles", "5", "--latent", "2", "--out", "run")  # fmt: skip
    assert code == 0, err
    net = pyro_vae.load(tmp_path / "run").posterior.net
    assert type(net).__name__ == "Standardized"
    assert net.loc == pytest.approx((1000, 0.2), rel=0.05)


def test_debug_shows_the_traceback(tmp_path):
    done = run("fit", "--data", "mnits", "--debug", cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_help_and_entry_point(call, tmp_path):
    commands = ("fit", "evaluate", "sample", "compare-estimators")
    for arguments in (["--help"], [], *([command, "--help"] for command in commands)):
        code, out, _ = call(*arguments)
        assert code == 0
        assert "Usage: pyro-vae" in out
    assert call("--version") == (0, f"pyro-vae {pyro_vae.__version__}\n", "")
    script = subprocess.run(["pyro-vae", "--help"], capture_output=True, text=True, check=True)
    assert "fit" in script.stdout


def test_ctrl_c_ends_cleanly_with_a_checkpoint(call, tmp_path):
    # Compiling, which would pay for so many epochs, takes ten seconds.
    command = [sys.executable, "-m", "pyro_vae", *FIT, "--epochs", "100000", "--no-compile", "--out", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    history = tmp_path / "run" / "history.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (history.exists() and history.read_text().count("\n") > 2):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "--resume" in err
    epochs = len(pd.read_csv(history))
    code, _, err = call("fit", "--out", "run", "--resume", "--epochs", epochs + 2, "--num-particles", 20)
    assert code == 0, err
    assert len(pd.read_csv(history)) == epochs + 2


@pytest.mark.slow
def test_mnist_end_to_end(mnist_root, tmp_path):
    """Two epochs of the command in the README, on the real images; the long run stands in the README."""
    done = run(
        "fit", "--data", "mnist", "--data-root", mnist_root, "--binarize", "dynamic", "--latent", "50",
        "--network", "MLP(hidden=[200, 200], activation='tanh')", "--epochs", "2", "--batch-size", "100",
        "--lr", "2e-3", "--lr-schedule", "one-cycle", "--num-particles", "5", "--out", "run", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test_nll"] < 115
    assert metrics["active_units"] > 10
