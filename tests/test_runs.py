"""Run directories: everything is in them, nothing half-written, nothing unpickled."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from oracles import TwoLatents
from safetensors.torch import save_file

import pyro_vae
from pyro_vae import runs, schedules
from pyro_vae.files import replacing


@pytest.fixture
def trained(tmp_path):
    vae = pyro_vae.build((1, 8, 8), latent=2, network="MLP(hidden=[16])")
    digits = pyro_vae.data.load("digits", binarize="dynamic")
    options = {"epochs": 1, "anneal": schedules.Cosine(0.3), "seed": 3, "lr_schedule": "cosine", "progress": False}
    pyro_vae.fit(vae, digits.train, out=tmp_path / "run", **options)
    return tmp_path / "run", vae


def test_the_configuration_says_everything(trained):
    run, vae = trained
    config = yaml.safe_load((run / "config.yaml").read_text())
    recorded = config.pop("recorded")
    assert config == {
        "data": "digits",
        "data_root": None,
        "binarize": "dynamic",
        "labels": None,
        "valid": None,
        "test": None,
        "data_seed": 0,
        "program": pyro_vae.expressions.write(vae, "program"),
        "estimator": "Trace_ELBO()",
        "anneal": "Cosine(fraction=0.3)",
        "epochs": 1,
        "batch_size": 128,
        "lr": 0.001,
        "optimizer": "Adam()",
        "lr_schedule": "cosine",
        "device": "auto",
        "precision": "32-true",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "seed": 3,
        "start_at_mean": False,
        "compile": "auto",
        "num_workers": 0,
    }
    assert recorded["event_shape"] == [1, 8, 8]
    assert recorded["torch"] == torch.__version__.partition("+")[0]
    assert recorded["pyro_vae"] == pyro_vae.__version__


def test_load_gives_the_program_back(trained):
    run, vae = trained
    loaded = pyro_vae.load(run)
    assert not loaded.training
    for name, tensor in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not list(run.rglob(".*")), "temporary files"


def test_double_precision_comes_back(tmp_path):
    vae = pyro_vae.build((2,), latent=1)
    pyro_vae.fit(
        vae, torch.ones(4, 2), epochs=1, batch_size=2, precision="64-true", out=tmp_path / "run", progress=False
    )
    loaded = pyro_vae.load(tmp_path / "run")
    assert loaded.prior.loc.dtype == loaded.likelihood.net.output_bias.dtype == torch.float64
    pyro_vae.evaluation.elbo(loaded, torch.ones(4, 2))


def test_a_program_of_ones_own_needs_trust_or_itself(tmp_path, monkeypatch):
    run = tmp_path / "run"
    program = TwoLatents()
    pyro_vae.fit(program, torch.ones(4, 64), epochs=1, batch_size=2, out=run, progress=False)
    with pytest.raises(ValueError, match="trust=True"):
        pyro_vae.load(run)
    for loaded in (pyro_vae.load(run, trust=True), pyro_vae.load(run, program=TwoLatents())):
        assert torch.equal(loaded.down.weight, program.down.weight)

    class Local(TwoLatents):
        def __init__(self, features):
            super().__init__(features)

    with pytest.warns(UserWarning, match="cannot name the program .*not at the top of a module"):
        pyro_vae.fit(Local(64), torch.ones(4, 64), epochs=1, batch_size=2, out=tmp_path / "local", progress=False)
    with pytest.raises(ValueError, match=r"load\(run, program=...\)"):
        pyro_vae.load(tmp_path / "local")


def test_shared_weights_are_saved(tmp_path):
    vae = pyro_vae.build((2,), latent=1)
    vae.likelihood.twin = vae.likelihood.net
    pyro_vae.fit(vae, torch.ones(4, 2), epochs=1, batch_size=2, out=tmp_path / "run", progress=False)
    other = pyro_vae.build((2,), latent=1)
    other.likelihood.twin = other.likelihood.net
    pyro_vae.load(tmp_path / "run", program=other)
    assert torch.equal(other.likelihood.net.output_bias, vae.likelihood.net.output_bias)


class Bomb:
    def __reduce__(self):
        return (Path("exploded").touch, ())


@pytest.mark.parametrize(("break_it", "message"), [
    (lambda run: (run / "model.safetensors").write_bytes(b"junk"), "corrupt"),
    (lambda run: (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-8]), "corrupt"),
    (lambda run: (run / "model.safetensors").write_bytes(pickle.dumps(Bomb())), "corrupt"),
    (lambda run: torch.save({"x": Bomb()}, run / "model.safetensors"), "corrupt"),
    (lambda run: (run / "model.safetensors").unlink(), "interrupted .* resume it first"),
    (lambda run: save_file({"x": torch.zeros(1)}, run / "model.safetensors"), "not a checkpoint of pyro_vae"),
    (lambda run: runs.write_checkpoint(run / "model.safetensors", {"x": torch.zeros(1)}), "another program's"),
    (lambda run: (run / "config.yaml").write_text("a: [1"), "corrupt"),
    (lambda run: (run / "config.yaml").write_text("!!python/object/apply:os.system ['true']"), "corrupt"),
    (lambda run: (run / "config.yaml").write_text("just text"), "expected a mapping"),
    (lambda run: (run / "config.yaml").write_text("program: MLP()"), "unknown name 'MLP'; there is VAE"),
    (lambda run: (run / "config.yaml").write_text("program: os.system('touch exploded')"), "trust=True"),
    (lambda run: shutil.rmtree(run), "expected a run directory"),
])  # fmt: skip
def test_broken_runs_say_so_in_one_line(trained, break_it, message, monkeypatch, tmp_path):
    run, _ = trained
    monkeypatch.chdir(tmp_path)
    break_it(run)
    with pytest.raises(ValueError, match=message) as caught:
        pyro_vae.load(run)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_weights_of_another_size_name_both(trained):
    run, _ = trained
    with pytest.raises(ValueError, match=r"expected likelihood.net.layers.0.bias of shape \(7,\), got \(16,\)"):
        pyro_vae.load(run, program=pyro_vae.build((1, 8, 8), latent=2, network="MLP(hidden=[7])"))


def test_a_foreign_checkpoint_is_not_resumed(trained, digits):
    run, _ = trained
    other = pyro_vae.build((1, 8, 8), latent=3)
    with pytest.raises(ValueError, match="another program's"):
        pyro_vae.fit(other, digits.train, out=run, resume=True, progress=False)
    (run / "checkpoint" / "last.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="corrupt"):
        pyro_vae.fit(other, digits.train, out=run, resume=True, progress=False)
    with pytest.raises(ValueError, match="to resume, found none"):
        pyro_vae.fit(other, digits.train, out=run / "none", resume=True, progress=False)


def test_an_existing_directory_is_left_alone(trained, digits, tmp_path):
    run, vae = trained
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="exists: resume it"):
        pyro_vae.fit(vae, digits.train, out=run, progress=False)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all of it")
    (precious / "config.yaml").write_text("database: x")
    with pytest.raises(ValueError, match="no run directory"):
        pyro_vae.fit(vae, digits.train, out=precious, overwrite=True, progress=False)
    # Bad arguments are found before the old run is touched.
    with pytest.raises(ValueError, match="batch size"):
        pyro_vae.fit(vae, digits.train, out=run, overwrite=True, batch_size=10**6, progress=False)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert (precious / "thesis.txt").exists()
    (run / "notes.txt").write_text("kept")
    pyro_vae.fit(vae, digits.train, out=run, overwrite=True, epochs=1, progress=False)
    assert (run / "notes.txt").exists()


def test_bad_arguments_leave_no_directory(tmp_path, digits):
    vae = pyro_vae.build((1, 8, 8), latent=2)
    for options in ({"batch_size": 10**6}, {"epochs": 0}, {"lr_schedule": "warm"}):
        with pytest.raises(ValueError, match="expected"):
            pyro_vae.fit(vae, digits.train, out=tmp_path / "run", progress=False, **options)
    assert not (tmp_path / "run").exists()


def test_a_folder_is_back_where_an_interrupt_came_between(tmp_path, monkeypatch):
    path, plain = tmp_path / "store", Path.replace
    path.mkdir()
    (path / "old").touch()

    def interrupted(self, target):
        if "former" in str(target):
            plain(self, target)
            raise KeyboardInterrupt
        return plain(self, target)

    def written():
        with replacing(path) as temporary:
            temporary.mkdir()

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written()
    assert [each.name for each in tmp_path.rglob("*")] == ["store", "old"]


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "a.json"
    runs.write_json(path, {"good": 1})

    def fail():
        with replacing(path) as temporary:
            temporary.write_text('{"half":')
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert json.loads(path.read_text()) == {"good": 1}
    assert list(tmp_path.iterdir()) == [path]
