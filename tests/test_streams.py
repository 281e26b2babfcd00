"""Data larger than memory: the same batches as of data in memory, read ahead, never whole, and nothing left behind."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import yaml
import zarr
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset, get_worker_info

import pyro_vae
from pyro_vae import cli, evaluation
from pyro_vae.cli.configuration import expanded
from pyro_vae.data import Batches, InMemory, OnDisk, as_source, check, checks, disk, files, load
from pyro_vae.data.disk import is_on_disk
from pyro_vae.training import Training, fit

QUIET = {"progress": False, "batch_size": 5, "seed": 5}


class Conditional(nn.Module):
    """A program that takes data and labels."""

    def model(self, x, y): ...

    guide = model


def make():
    torch.manual_seed(0)
    return pyro_vae.build((4, 4), latent=2, network="MLP(hidden=[8])")


def equal(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def mapped(path, x, chunk=None):
    np.save(path, x)
    return np.load(path, mmap_mode="r")


def chunked(path, x, chunk=7):
    array = zarr.create_array(path, shape=x.shape, chunks=(chunk, *x.shape[1:]), dtype=x.dtype)
    array[:] = x
    return zarr.open(path, mode="r")


STORES = {"map": (mapped, "x.npy"), "zarr": (chunked, "x.zarr")}


@pytest.fixture(params=STORES)
def store(request, tmp_path):
    """What puts an array on disk."""
    put, name = STORES[request.param]
    return lambda x, prefix="", **options: put(tmp_path / f"{prefix}{name}", x, **options)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(256, size=(53, 4, 4)).astype("uint8")


@pytest.fixture
def zeros_and_ones(images):
    return (images > 127).astype("uint8")


def left_behind():
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("pyro_vae_read")]
    return threads + multiprocessing.active_children()


def same(first, second):
    pairs = [tuple(zip(a, b, strict=True)) for a, b in zip(first, second, strict=True)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for pair in pairs for a, b in pair)


# Against data in memory


@pytest.mark.parametrize("dtype", ["uint8", "bool", "float32", ">f8", "int16", "uint16"])
def test_batches_are_those_of_the_same_data_in_memory(store, images, dtype):
    x = (images / 255).astype(dtype) if dtype in ("float32", ">f8") else images.astype(dtype)
    y = np.arange(53)
    on_disk = Batches((store(x), y), Conditional(), 8, seed=3, num_workers=2)
    in_memory = Batches((x, y), Conditional(), 8, seed=3)
    assert isinstance(on_disk.source, OnDisk)
    for epoch, skip in ((0, 0), (1, 0), (1, 2), (1, 6)):
        assert same(on_disk.epoch(epoch, skip), in_memory.epoch(epoch, skip))
    on_disk.seed = in_memory.seed = None
    assert same(on_disk.epoch(0), in_memory.epoch(0))


def test_labels_may_be_on_disk_too(store, images):
    pair = store(images), store(np.arange(53), "labels")
    assert same(
        Batches(pair, Conditional(), 8, 0).epoch(0), Batches((images, np.arange(53)), Conditional(), 8, 0).epoch(0)
    )


def test_zeros_and_ones_are_no_black_images(store, zeros_and_ones):
    data = as_source(store(zeros_and_ones))
    assert torch.equal(data[:], torch.from_numpy(zeros_and_ones).float())
    assert not data.grey


@pytest.mark.parametrize("index", [3, -1, slice(5), slice(None, None, 7), torch.tensor([9, 2, 2])])
def test_items_are_those_of_the_same_data_in_memory(store, images, index):
    for data, other in (
        (as_source(store(images)), InMemory(images)),
        (OnDisk(store(images, "b"), np.arange(53)), InMemory(images, np.arange(53))),
    ):
        got, wanted = data[index], other[index]
        assert same([got], [wanted]) if isinstance(got, tuple) else torch.equal(got, wanted)


def test_a_loader_gets_whole_batches(store, images):
    data = OnDisk(store(images), np.arange(53))
    x, y = next(iter(DataLoader(data, batch_size=6)))
    assert torch.equal(x, InMemory(images)[:6])
    assert y.tolist() == list(range(6))


def test_training_and_evaluation_are_those_of_the_same_data_in_memory(store, zeros_and_ones):
    first, second = make(), make()
    fit(first, store(zeros_and_ones), epochs=2, start_at_mean=True, **QUIET)
    fit(second, zeros_and_ones, epochs=2, start_at_mean=True, **QUIET)
    assert equal(first, second)
    got = [evaluation.elbo(first, x, seed=0) for x in (store(zeros_and_ones, "again"), zeros_and_ones)]
    assert torch.equal(*got)
    assert not left_behind()


# In blocks


def test_blocks_are_mixed_within_windows(store):
    """Of 2,000 data a window of 200 holds 50 blocks of 4 (of a map) or 20 of 10 (chunks), and one that it ends within.

    All rows at random would make about 180 runs. An epoch is a permutation all the same, as is what is left of it after
    some batches; and the rows of a window are out of order, of which 1 in 200 follows its neighbour by chance.
    """
    data = OnDisk(store(np.arange(2000.0, dtype="float32")[:, None], chunk=10), window=200)
    batches = Batches(data, pyro_vae.build((1,), latent=1), 10, seed=0)
    epochs = [torch.cat([x for (x,) in batches.epoch(epoch)]).flatten() for epoch in (0, 1)]
    for rows in epochs:
        assert torch.equal(rows.sort().values, torch.arange(2000.0))
        for window in rows.split(200):
            assert (window.sort().values.diff() > 1).sum() <= (51 if isinstance(data.x, np.memmap) else 21)
            assert (window.diff() != 1).float().mean() > 0.9
    assert not torch.equal(*epochs)
    rest = torch.cat([x for (x,) in batches.epoch(1, skip=33)]).flatten()
    assert torch.equal(rest, epochs[1][330:])
    batches.num_workers = 3
    assert torch.equal(torch.cat([x for (x,) in batches.epoch(1)]).flatten(), epochs[1])


def test_a_chunk_is_read_about_once_an_epoch(tmp_path, monkeypatch):
    x = np.zeros((1000, 2), "float32")
    data = OnDisk(chunked(tmp_path / "x.zarr", x, chunk=10), window=200)
    read = []
    by_chunk = disk._by_chunk
    monkeypatch.setattr(disk, "_by_chunk", lambda array, rows: read.extend(set(rows // 10)) or by_chunk(array, rows))
    assert sum(len(x) for (x,) in Batches(data, pyro_vae.build((2,), latent=1), 10, seed=0).epoch(0)) == 1000
    assert 100 <= len(read) <= 100 + 2 * 5  # once more where a window ends within a chunk


def test_defaults_of_the_window(tmp_path, monkeypatch):
    data = as_source(mapped(tmp_path / "x.npy", np.zeros((1000, 16), "uint8")))
    assert torch.equal(
        data.order(torch.Generator().manual_seed(0), 10),
        torch.randperm(1000, generator=torch.Generator().manual_seed(0)),
    )
    monkeypatch.setattr(disk, "_WHOLE", 15_999)
    monkeypatch.setattr(disk, "_WINDOW", 1600)
    assert data.part(30, shuffled=True) == 90  # whole batches of a window of 100 data
    chunks = as_source(chunked(tmp_path / "x.zarr", np.zeros((1000, 16), "uint8"), chunk=50))
    assert chunks.part(30, shuffled=True) == 180  # of four chunks at least


# Never whole


def test_no_more_is_read_than_is_asked_for(store, monkeypatch):
    data = OnDisk(store(np.zeros((2000, 16), "float32"), chunk=50), window=100)
    read = []
    take = OnDisk.read
    monkeypatch.setattr(OnDisk, "read", lambda self, places, num=2: read.append(len(places)) or take(self, places, num))
    epoch = Batches(data, pyro_vae.build((16,), latent=1), 10, seed=0).epoch(0)
    next(epoch)
    time.sleep(0.2)  # for what would be read on
    assert sum(read) <= 3 * 100  # what is asked for, what is read meanwhile, and what that waits for
    epoch.close()
    assert not left_behind()


def test_a_thread_that_reads_computes_alone(store, images):
    """A pool of helpers for each thread that computes is more threads than processors: the step's then wait."""
    before, reading = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        batches = Batches(store(images), make(), 10, seed=0, num_workers=2)
        batches.tests = [lambda *_: reading.append((threading.current_thread().name[:14], torch.get_num_threads()))]
        for _ in batches.epoch(0):
            with ThreadPoolExecutor(1) as another:
                assert another.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
        assert set(reading) == {("pyro_vae_read_", 1)}
    finally:
        torch.set_num_threads(before)


MEMORY = """
    import sys
    import numpy as np, torch
    import pyro_vae
    from pyro_vae.data import Batches, OnDisk

    def own():
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    x = np.load(sys.argv[1], mmap_mode="r")
    data = OnDisk(x, window=2**26 // 4096) if sys.argv[2] == "blocks" else x
    batches = Batches(data, pyro_vae.build((4096,), latent=1, network="MLP(hidden=[2])"), 128, seed=0)
    start, most = own(), 0
    for batch in batches.raw(0):
        most = max(most, own() - start)
    print(most)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("order", ["whole", "blocks"])
def test_memory_is_independent_of_the_file(tmp_path, order):
    """1/2 GiB and 2 GiB, both sparse, are gone through with less than 250 MiB, two windows and a batch among them."""
    for gigabytes in (0.5, 2):
        path = tmp_path / f"{gigabytes}.npy"
        np.lib.format.open_memmap(path, "w+", "uint8", (int(gigabytes * 2**18), 4096)).flush()
        command = [sys.executable, "-c", textwrap.dedent(MEMORY), path, order]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < 250, gigabytes


# Files


@pytest.mark.parametrize("name", ["x.npy", "x.zarr"])
def test_load_keeps_a_file_on_disk(tmp_path, images, name):
    path = tmp_path / name
    (mapped if name == "x.npy" else chunked)(path, images)
    on_disk, in_memory = load(path, in_memory=False), load(path)
    for part, other in zip(on_disk, in_memory, strict=True):
        assert isinstance(part, OnDisk)
        assert isinstance(other, InMemory)
        assert part.event_shape == other.event_shape == (1, 4, 4)
        assert is_on_disk(part.x)
        assert (part.rows.diff() > 0).all()
        assert torch.equal(part[:].flatten(1).unique(dim=0), other[:].flatten(1).unique(dim=0))  # in another order
        assert torch.equal(part.loaded()[:], part[:])
    assert on_disk.train.source["in_memory"] is False
    assert in_memory.train.source["in_memory"] is True


@pytest.mark.parametrize("name", ["x.npy", "x.zarr"])
def test_a_file_of_more_than_a_share_of_memory_stays(tmp_path, images, name, monkeypatch):
    path = tmp_path / name
    (mapped if name == "x.npy" else chunked)(path, images)
    monkeypatch.setattr(files, "MEMORY_SHARE", 1e-12)
    assert isinstance(load(path).train, OnDisk)
    assert isinstance(load(path, in_memory=True).train, InMemory)


@pytest.mark.parametrize("share", [0, 1])
def test_the_record_says_where_the_data_were(tmp_path, images, share, monkeypatch):
    """A machine of another size reads them in the same way, as the noise of splits is another on disk."""
    np.save(tmp_path / "x.npy", images)
    monkeypatch.setattr(files, "MEMORY_SHARE", share)
    first = load(tmp_path / "x.npy", binarize="static")
    monkeypatch.setattr(files, "MEMORY_SHARE", 1 - share)
    recorded = first.train.source
    again = load(recorded["data"], binarize="static", in_memory=recorded["in_memory"])
    for part, other in zip(first, again, strict=True):
        assert type(part) is type(other)
        assert torch.equal(part[:], other[:])


def test_the_command_reads_as_the_run_did(tmp_path):
    for in_memory in (True, False):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": "x.npy", "in_memory": in_memory}))
        flag = "--in-memory" if in_memory else "--no-in-memory"
        assert flag in expanded(["fit", "--config", str(tmp_path / "config.yaml")])


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_array_in_a_group(tmp_path, images, in_memory):
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    for name, values in (("images", images), ("kind", np.arange(53)), ("other", np.zeros(2))):
        group.create_array(name, shape=values.shape, dtype=values.dtype)[:] = values
    data = load(tmp_path / "x.zarr", labels="kind", in_memory=in_memory).train
    x, y = data[:]
    assert torch.equal(x, InMemory(images)[y][:, None])


@pytest.mark.parametrize("options", [{"binarize": "dynamic"}, {"binarize": "static"}, {"dequantize": 256}])
def test_noise_of_held_out_data_is_each_rows_own(tmp_path, options):
    """Its mean and variance are right within 4 standard errors (false alarms 1e-4), whatever it is read with."""
    levels = np.tile(np.array([0, 51, 153, 255], "uint8"), (5000, 8))
    mapped(tmp_path / "held.npy", levels)
    test = load(tmp_path / "held.npy", in_memory=False, **options).test
    drawn = test[:]
    assert torch.equal(test[torch.tensor([70, 3])], drawn[[70, 3]])
    assert torch.equal(test.select(slice(9, None))[:], drawn[9:])
    columns = drawn.double().reshape(-1, 4)
    p = torch.tensor([0.0, 0.2, 0.6, 1.0], dtype=torch.float64)
    noise = columns - p if "binarize" in options else columns * 256 - p * 255 - 0.5
    variance = p * (1 - p) if "binarize" in options else torch.full((4,), 1 / 12, dtype=torch.float64)
    error = (variance / len(columns)).sqrt()
    assert (noise.mean(0).abs() <= 4 * error + 1e-6).all()
    assert torch.allclose(noise.var(0), variance, atol=0.01)
    neighbours = torch.corrcoef(drawn.double()[:, [1, 2, 5, 6, 9]].T) - torch.eye(5)
    assert neighbours.abs().max() < 4.5 / len(drawn) ** 0.5
    rows = np.arange(9)
    assert not np.array_equal(disk._noise(rows, 4, seed=0), disk._noise(rows, 4, seed=1))


def test_training_data_are_drawn_anew(store):
    data = OnDisk(store(np.full((40, 16), 128, "uint8")), binarize="dynamic")
    assert not torch.equal(data[:], data[:])
    assert torch.equal(OnDisk(store(np.full((4, 2), 200, "uint8"), "b"), binarize="threshold")[:], torch.ones(4, 2))


def test_the_command_on_a_file_that_stays(tmp_path, monkeypatch, images, capfd):
    mapped(tmp_path / "x.npy", images)
    monkeypatch.chdir(tmp_path)
    shape = ["--network", "MLP(hidden=[4])", "--latent", "2", "--num-particles", "5", "--out", "run"]
    with pytest.raises(SystemExit) as caught:
        cli.main(
            [
                "fit",
                "--data",
                "x.npy",
                "--epochs",
                "1",
                "--batch-size",
                "9",
                "--no-in-memory",
                "--num-workers",
                "2",
                *shape,
            ]
        )
    assert not caught.value.code, capfd.readouterr().err
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["in_memory"], config["num_workers"], config["binarize"]) == (False, 2, "dynamic")
    before = capfd.readouterr().out
    for arguments in (
        ["evaluate", "run", "--num-particles", "5"],
        ["fit", "--resume", "--out", "run", "--num-particles", "5"],
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert not caught.value.code, capfd.readouterr().err
        row = [line for line in before.splitlines() if "±" in line]
        assert row == [line for line in capfd.readouterr().out.splitlines() if "±" in line]


# Errors


@pytest.mark.parametrize(("bad", "options", "message"), [
    ({40: np.nan}, {}, "finite values, got NaN or infinity in datum 40"),
    ({40: 7}, {"binarize": "dynamic"}, "expected values in .0, 1., got values from 0 to 7"),
    ({40: 0.3}, {"dequantize": 256}, "expected values on the grid"),
])  # fmt: skip
def test_what_does_not_suit_raises_when_it_is_read(store, bad, options, message):
    x = np.zeros((53, 4, 4), "float32")
    for row, value in bad.items():
        x[row, 0, 0] = value
    batches = Batches(OnDisk(store(x), **options), make(), 10, seed=None)
    with pytest.raises(ValueError, match=message):
        list(batches.epoch(0))
    assert not left_behind()


def test_grey_after_zeros_and_ones(store, monkeypatch, zeros_and_ones):
    monkeypatch.setattr(disk, "_LOOKED_AT", 5)  # data 0, 13, 26, 39 and 52
    zeros_and_ones[40] = 255
    with pytest.raises(ValueError, match="expected 0 and 1, as in 5 data looked at, got 255"):
        list(Batches(store(zeros_and_ones), make(), 10).epoch(0))


ONES = np.ones((400, 4), "float32")


def with_bad(x, value):
    """Data that do not suit far behind the first batch, and between those that are looked at."""
    x = x.copy()
    x[333] = value
    return x


@pytest.mark.parametrize(("likelihood", "x", "message"), [
    ("Bernoulli()", with_bad(ONES, 5), "support of the Bernoulli likelihood .*from 1 to 5"),
    ("Bernoulli()", with_bad(ONES, 0.5), "expected 0 and 1, as in the data looked at first, got 0.5; binarize"),
    ("Poisson()", with_bad(ONES, -2), "support of the Poisson likelihood .*from -2 to 1; .*Gaussian"),
    ("Poisson()", with_bad(ONES.astype("int8"), -2), "support of the Poisson likelihood"),
    ("Binomial(total_count=9)", with_bad(ONES, 10), "support of the Binomial likelihood .*from 1 to 10"),
    ("DiscretizedLogistic()", with_bad(ONES, 0.51), "support of the DiscretizedLogistic likelihood"),
    ("Heterogeneous({('a', 'b'): Gaussian, ('c', 'd'): LogNormal})", with_bad(ONES, -1), "x.c_d: .* LogNormal"),
    ("Gaussian()", with_bad(ONES, -7), None),
    ("Heterogeneous({('a', 'b'): Gaussian, ('c', 'd'): LogNormal})", with_bad(ONES, (-1, -1, 1, 1)), None),
])  # fmt: skip
def test_values_that_do_not_suit_the_program_raise_when_they_are_read(store, likelihood, x, message):
    """In any epoch's order, and in parts, as what is read at once is many times as large as floats."""
    vae = pyro_vae.build((4,), latent=2, network="MLP(hidden=[4])", likelihood=likelihood)
    options = {"epochs": 1, "batch_size": 20, "seed": 0, "progress": False}
    data = store(x)
    if message is None:
        assert len(fit(vae, data, **options).history) == 1
        return
    with pytest.raises(ValueError, match=message) as caught:
        fit(vae, data, **options)
    assert "\n" not in str(caught.value)
    batches = Batches(OnDisk(data, window=7), vae, 20)
    check(vae, batches)
    with pytest.raises(ValueError, match=message):
        list(batches.epoch(0))
    assert not left_behind()


def test_values_are_tested_until_all_were_read(store, monkeypatch):
    monkeypatch.setattr(checks, "_AT_ONCE", 100)
    vae = pyro_vae.build((4,), latent=2, network="MLP(hidden=[4])")
    batches = Batches(store(with_bad(ONES, 2)), vae, 20, seed=0)
    check(vae, batches)
    for _ in range(2):
        with pytest.raises(ValueError, match="support of the Bernoulli"):
            list(batches.epoch(0))
    batches = Batches(store(ONES, "good"), vae, 20, seed=0)
    check(vae, batches)
    assert len(list(batches.epoch(0, skip=1))) == 19
    assert batches.tests
    assert len(list(batches.epoch(0))) == 20
    assert not batches.tests


def test_noise_and_bounds_of_a_batch_are_no_matter_of_the_file(store):
    """What is binarized is 0 and 1 as it is served; bounds that differ from value to value hold for their batch."""
    vae = pyro_vae.build((4,), latent=2, network="MLP(hidden=[4])")
    x = with_bad(ONES, 0.5)
    for data in (OnDisk(store(x), binarize="dynamic"), OnDisk(store(x, "b"), binarize="dynamic").frozen(0)):
        fit(vae, data, epochs=1, batch_size=20, seed=0, progress=False)

    class Bounded(nn.Module):
        def model(self, x):
            with pyro_vae.programs.data_plate(x):
                high = 2 + torch.arange(20.0)[:, None].expand(20, 4)
                pyro.sample("x", dist.Uniform(-1.0, high).to_event(1), obs=x)

        def guide(self, x): ...

    batches = Batches(store(with_bad(ONES, 30), "c"), Bounded(), 20)
    check(Bounded(), batches)
    assert not batches.tests


def test_grey_values_that_were_looked_at_are_warned_of(store):
    x = ONES.copy()
    x[-1] = 0.5
    vae = pyro_vae.build((4,), latent=2, network="MLP(hidden=[4])")
    with pytest.warns(UserWarning, match="grey values under a Bernoulli") as caught:
        fit(vae, store(x), epochs=1, batch_size=20, seed=0, progress=False)
    assert [warning.filename for warning in caught] == [__file__]


def test_exposures_are_checked_as_they_are_read(store):
    vae = pyro_vae.build((4,), latent=2, network="MLP(hidden=[4])", likelihood="Poisson(exposure=True)")
    with pytest.raises(ValueError, match="exposure: expected values above 0, got -1"):
        fit(vae, (store(ONES), with_bad(ONES[:, 0], -1)), epochs=1, batch_size=20, seed=0, progress=False)


def test_parts_that_are_loaded_are_read_as_the_whole(store, images):
    images[:3] = 1
    images[4] = 200
    data = OnDisk(store(images)).select(slice(3))
    assert torch.equal(data.loaded()[:], torch.full((3, 4, 4), 1 / 255))
    assert torch.equal(data.loaded()[:], data[:])


class Scalars(nn.Module):
    """A program of data without dimensions."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def model(self, x):
        with pyro_vae.programs.data_plate(x):
            pyro.sample("x", dist.Normal(self.loc.expand(len(x)), 1.0), obs=x)

    def guide(self, x): ...


def test_data_without_dimensions(store):
    x = np.linspace(-1, 1, 50).astype("float32")
    first, second = Scalars(), Scalars()
    fit(first, store(x), epochs=1, **QUIET)
    fit(second, x, epochs=1, **QUIET)
    assert equal(first, second)
    with pytest.raises(ValueError, match="NaN or infinity in datum 3"):
        OnDisk(store(np.array([0, 1, 2, np.nan]), "bad"))[3]


def test_a_seed_below_zero(store):
    data = OnDisk(store(np.full((40, 9), 0.5, "float32")), binarize="static", seed=-1)
    assert torch.equal(data[:], data[:])
    assert 0.3 < data[:].mean() < 0.7


@pytest.mark.parametrize("window", [0, -3, 1.5])
def test_a_window_is_checked(store, window):
    with pytest.raises(ValueError, match=f"window: expected a whole number of data, 1 or more, got {window}"):
        OnDisk(store(ONES), window=window)


@pytest.mark.parametrize(("arguments", "message"), [
    ((np.zeros((0, 2)),), "at least one datum"),
    ((np.array(["a", "b"]),), "array of numbers"),
    ((np.zeros((3, 2)), np.zeros(4)), "3 labels, one a datum, got 4"),
    ((np.zeros((3, 2)), None, "often"), "expected one of dynamic"),
])  # fmt: skip
def test_arrays_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        OnDisk(*arguments)


def test_a_loader_without_batches_is_refused():
    loader = DataLoader(TensorDataset(torch.ones(3, 4)), batch_size=4, drop_last=True)
    with pytest.raises(ValueError, match=r"expected at least one batch of 3 data, got none \(is drop_last on\?\)"):
        Batches(loader, pyro_vae.build((4,), latent=2), batch_size=4)


def test_data_say_what_they_are(store):
    assert repr(InMemory(ONES)) == "InMemory(400 data of shape (4,), torch.float32)"
    assert repr(OnDisk(store(ONES))) == "OnDisk(400 data of shape (4,), float32)"


def test_files_that_are_refused(tmp_path, images):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n3,4\n")
    for name in (tmp_path / "x.csv", "digits", "mnist"):
        with pytest.raises(ValueError, match=f"in_memory=False: expected a .npy or .zarr file, got {Path(name).name}"):
            load(name, in_memory=False)
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(ValueError, match="no array"):
        load(tmp_path / "empty.zarr")
    with pytest.raises(ValueError, match="no such file"):
        load(tmp_path / "missing.zarr")
    chunked(tmp_path / "x.zarr", images)
    with pytest.raises(ValueError, match="got a store of one array"):
        load(tmp_path / "x.zarr", labels="y")


def test_without_zarr(tmp_path, images, monkeypatch):
    chunked(tmp_path / "x.zarr", images)
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ValueError, match=r"needs zarr: pip install 'pyro-vae\[zarr\]'"):
        load(tmp_path / "x.zarr")


# Data sets and their workers


class Grey(Dataset):
    """Data that say which process read them."""

    def __init__(self, x, bad=None):
        self.x, self.bad = torch.as_tensor(x), bad

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        if i == self.bad:
            raise RuntimeError(f"datum {i} is broken")
        return self.x[i], os.getpid()


class Stream(IterableDataset):
    def __init__(self, x, length):
        self.x, self.length = torch.as_tensor(x), length

    def __len__(self):
        return self.length

    def __iter__(self):
        assert get_worker_info() is None or get_worker_info().num_workers == 1  # others would read the same again
        return iter(self.x)


def test_workers_give_the_same_order_and_stay(zeros_and_ones):
    wanted = Batches((zeros_and_ones, np.arange(53)), Conditional(), 10, seed=4)
    batches = Batches(Grey(zeros_and_ones.astype("float32")), Conditional(), 10, seed=4, num_workers=2)
    readers = []
    for epoch, skip in ((0, 0), (1, 3)):
        got = list(batches.epoch(epoch, skip))
        assert same([(x,) for x, _ in got], [(x,) for x, _ in wanted.epoch(epoch, skip)])
        readers.append({int(i) for _, pids in got for i in pids})
    assert readers[0] == readers[1]
    assert len(readers[0]) == 2
    assert os.getpid() not in readers[0]
    del got
    batches.close()
    assert not left_behind()


def test_fit_with_workers_is_fit_without(zeros_and_ones):
    data = Grey(zeros_and_ones.astype("float32"))
    first, second = make(), make()
    fit(first, data, epochs=2, num_workers=2, **QUIET)
    fit(second, data, epochs=2, **QUIET)
    assert equal(first, second)
    assert not left_behind()


def test_an_error_of_a_worker_comes_through(zeros_and_ones):
    with pytest.raises(RuntimeError) as caught:
        fit(make(), Grey(zeros_and_ones.astype("float32"), bad=52), num_workers=1, **QUIET)
    assert str(caught.value) == "data: worker: RuntimeError: datum 52 is broken"
    assert "in __getitem__" in caught.value.__notes__[0]
    assert not left_behind()


class OwnError(LookupError):
    """An error that wants two arguments."""

    def __init__(self, name, place):
        super().__init__(f"{name} at\n{place}")


ERRORS = [
    (FileNotFoundError("no x.png"), FileNotFoundError, "FileNotFoundError: no x.png"),
    (OwnError("x", 3), LookupError, "OwnError: x at 3"),
    (UnicodeDecodeError("utf8", b"x", 0, 1, "bad"), RuntimeError, "UnicodeDecodeError: 'utf8' codec .*: bad"),
]


class Failing(IterableDataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 20

    def __iter__(self):
        yield from torch.zeros(8, 4, 4)
        raise self.error


class Ragged(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.zeros(4, 4 + (i == 13))


@pytest.mark.parametrize(("error", "kind", "message"), ERRORS)
def test_an_error_of_a_worker_keeps_its_type(error, kind, message):
    batches = Batches(Failing(error), make(), 5, num_workers=1)
    with pytest.raises(kind) as caught:
        list(batches.epoch(0))
    batches.close()
    assert re.fullmatch(f"data: worker: {message}", str(caught.value))
    with pytest.raises(type(error)) as caught:
        list(Batches(Failing(error), make(), 5).epoch(0))
    assert caught.value is error


def test_data_of_several_shapes_in_a_worker():
    batches = Batches(Ragged(), make(), 5, num_workers=1)
    with pytest.raises(RuntimeError, match="^data: worker: RuntimeError: stack expects each tensor to be equal size"):
        list(batches.epoch(0))
    batches.close()


class Drawing(Dataset):
    """Data with noise of torch, NumPy and Python."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.tensor([i, torch.rand(()), np.random.rand(), random.random()])


class DrawingStream(IterableDataset):
    def __len__(self):
        return 20

    def __iter__(self):
        return (Drawing()[i] for i in range(20))


@pytest.mark.parametrize("data", [Drawing(), DrawingStream()])
def test_draws_are_a_function_of_seed_and_epoch(data):
    """Whatever was drawn or read before, whoever reads, and whatever is skipped; those outside go on as they would."""
    program = pyro_vae.build((4,), latent=2)
    batches = Batches(data, program, 8, seed=3, num_workers=1)
    wanted = [list(batches.epoch(epoch)) for epoch in (0, 1)]
    assert not any(torch.equal(a, b) for (a,), (b,) in zip(*[[[x[:, 1:]] for (x,) in e] for e in wanted], strict=True))
    assert len(torch.cat([x[:, 1:] for (x,) in wanted[0]]).unique()) == 60
    assert same(batches.epoch(1), wanted[1])
    assert same(batches.epoch(1, skip=2), wanted[1][2:])
    batches.close()
    assert same(batches.epoch(1), wanted[1])
    batches.close()
    assert not same(Batches(data, program, 8, seed=4).epoch(1), wanted[1])
    if isinstance(data, IterableDataset):
        return
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert same(Batches(data, program, 8, seed=3).epoch(1, skip=1), wanted[1][1:])
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
    first, second = (list(Batches(data, program, 8).epoch(0)) for _ in range(2))  # an evaluation draws as it is seeded
    assert not same(first, second)


def test_a_run_directory_changes_nothing(tmp_path):
    """A program that draws gets the same data, and a stream is looked at once before the first step."""
    looks = []

    class Counted(Stream):
        def __iter__(self):
            looks.append(1)
            return super().__iter__()

    histories = []
    for out in (None, tmp_path / "run"):
        looks.clear()
        vae = pyro_vae.build((4,), latent=2, network="MLP(hidden=[4])", likelihood="Gaussian()")
        torch.manual_seed(0)
        for parameter in vae.parameters():
            nn.init.normal_(parameter, std=0.1)
        fit(vae, Counted(torch.ones(20, 4), 20), epochs=1, out=out, **QUIET)
        assert len(looks) == 2
        histories.append(fit(vae, Drawing(), epochs=2, num_workers=1, out=out, overwrite=True, **QUIET).history.loss)
    assert histories[0].tolist() == histories[1].tolist()
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["recorded"]["event_shape"] == [4]


class Shuffled(Sampler):
    """An order that is drawn as it is asked for, by Python and NumPy."""

    def __len__(self):
        return 20

    def __iter__(self):
        left = list(range(20))
        while left:
            draw = random.randrange if len(left) % 2 else np.random.randint
            yield left.pop(draw(len(left)))


def test_processes_draw_the_same_order_of_a_loader():
    shares = []
    for rank in (0, 1):
        loader = DataLoader(TensorDataset(torch.arange(20.0)[:, None]), batch_size=5, sampler=Shuffled())
        batches = Batches(loader, pyro_vae.build((1,), latent=1), 5, seed=0)
        batches.rank, batches.count = rank, 2
        for state in (random.seed, np.random.seed, torch.manual_seed):
            state(rank)
        before = random.getstate(), np.random.get_state()[1].copy()
        epoch = [[x.flatten() for (x,) in batches.epoch(number)] for number in (0, 1)]
        assert (random.getstate(), np.random.get_state()[1].tolist()) == (before[0], before[1].tolist())
        assert same(batches.epoch(1, skip=2), [(x[:, None],) for x in epoch[1][2:]])
        shares.append([torch.cat(parts) for parts in epoch])
    for number in (0, 1):
        assert torch.cat([shares[0][number], shares[1][number]]).sort().values.tolist() == list(range(20))
    assert not torch.equal(shares[0][0], shares[0][1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_is_one_pass(zeros_and_ones, num_workers):
    x = zeros_and_ones.astype("float32")
    for length in (53, 30):  # one that goes on after its length is cut there
        batches = Batches(Stream(x, length), make(), 8, seed=0, num_workers=num_workers)
        wanted = list(Batches(x[: -(-length // 8) * 8], make(), 8).epoch(0))
        assert len(batches) == len(wanted)
        for epoch in (0, 1):
            assert same(batches.epoch(epoch), wanted)
        assert same(batches.epoch(1, skip=2), wanted[2:])
    batches.close()
    assert not left_behind()


@pytest.mark.parametrize("loader", [False, True])
def test_a_stream_shorter_than_its_length_says(zeros_and_ones, loader):
    stream = Stream(zeros_and_ones.astype("float32"), 100)
    with pytest.raises(ValueError, match="expected 20 batches in an epoch, as its length says, got 9 fewer"):
        fit(make(), DataLoader(stream, batch_size=5) if loader else stream, **QUIET)


def test_a_stream_without_length():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(torch.zeros(4, 4, 4))

    for data in (Endless(), DataLoader(Endless(), batch_size=2)):
        with pytest.raises(ValueError, match="data: expected a length, as steps are counted in advance .*__len__"):
            Batches(data, make(), 2)


@pytest.mark.parametrize("num_workers", [-1, None, 1.5, "2", True])
def test_a_number_of_workers_is_checked(zeros_and_ones, num_workers):
    message = f"num_workers: expected a whole number, 0 or more, got {num_workers!r}"
    with pytest.raises(ValueError, match=message):
        fit(make(), zeros_and_ones, num_workers=num_workers, **QUIET)
    with pytest.raises(ValueError, match=message):
        Batches(zeros_and_ones, make(), 5, num_workers=num_workers)


@pytest.mark.parametrize(("given", "message"), [
    ([], "expected tensors in a batch, got none"),
    (torch.tensor(1.0), "expected tensors in a batch of one row a datum, got one without dimensions"),
])  # fmt: skip
def test_batches_of_a_loader_are_checked(given, message):
    loader = DataLoader(TensorDataset(torch.rand(20, 4, 4)), batch_size=5, collate_fn=lambda _: given)
    with pytest.raises(ValueError, match=message):
        fit(make(), loader, **QUIET)


# Interrupted and resumed


@pytest.mark.parametrize("kind", ["map", "workers"])
def test_ctrl_c_within_an_epoch_and_on(tmp_path, zeros_and_ones, kind):
    """Ctrl-C reaches the workers too, which go on until the step is done; the resumed run is the uninterrupted one."""
    x = zeros_and_ones.astype("float32")
    data = mapped(tmp_path / "x.npy", x) if kind == "map" else Grey(x)
    options = {**QUIET, "epochs": 3, "num_workers": 2}
    straight, resumed = make(), make()
    fit(straight, data, **options)
    take = Training._take

    def taken(self, epoch, batch):
        if self.step == 14:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return take(self, epoch, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_take", taken)
        with pytest.raises(KeyboardInterrupt):
            fit(resumed, data, out=tmp_path / "run", **options)
        assert not left_behind()
    fit(resumed, data, out=tmp_path / "run", resume=True, **options)
    assert equal(straight, resumed)


def test_workers_outlive_an_interrupt_of_the_terminal(zeros_and_ones):
    batches = Batches(Grey(zeros_and_ones.astype("float32")), make(), 5, seed=0, num_workers=2)
    got = []
    for batch in batches.epoch(0):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)
        got.append(batch)
    assert len(got) == len(batches)
