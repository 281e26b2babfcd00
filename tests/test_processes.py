"""Training in two processes, on the CPU."""

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes_script
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae
from pyro_vae import runs
from pyro_vae.cli import main, output
from pyro_vae.data import Batches
from pyro_vae.training import Training, processes
from pyro_vae.training.options import fabric

SCRIPT = Path(processes_script.__file__)
PACKAGE = str(Path(pyro_vae.__file__).parents[1])


def start(*command, cwd):
    """A process with its own session, so that all that it starts can be ended with it."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": PACKAGE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process, timeout=100):
    """Its exit code and what it and its like have said; nothing that it has started is left behind."""
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out + errors


def wait_for(path, process, timeout=100):
    """Until a file is there."""
    end = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None, ended(process)
        assert time.monotonic() < end, f"no {path} after {timeout} s"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both processes of the script found, what it said, and its folder."""
    folder = tmp_path_factory.mktemp("two")
    given = processes_script.given(), processes_script.given_data()
    processes_script.fit_given(folder / "resumed", *given, 1, epochs=2)
    shutil.copytree(folder / "resumed", folder / "resumed in shards")
    code, said = ended(start(SCRIPT, folder, 2, cwd=folder))
    assert code == 0, said
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)], said, folder


@pytest.fixture(scope="module")
def one(two, tmp_path_factory):
    """The same in this process, which resumes what two have begun."""
    folder = tmp_path_factory.mktemp("one")
    given = processes_script.given(), processes_script.given_data()
    processes_script.fit_given(folder / "resumed", *given, 1, epochs=2)
    shutil.copytree(folder / "resumed", folder / "resumed in shards")
    fits = processes_script.fit_all(folder, 1, torch.optim.AdamW)
    return {name: processes_script.results(fitted) for name, fitted in fits}


@pytest.mark.parametrize("name", ["memory", "data set", "resumed", "resumed in shards", "shards"])
def test_two_processes_find_what_one_does(one, two, name):
    """Weights, running means and figures, where the noise comes with the data: no false alarms.

    The batches are ragged, and of the last one a process has nothing; the program has a global latent.
    """
    for rank in (0, 1):
        found = two[0][rank][0][name]
        assert found.keys() == one[name].keys()
        for key, expected in one[name].items():
            tolerance = 1e-5 if key == "figures" else 1e-10  # Fabric gives figures in single precision
            torch.testing.assert_close(found[key], expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=key)


def test_each_process_holds_its_shard(two):
    """Half the rows of each parameter and of its moments, of those that have rows in the order of memory; exact.

    The program has its own parameters, whole, in the end.
    """
    for found, _ in two[0]:
        held, same = found["held"]
        assert held == {(2, 3): [6] * 3, (): [1] * 3, (4, 3): [6] * 3, (4,): [2] * 3}
        assert same


@pytest.mark.parametrize("name", ["resumed", "resumed in shards"])
def test_a_run_that_resumes_goes_on_with_the_same_moments(one, two, name):
    """The weights of a run that was not stopped, where the noise comes with the data: no false alarms."""
    for found in (one, two[0][0][0]):
        for key, expected in one["memory"].items():
            tolerance = 1e-5 if key == "figures" else 1e-10
            torch.testing.assert_close(found[name][key], expected, rtol=tolerance, atol=1e-10, equal_nan=True, msg=key)


def test_processes_agree_on_an_interruption_in_the_last_step(one, two):
    """Of the second one alone; what it has written is whole."""
    assert [found["interrupted"] for found, _ in two[0]] == ["KeyboardInterrupt "] * 2
    assert (two[2] / "last" / runs.MODEL).exists()


def test_there_are_as_many_processes_as_before(two):
    expected = (
        "ValueError devices: expected the 2 processes that have trained together before, or 1 (each alone), got 3"
    )
    assert [found["three"] for found, _ in two[0]] == [expected] * 2


def test_processes_draw_noise_of_their_own(two):
    """A run that nobody has seeded: false alarms where 8 pairs of normal draws are all within 0.1, below 1e-9.

    Of batches of 16, 16 and 8 each process has half; both end with the same weights, although they began with others.
    """
    (first, drawn), (second, others) = two[0]
    assert [len(z) for z in drawn[:3]] == [len(z) for z in others[:3]] == [8, 8, 4]
    assert len(drawn) == 4 * 3
    assert all((a - b).abs().max() > 0.1 for a, b in zip(drawn, others, strict=True))
    for name, tensor in first["vae"].items():
        assert torch.equal(tensor, second["vae"][name]), name


def test_only_the_first_process_writes(two):
    _, said, folder = two
    assert said.count("epoch 4/4") == 1  # of the progress bar
    written = {str(path.relative_to(folder / "vae")) for path in (folder / "vae").rglob("*") if path.is_file()}
    assert written == {runs.CONFIG, runs.MODEL, runs.HISTORY, str(runs.CHECKPOINT)}
    assert not (folder / "written by another").exists()
    config = runs.read_config(folder / "vae")
    assert (config["devices"], config["num_nodes"], config["strategy"]) == (2, 1, "auto")
    tensors, _ = runs.read_checkpoint(folder / "vae" / runs.CHECKPOINT)
    assert len(tensors["rng.cpu"]) == 2
    assert not torch.equal(*tensors["rng.cpu"])


def test_each_goes_on_with_its_own_random_numbers(two):
    tensors, _ = runs.read_checkpoint(two[2] / "vae" / runs.CHECKPOINT)
    training = Training(processes_script.given(), processes_script.given_data(), batch_size=7, device="cpu")
    training.processes.count = 2
    with torch.random.fork_rng([]):
        for training.processes.rank in (0, 1):
            training._restore_rng(tensors)
            assert torch.equal(torch.get_rng_state(), tensors["rng.cpu"][training.processes.rank])


def test_one_process_resumes_what_two_have_begun(two):
    found, _, folder = two
    fitted, drawn = processes_script.fit_vae(folder, 1, epochs=5, resume=True)
    assert fitted.history.epoch.tolist() == [1, 2, 3, 4, 5]
    assert fitted.history.step.tolist() == [3, 6, 9, 12, 15]
    assert torch.equal(torch.tensor(fitted.history.valid_elbo[:4].to_numpy()), found[0][0]["vae"]["valid"])
    assert [len(z) for z in drawn] == [16, 16, 8]


def test_one_process_resumes_what_two_have_begun_in_shards(two, tmp_path):
    """The checkpoint has the whole of the optimizer's state: no false alarms."""
    given = processes_script.given_data(), 1
    options = {"estimator": processes_script.Backward(), "epochs": 7}
    resumed = processes_script.fit_given(two[2] / "shards", processes_script.given(), *given, resume=True, **options)
    alone = processes_script.fit_given(tmp_path / "alone", processes_script.given(), *given, **options)
    expected = alone.program.state_dict()
    for name, tensor in resumed.program.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-10, equal_nan=True, msg=name)


def shares(source, count, **options):
    """The shares of an epoch's batches, of processes whose random states differ."""
    program, parts = processes_script.given(), []
    for rank in range(count):
        torch.manual_seed(rank)
        batches = Batches(source, program, 7, seed=3)
        batches.rank, batches.count = rank, count
        parts.append([x for x, _ in batches.epoch(1, **options)])
    return parts


@pytest.mark.parametrize("kind", ["memory", "data set", "loader"])
def test_shares_are_the_batches(kind):
    """All data, each once, in shares that differ by one datum at most: exact."""
    x, noise = processes_script.given_data()
    data = TensorDataset(x, noise)
    source = {"memory": (x, noise), "data set": data, "loader": DataLoader(data, batch_size=7, shuffle=True)}[kind]
    parts = shares(source, 3)
    sizes = [[len(share) for share in batch] for batch in zip(*parts, strict=True)]
    assert sizes == [[2, 2, 3], [2, 2, 3], [2, 2, 3], [0, 0, 1]]
    together = torch.cat([torch.cat(share) for share in parts])
    assert torch.equal(together.sort(0).values, x.sort(0).values)
    rest = shares(source, 3, skip=2)
    for part, whole in zip(rest, parts, strict=True):
        assert all(torch.equal(share, same) for share, same in zip(part, whole[2:], strict=True))


class Global(torch.nn.Module):
    """A global latent, and a plate that knows of no data but the batch."""

    def model(self, x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(self, x):
        pyro.sample("loc", dist.Normal(0.0, 1.0))


def test_a_global_latent_needs_the_number_of_data():
    together = processes.Processes(fabric("cpu"))
    together.check_globals(Global(), (torch.zeros(3),))  # one process sees all of the batch
    together.count = 2
    with pytest.raises(ValueError, match="2 processes would each count the global latent 'loc' once: expected a plate"):
        together.check_globals(Global(), (torch.zeros(3),))
    together.check_globals(processes_script.given(), [part[:7] for part in processes_script.given_data()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "expected positive devices and num_nodes, got devices=0"),
        ({"device": "cuda:1", "devices": 2}, "device: expected cuda for 2 processes, got cuda:1"),
        (
            {"strategy": "fsdp", "devices": 2, "precision": "16-mixed"},
            "precision: expected bf16-mixed for strategy fsdp, got 16-mixed",
        ),
        ({"devices": "2"}, "expected positive devices and num_nodes, got devices='2', num_nodes=1"),
        ({"devices": None}, "expected positive devices and num_nodes, got devices=None, num_nodes=1"),
        ({"devices": 1.5}, "expected positive devices and num_nodes, got devices=1.5, num_nodes=1"),
        ({"num_nodes": "2"}, "expected positive devices and num_nodes, got devices=1, num_nodes='2'"),
        ({"device": "cpu:0"}, "device: expected a name such as cpu, cuda or cuda:1, got 'cpu:0'"),
        ({"device": "tpu"}, "device: expected a name such as cpu, cuda or cuda:1, got 'tpu'"),
        ({"device": "cuda:99"}, "device: expected one that this machine has, such as auto or cpu, got 'cuda:99'"),
        *(
            ({"precision": given}, f"one of 32-true, 64-true, bf16-mixed, 16-mixed, got {given!r}$")
            for given in ("bf16-true", "16-true", "8", "transformer-engine", "64", 32, None)
        ),
        (
            {"precision": "16-mixed", "device": "cpu"},
            "precision: expected bf16-mixed on a device other than cuda, got 16-mixed on cpu",
        ),
        ({"strategy": "dp"}, "strategy: expected one of auto, ddp, fsdp, got 'dp'"),
    ],
)
def test_what_cannot_be_asked_for(options, message):
    with pytest.raises(ValueError, match=message):
        pyro_vae.fit(processes_script.given(), processes_script.given_data(), batch_size=7, **options)


@pytest.mark.parametrize("name", ["-c", "-", ""])
def test_processes_need_a_script(name, monkeypatch):
    together = fabric("cpu", devices=2)
    monkeypatch.setattr(together, "launch", lambda: pytest.fail("launched"))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(
        ValueError, match="devices: expected a script or a module that 2 processes can run, got '.*'; w"
    ):
        processes.Processes(together)
    monkeypatch.setattr(sys, "argv", [__file__])
    with pytest.raises(pytest.fail.Exception, match="launched"):
        processes.Processes(together)


def said_of(data):
    """What tells that processes have the same data."""
    return processes.described(Batches(data, processes_script.given(), batch_size=7))


X, NOISE = (part.numpy() for part in processes_script.given_data())


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("digest of 5 rows of the data", (np.concatenate([X[:-1], X[:1]]), NOISE)),
        ("digest of 5 rows of the data", (np.concatenate([X[:10], X[:1], X[11:]]), NOISE)),
        ("digest of 5 rows of the data", (X, NOISE[::-1].copy())),
        ("dtype of the data", (X.astype("float32"), NOISE)),
        ("shape of a datum", (X[:, :2].copy(), NOISE)),
        ("number of data", (X[:-1], NOISE[:-1])),
    ],
)
@pytest.mark.parametrize("disk", [False, True])
def test_what_tells_that_data_are_others(key, changed, disk, tmp_path):
    """The same copies say the same of themselves, and others something else: exact."""

    def given(x, noise, name):
        np.save(tmp_path / name, x)
        return np.load(tmp_path / name, mmap_mode="r") if disk else x, noise

    said = said_of(given(X, NOISE, "x.npy"))
    assert said == said_of(given(X.copy(), NOISE.copy(), "same.npy"))
    assert said["kind of data"] == ("OnDisk" if disk else "InMemory")
    assert said[key] != said_of(given(*changed, "other.npy"))[key]


def test_a_stream_says_its_lengths():
    data = TensorDataset(*processes_script.given_data())
    said = said_of(DataLoader(data, batch_size=4))
    assert said == {"number of data": 22, "number of batches": 6, "kind of data": "DataLoader"}


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_precisions(precision):
    """Weights are of the precision, and the loss is finite."""
    vae = pyro_vae.build((4,), latent=2, network="MLP(hidden=[4])")
    fitted = pyro_vae.fit(vae, torch.ones(4, 4), epochs=1, batch_size=4, precision=precision, progress=False)
    assert fitted.history.loss.map(math.isfinite).all()
    assert next(vae.parameters()).dtype == (torch.float64 if precision == "64-true" else torch.float32)


def test_an_interrupted_evaluation_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output, "evaluate", interrupted)
    with pytest.raises(SystemExit) as ended:
        main([*map(str, FIT[2:]), "--epochs", "1", "--network", "MLP(hidden=[4])"])
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "pyro-vae: interrupted after training; go on with: pyro-vae evaluate run"
    )
    assert (tmp_path / "run" / runs.MODEL).exists()


FIT = ("-m", "pyro_vae", "fit", "--device", "cpu", "--num-particles", 2, "--valid", 0, "--out", "run")
FIT += ("--no-compile",)  # which takes seconds, and would come after some steps of so long a run


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("sent", "code", "line"),
    [
        (signal.SIGKILL, 2, "pyro-vae: error: rank 1 of 2 processes has ended, so all of them end"),
        (signal.SIGINT, 130, "pyro-vae: interrupted; go on with: pyro-vae fit --resume --out run"),
    ],
)
def test_what_ends_one_process_ends_all(sent, code, line, strategy, tmp_path):
    """Within seconds, with one line; and what was written is whole."""
    main = start(*FIT, "--devices", 2, "--strategy", strategy, "--epochs", 10**6, cwd=tmp_path)
    wait_for(tmp_path / "run" / runs.HISTORY, main)
    (child,) = Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split()
    os.kill(int(child), sent)
    before = time.monotonic()
    found, said = ended(main, timeout=40)
    assert found == code, said
    assert said.count("pyro-vae: error") + said.count("pyro-vae: interrupted") == 1
    assert line in said
    assert time.monotonic() - before < 30
    tensors, meta = runs.read_checkpoint(tmp_path / "run" / runs.CHECKPOINT)
    assert meta["step"] > 0
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("die", "LostProcessError: rank 1 of 2 processes has ended, so all of them end"),
        ("diverge", "the loss is nan at step 4; first site not finite: none, though the loss is, in rank 1"),
        ("differ", "the same program and data in every process, got for number of data 40 in rank 0 and 39 in rank 1"),
    ],
)
def test_errors_name_the_process(how, message, tmp_path):
    code, said = ended(start(SCRIPT, tmp_path, how, cwd=tmp_path))
    assert code != 0
    assert message in said


@pytest.mark.slow
def test_a_compiled_step_in_shards(one, tmp_path):
    """It gives the weights of one process: no false alarms."""
    code, said = ended(start(SCRIPT, tmp_path, "compile", cwd=tmp_path))
    assert code == 0, said
    assert "not compiled" not in said
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        for key, expected in one["memory"].items():
            torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-8, equal_nan=True, msg=key)


@pytest.mark.slow
def test_torchrun_and_another_number_of_processes(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    code, said = ended(start(*torchrun, *FIT, "--epochs", 2, cwd=tmp_path))
    assert code == 0, said
    assert said.count("run directory") == 1
    assert said.count("test data, nats per datum") == 1
    for options in (("--epochs", 3), ("--epochs", 4, "--devices", 2), ("--epochs", 5, "--devices", 2)):
        code, said = ended(start(*FIT, *options, "--resume", cwd=tmp_path))
        assert code == 0, said
    history = (tmp_path / "run" / runs.HISTORY).read_text().splitlines()
    assert [row.split(",")[0] for row in history] == ["epoch", "1", "2", "3", "4", "5"]
