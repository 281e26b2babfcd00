"""Loading, splits, binarization, batches and checks."""

import struct
import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyro_vae
from pyro_vae.data import Batches, InMemory, as_source, check, decode, load, to_float
from pyro_vae.data.loading import _split


@pytest.fixture
def vae():
    return pyro_vae.build((8, 8), latent=2)


def test_digits(digits):
    assert [len(split) for split in digits] == [1258, 180, 359]
    assert digits.train.event_shape == (1, 8, 8)
    again = load("digits", binarize="dynamic")
    assert torch.equal(again.train.x, digits.train.x)
    assert not torch.equal(load("digits", binarize="dynamic", seed=1).train.x, digits.train.x)
    # The splits share no datum and lose none.
    rows = torch.cat([split.x.flatten(1) for split in load("digits")])
    from sklearn.datasets import load_digits

    expected = torch.as_tensor(load_digits().data, dtype=torch.float32) / 16
    assert torch.equal(torch.sort(rows @ torch.arange(64.0))[0], torch.sort(expected @ torch.arange(64.0))[0])


def test_dynamic_binarization_is_redrawn_for_training_and_fixed_for_testing(digits):
    everything = list(range(100))
    assert not torch.equal(digits.train[everything][0], digits.train[everything][0])
    assert torch.equal(digits.test[everything][0], digits.test[everything][0])
    assert torch.equal(digits.test.x, load("digits", binarize="dynamic").test.x)
    assert not torch.equal(digits.test.x, load("digits", binarize="dynamic", seed=3).test.x)


def test_binarization_draws_with_the_grey_values_as_probabilities():
    """40,000 draws a level; false alarm 3e-4 for 5 levels at 4 standard errors, seed 0."""
    levels = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    x = levels.expand(40_000, 5)
    dynamic = InMemory(x, binarize="dynamic")[torch.arange(40_000)]
    static = InMemory(x, binarize="static")[torch.arange(40_000)]
    error = 4 * (levels * (1 - levels) / 40_000).sqrt() + 1e-9
    for drawn in (dynamic, static):
        assert ((drawn.mean(0) - levels).abs() <= error).all()
    assert InMemory(x, binarize="threshold")[torch.tensor([0])].tolist() == [[0.0, 0.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize("bins", [2, 17, 255, 256, 512])
@pytest.mark.parametrize("cell", [0, 2**14 - 1])
def test_dequantized_values_stay_in_their_cells(bins, cell, monkeypatch):
    """The extreme draws of the noise, at every level, in float32: strictly inside (0, 1) and the level's own cell."""
    monkeypatch.setattr(torch, "randint", lambda high, shape, **_: torch.full(shape, cell if high == 2**14 else high))
    levels = torch.arange(bins)
    y = InMemory(levels[:, None] / (bins - 1), dequantize=bins)[levels][:, 0]
    assert y.dtype == torch.float32
    assert y.min() > 0
    assert y.max() < 1
    noise = y.double() * bins - levels
    # Division by `bins` rounds, unless it is a power of two; half a unit in the last place of y, `bins` times.
    assert (noise - (cell + 0.5) / 2**14).abs().max() <= (0 if bins in (2, 256, 512) else bins * 2**-25)


def test_dequantization_noise_is_uniform():
    """Mean and variance of 100,000 draws at 3 levels; false alarm 4e-4 for 6 figures at 4 standard errors, seed 0."""
    n, levels = 100_000, torch.tensor([0.0, 3.0, 7.0])
    data = InMemory((levels / 7).expand(n, 3), dequantize=8)
    for y in (data[:], data.frozen(seed=5)[:]):
        noise = y.double() * 8 - levels
        assert ((noise.mean(0) - 1 / 2).abs() <= 4 * (1 / 12 / n) ** 0.5).all()
        assert ((noise.var(0) - 1 / 12).abs() <= 4 * (1 / 180 / n) ** 0.5).all()


def test_dequantization_is_redrawn_for_training_and_fixed_for_testing():
    splits, again = (load("digits", dequantize=17) for _ in range(2))
    other = load("digits", dequantize=17, seed=3)
    grey = load("digits")
    everything = list(range(100))
    assert not torch.equal(splits.train[everything][0], splits.train[everything][0])
    for part in ("valid", "test"):
        held = getattr(splits, part)
        assert held.dequantize == 17
        assert torch.equal(held[everything][0], held[everything][0])
        assert torch.equal(held.x, getattr(again, part).x)
        assert not torch.equal(held.x, getattr(other, part).x)
        torch.testing.assert_close((held.x * 17).floor() / 16, getattr(grey, part).x)
    noise = [part.x[:100] * 17 % 1 for part in (splits.valid, splits.test)]
    assert not torch.equal(*noise)
    assert splits.train.source["dequantize"] == 17
    assert InMemory(torch.ones(2, 2), dequantize=2).grey


def test_dequantization_of_compact_dtypes():
    images = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    data = InMemory(images, dequantize=256)
    assert data.x.dtype == torch.uint8
    assert torch.equal((data[:] * 256).floor(), images.float())
    assert torch.equal(InMemory(images > 100, dequantize=2)[:] > 0.5, images > 100)
    assert InMemory(torch.ones(2, 2, dtype=torch.float64), dequantize=256)[:].dtype == torch.float64
    assert InMemory(torch.ones(500, 2, dtype=torch.float16), dequantize=256)[:].max() < 1


@pytest.mark.parametrize(("x", "options", "message"), [
    (torch.tensor([[0.0, 0.5]]), {"dequantize": 256}, r"on the grid i / 255 in \[0, 1\], got 0.5"),
    (torch.tensor([[0.0, 2.0]]), {"dequantize": 2}, "got 2"),
    (torch.tensor([[0.0, -1.0]]), {"dequantize": 2}, "got -1"),
    (torch.ones(2, 2), {"dequantize": 1}, "2 to 512 grey levels, got 1"),
    (torch.ones(2, 2), {"dequantize": 513}, "2 to 512 grey levels, got 513"),
    (torch.ones(2, 2), {"dequantize": 2, "binarize": "static"}, "one of binarize and dequantize"),
])  # fmt: skip
def test_bad_dequantization(x, options, message):
    with pytest.raises(ValueError, match=message):
        InMemory(x, **options)


def test_what_is_asked_is_checked_before_anything_is_loaded():
    for options in ({"binarize": "often"}, {"dequantize": 2, "binarize": "dynamic"}):
        with pytest.raises(ValueError, match="expected one of .*binar|binarize: expected"):
            load("none.npy", **options)
    InMemory(torch.ones(2, 2), binarize="none", dequantize=2)


@pytest.fixture
def people():
    size = pd.Categorical(["s", "l", "s", "m"] * 5, categories=["s", "m", "l"])
    return pd.DataFrame({
        "age": range(20), "name": ["bo", "al", "cy", "al"] * 5, "size": size, "tall": [True, False] * 10,
        "mixed": pd.Series([1, 2] * 10, dtype=object),
    }).astype({"name": "category"})  # fmt: skip


def test_text_is_coded_with_a_warning_since_another_table_may_differ(people):
    with pytest.warns(UserWarning, match="text in name is coded .*astype"):
        data = InMemory(people.astype({"name": "str"}))
    assert torch.equal(data.x, InMemory(people).x)


def test_tables_are_encoded(people):
    data = InMemory(people)
    assert data.columns == ("age", "name", "size", "tall", "mixed")
    assert data.categories == {"name": ("al", "bo", "cy"), "size": ("s", "m", "l")}
    assert data.x.dtype == torch.float64
    assert data.x[:4].tolist() == [[0, 1, 0, 1, 1], [1, 0, 2, 0, 2], [2, 2, 0, 1, 1], [3, 0, 1, 0, 2]]
    assert InMemory(torch.zeros(3, 2)).columns is None
    assert InMemory(torch.zeros(3, 2)).categories == {}
    back = decode(data.x, data.columns, data.categories)
    for name in ("age", "name", "size", "mixed"):
        assert back[name].tolist() == people[name].tolist()
    assert decode(data.x + 0.5, data.columns, {}).age[0] == 0.5


def test_tables_as_sources_moved_split_and_selected(people):
    data = as_source((people, np.arange(20)))
    assert as_source(people).columns == data.columns
    for same in (
        data.to(torch.device("cpu")),
        data.select(slice(3)),
        data.select(torch.tensor([1, 2])),
        data.frozen(0),
    ):
        assert (same.columns, same.categories) == (data.columns, data.categories)
    assert torch.equal(data.select(torch.tensor([1, 4])).x, data.x[[1, 4]])
    assert data.select(slice(2)).y.tolist() == [0, 1]


def test_a_table_of_numbers_in_a_compact_dtype_keeps_its_values():
    assert InMemory(pd.DataFrame({"a": np.array([0, 255], dtype=np.uint8)}))[:].tolist() == [[0], [255]]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_files_keep_columns_and_one_code_for_all_splits(tmp_path, suffix):
    # Each split lacks most of the names.
    frame = pd.DataFrame({"age": np.arange(20.0), "name": [f"n{i:02}" for i in range(20)]})
    path = tmp_path / f"people.{suffix}"
    frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
    for split in load(path):
        assert split.columns == ("age", "name")
        assert split.categories == {"name": tuple(frame.name)}
        assert torch.equal(split.x[:, 0], split.x[:, 1])
    splits = load(path, labels="name")
    assert (splits.train.columns, splits.train.categories) == (("age",), {})


@pytest.mark.parametrize(("column", "message"), [
    ([1.0, np.nan], "1 NaN or infinite of 2 in column 'new'"),
    ([1.0, np.inf], "in column 'new'"),
    (pd.array([1, None], dtype="Int64"), "in column 'new'"),
    (pd.Categorical(["a", None]), "in column 'new'"),
    (pd.to_datetime(["2020-01-01", "2020-01-02"]), "text or categories in column 'new', got datetime"),
    ([1j, 2.0], "text or categories in column 'new', got complex"),
])  # fmt: skip
def test_bad_columns(column, message):
    with pytest.raises(ValueError, match=message) as caught:
        InMemory(pd.DataFrame({"old": [1, 2], "new": column}))
    assert "\n" not in str(caught.value)


def test_bad_tables():
    with pytest.raises(ValueError, match="distinct names, got 'a' twice"):
        InMemory(pd.DataFrame([[1, 2]], columns=["a", "a"]))
    for empty in (pd.DataFrame(), pd.DataFrame({"a": []})):
        with pytest.raises(ValueError, match="at least one datum"):
            InMemory(empty)
    with pytest.raises(ValueError, match=r"shape \(\*, 2\), one a column, got \(3, 1\)"):
        decode(torch.zeros(3, 1), ("a", "b"), {})
    for code in (-1.0, 0.5, 2.0):
        with pytest.raises(ValueError, match=f"a: expected codes 0 to 1, got {code:g}"):
            decode([[code]], ("a",), {"a": ("x", "y")})


def test_compact_dtypes_are_kept_and_served_as_floats():
    assert InMemory(np.array([[0, 51, 255]], dtype=np.uint8)).x.dtype == torch.uint8
    assert InMemory(np.array([[0, 51, 255]], dtype=np.uint8))[0].tolist() == pytest.approx([0, 0.2, 1])
    assert InMemory([[True, False]])[0].tolist() == [1, 0]
    assert InMemory(np.array([[3, 7]], dtype=np.int64))[0].tolist() == [3, 7]
    assert InMemory(np.array([[3, 70_000]], dtype=np.uint32))[0].tolist() == [3, 70_000]
    assert InMemory(np.array([[1.5]], dtype=">f8"))[0].dtype == torch.float64
    assert to_float(torch.tensor([1.0]), torch.float64).dtype == torch.float64
    readonly = np.zeros((2, 2))
    readonly.flags.writeable = False
    assert len(InMemory(readonly)) == 2


def test_float64_is_not_rounded_on_the_way(vae):
    x = torch.rand(4, 8, 8, dtype=torch.float64)
    (batch,) = next(Batches(x, vae.double(), 4).epoch(0))
    assert torch.equal(batch, x)


def test_mnist(mnist_root):
    splits = load("mnist", root=mnist_root, binarize="dynamic")
    assert (len(splits.train), splits.valid, len(splits.test)) == (60_000, None, 10_000)
    assert (splits.train.x.dtype, splits.train.event_shape) == (torch.uint8, (1, 28, 28))
    assert splits.train.y[:5].tolist() == [5, 0, 4, 1, 9]
    assert len(load("mnist", root=mnist_root, valid=10_000).train) == 50_000


def write_idx(folder, name, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    (folder / name).write_bytes(header + array.tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_torchvision_layout(tmp_path, name, folder):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        write_idx(raw, f"{part}-images-idx3-ubyte", images)
        write_idx(raw, f"{part}-labels-idx1-ubyte", np.arange(7, dtype=np.uint8))
    splits = load(name, root=tmp_path)
    assert np.array_equal(splits.test.x[:, 0].numpy(), images)
    assert splits.train.y.tolist() == list(range(7))


def test_missing_data_set_names_files_and_folder(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    def offline(self):
        (tmp_path / "none" / "MNIST" / "raw").mkdir(parents=True)
        raise RuntimeError("no network\nat all")

    monkeypatch.setattr(MNIST, "download", offline)
    with pytest.raises(ValueError, match=r"MNIST.raw \(files train-images-idx3-ubyte.*--data-root"):
        load("mnist", root=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_files(tmp_path):
    x = np.random.default_rng(0).random((20, 6, 5))
    np.savetxt(tmp_path / "bare.csv", x.reshape(20, 30), delimiter=",")
    assert sum(len(split) for split in load(tmp_path / "bare.csv")) == 20
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "a.npz", images=x, labels=np.arange(20))
    np.savez(tmp_path / "one.npz", anything=x)
    frame = pd.DataFrame(x.reshape(20, 30), columns=[f"c{i}" for i in range(30)]).assign(kind=["a", "b"] * 10)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    for name in ("a.npy", "a.npz", "one.npz"):
        splits = load(tmp_path / name)
        assert [len(split) for split in splits] == [14, 2, 4]
        assert splits.train.event_shape == (1, 6, 5)
    labelled = load(tmp_path / "a.npz").train
    assert np.array_equal(labelled.x[:, 0].numpy(), x[labelled.y.numpy()])
    for name in ("a.csv", "a.parquet"):
        table = load(tmp_path / name, labels="kind", valid=0, test=5)
        assert (table.train.event_shape, table.valid, len(table.test)) == ((30,), None, 5)
        assert set(table.train.y.tolist()) == {0, 1}


@pytest.mark.parametrize(("name", "content", "message"), [
    ("no.npy", None, "no such file"),
    ("bad.npy", b"hello", "holds no array"),
    ("bad.npz", b"hello", "holds no array"),
    ("bad.csv", b"", "holds no array"),
    ("bad.csv", b"\xff\x00\x80", "holds no array"),
    ("bad.csv", b"a,b\n1,2\nx,3\n", "train and test data"),
    ("bad.parquet", b"hello", "holds no array"),
    ("bad.txt", b"hello", "ending in .npy, .npz, .csv, .parquet"),
])  # fmt: skip
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_bad_arrays(tmp_path):
    np.save(tmp_path / "text.npy", np.array(["a"] * 20))
    np.save(tmp_path / "pickled.npy", np.array([{}] * 20), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    np.save(tmp_path / "nan.npy", np.full((20, 3), np.nan))
    np.save(tmp_path / "empty.npy", np.zeros((0, 3)))
    np.save(tmp_path / "three.npy", np.zeros((3, 3)))
    for name, message in {
        "text": "array of numbers",
        "pickled": "pickled objects",
        "two": "got a, b",
        "nan": "finite values",
        "empty": "at least one datum",
    }.items():
        suffix = "npz" if name == "two" else "npy"
        with pytest.raises(ValueError, match=message):
            load(tmp_path / f"{name}.{suffix}")
    with pytest.raises(ValueError, match="train and test data"):
        load(tmp_path / "three.npy", test=2, valid=1)
    for unwanted in ({"binarize": "often"}, {"valid": -1}, {"test": 3000}):
        with pytest.raises(ValueError, match=r"expected .* got"):
            load("digits", **unwanted)
    with pytest.raises(ValueError, match=r"\[0, 1\], got values from 3 to 3"):
        InMemory(torch.full((2, 2), 3.0), binarize="dynamic")
    with pytest.raises(ValueError, match="2 labels"):
        InMemory(torch.zeros(2, 2), torch.zeros(3))


class Pairs(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return torch.full((8, 8), i, dtype=torch.uint8), i


@pytest.mark.parametrize("data", [
    torch.zeros(10, 8, 8),
    np.zeros((10, 8, 8)),
    (torch.zeros(10, 8, 8), torch.arange(10)),
    Pairs(),
    TensorDataset(torch.zeros(10, 8, 8), torch.arange(10)),
    DataLoader(Pairs(), batch_size=4),
    DataLoader(InMemory(torch.zeros(10, 8, 8), torch.arange(10)), batch_size=4),
])  # fmt: skip
def test_batches_of_anything(data, vae):
    batches = Batches(data, vae, batch_size=4, seed=0)
    assert len(batches) == 3
    got = list(batches.epoch(0))
    assert [len(x) for (x,) in got] == [4, 4, 2]  # and the labels, that the program does not take, are gone
    assert all(x.dtype == torch.float32 and x.shape[1:] == (8, 8) and x.max() <= 1 for (x,) in got)
    assert len(list(batches.epoch(0, skip=2))) == 1


@pytest.mark.parametrize("data", [InMemory(torch.arange(100.0)[:, None]), TensorDataset(torch.arange(100.0)[:, None])])
def test_the_order_is_fixed_by_seed_and_epoch(data):
    program = pyro_vae.build((1,), latent=1)

    def order(seed, epoch):
        return torch.cat([x for (x,) in Batches(data, program, 30, seed).epoch(epoch)]).flatten().tolist()

    assert order(None, 3) == list(range(100))
    assert order(0, 3) == order(0, 3)
    assert sorted(order(0, 3)) == list(range(100))
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


def test_a_program_of_two_inputs_gets_the_labels():
    class Conditional(nn.Module):
        def model(self, x, y): ...

        guide = model

    x, y = next(Batches((torch.zeros(4, 2), torch.arange(4)), Conditional(), 4).epoch(0))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(("data", "message"), [
    ("digits", "got str"),
    (torch.zeros(0, 8, 8), "at least one datum"),
    (torch.full((4, 8, 8), torch.inf), "finite values, got 256"),
    (torch.zeros(3, 8, 8), "expected 1 to 3"),
    (np.array(["a"]), "array of numbers"),
    (object(), "array of numbers"),
])  # fmt: skip
def test_bad_data(data, message, vae):
    with pytest.raises(ValueError, match=message):
        Batches(as_source(data), vae, 4)


def test_a_loader_of_something_else(vae):
    loader = DataLoader([{"x": torch.zeros(8, 8)}] * 4, batch_size=2)
    with pytest.raises(ValueError, match="expected tensors in a batch, got dict"):
        next(Batches(loader, vae, 2).epoch(0))


@pytest.mark.parametrize(("x", "message"), [
    (torch.zeros(20, 8, 9), r"event shape \(8, 8\), got \(8, 9\)"),
    (torch.zeros(20, 1, 8, 8), r"event shape \(8, 8\), got \(1, 8, 8\)"),
    (torch.full((20, 8, 8), -1.0), "from -1 to -1; likelihoods that would fit: .*Gaussian"),
    (torch.cat([torch.zeros(19, 8, 8), torch.full((1, 8, 8), 7.0)]), "would fit: .*Gaussian.*Poisson"),
])  # fmt: skip
def test_check_refuses(x, message, vae):
    with pytest.raises(ValueError, match=message):
        check(vae, Batches(x, vae, 10))


def test_check_warns_of_grey_values_once_and_only_then(vae):
    grey, binary = torch.rand(20, 8, 8), torch.rand(20, 8, 8).round()
    grey[:10] = 0  # not to be seen in the first batch
    with pytest.warns(UserWarning, match="grey values under a Bernoulli .* ContinuousBernoulli likelihood") as caught:
        check(vae, Batches(grey, vae, 10))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(vae, Batches(binary, vae, 10))
        check(vae, Batches(InMemory(grey, binarize="dynamic"), vae, 10))


def test_check_sees_the_last_smaller_batch(vae):
    x = torch.zeros(18, 8, 8)
    x[-1] = 7
    with pytest.raises(ValueError, match="would fit: .*Poisson"):
        check(vae, Batches(x, vae, 5))


@pytest.mark.parametrize("dim", [-1, -2])
def test_check_refuses_other_plates(dim):
    class Plates(nn.Module):
        def model(self, x):
            with pyro.plate("data", len(x), dim=-1 if dim == -2 else -2), pyro.plate("pixels", 3, dim=dim):
                pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x.T if dim == -2 else x)

        def guide(self, x): ...

    with pytest.raises(ValueError, match='x: expected the plate "data" at dim=-1 alone'):
        check(Plates(), Batches(torch.zeros(4, 3), Plates(), 4))


def test_the_splits_are_binarized_apart():
    x = torch.full((40, 50), 0.5)
    parts = _split_of(x)
    assert all(part.x.dtype == torch.bool for part in parts)
    assert not torch.equal(parts[0].x, parts[1].x)


def _split_of(x):
    splits = _split(x, None, None, "dynamic", valid=10, test=10)
    held = _split(x, None, (x[:10], None), "dynamic", valid=10)
    assert held.test.x.dtype == torch.bool
    return splits.valid, splits.test


def test_check_of_a_hand_written_program():
    class Broadcasts(nn.Module):
        """Its likelihood is of shape (B, 1), its data of shape (B, 3): Pyro would broadcast."""

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z[:, None], 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x[:, 0], 1.0))

    with pytest.raises(ValueError, match=r"x: expected data of shape \(4, 1\), got \(4, 3\)"):
        check(Broadcasts(), Batches(torch.zeros(4, 3), Broadcasts(), 4))


class Parts(nn.Module):
    """A table of three columns: a number, a pair of positive ones. Samples of them are refused."""

    class NoSample:
        def sample(self, *_):
            raise AssertionError("the data were sampled")

    class Number(NoSample, dist.Normal): ...

    class Positive(NoSample, dist.LogNormal): ...

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0)) * self.weight
            number = self.Number(z[:, None], x.new_ones(()))
            positive = self.Positive(z[:, None].expand(-1, 2), x.new_ones(()))
            pyro.sample("x.number", number.to_event(1), obs=x[:, :1])
            pyro.sample("x.positive", positive.to_event(1), obs=x[:, 1:])

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, 0], 1.0))


def test_check_of_parts_sees_all_data_in_memory():
    x = torch.ones(18, 3)
    x[:, 0] = -1  # which the first part takes
    check(Parts(), Batches(x, Parts(), 5))
    for column in (1, 2):
        bad = x.clone()
        bad[-1, column] = -3  # not in the first batch
        with pytest.raises(
            ValueError, match="x.positive: expected .* the Positive likelihood .* from -3 to 1; .* fit: .*Gaussian"
        ):
            check(Parts(), Batches(bad, Parts(), 5))
        check(Parts(), Batches(TensorDataset(bad), Parts(), 5))  # of a stream only the first batch is seen
        with pytest.raises(ValueError, match="x.positive"):
            check(Parts(), Batches(TensorDataset(bad.flip(0)), Parts(), 5))


def test_check_of_parts_that_are_not_the_next_columns_sees_a_batch():
    class Reordered(Parts):
        def model(self, x):
            super().model(x.roll(1, -1))

    x = torch.ones(18, 3)
    x[:, 2] = -1  # the number, which stands last
    check(Reordered(), Batches(x, Reordered(), 5))


def of_likelihood(likelihood, **attributes):
    program = Parts()
    program.likelihood = likelihood()
    for name, value in attributes.items():
        setattr(program.likelihood, name, value)
    return program


def test_check_of_columns():
    numbers = pd.DataFrame({"a": [-1.0, 1.0], "b": [1, 2], "c": [1, 2]})
    texts = numbers.assign(c=["u", "v"]).assign(b=["w", "w"]).astype({"b": "category", "c": "category"})
    check(of_likelihood(nn.Identity), Batches(numbers, Parts(), 2))
    with pytest.raises(ValueError, match=r"categories in b, c \(a Heterogeneous likelihood .* --labels b"):
        check(of_likelihood(nn.Identity), Batches(texts, Parts(), 2))
    named = of_likelihood(nn.Identity, columns=("a", "b", "c"))
    check(named, Batches(numbers, Parts(), 2))
    check(named, Batches(torch.ones(2, 3), Parts(), 2))  # columns without names are taken at their word
    with pytest.raises(ValueError, match="expected columns a, b, c, got a, c, b"):
        check(named, Batches(numbers[["a", "c", "b"]], Parts(), 2))
    with pytest.raises(ValueError, match="x.positive: .* from 0 to 1"):  # codes from 0: of a part that takes none
        check(named, Batches(texts, Parts(), 2))


class Only(nn.Module):
    """All values under one distribution."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", self.fn.expand(x.shape).to_event(x.ndim - 1), obs=x)

    def guide(self, x): ...


def test_the_ends_of_the_unit_interval_hint_at_dequantization():
    program = Only(dist.LogNormal(0.0, 1.0))
    grey = torch.linspace(0, 1, 17).expand(20, 17)
    with pytest.raises(
        ValueError, match=r"the LogNormal .* from 0 to 1, of which 0 and 1 do not fit: dequantize .*dequantize=256"
    ):
        check(program, Batches(grey, program, 10))
    check(program, Batches(InMemory(grey, dequantize=17), program, 10))
    with pytest.raises(ValueError, match="from 0 to 1.5; likelihoods that would fit"):
        check(program, Batches(grey * 1.5, program, 10))
    program = Only(dist.Poisson(1.0))
    with pytest.raises(ValueError, match="from 0 to 1; likelihoods that would fit"):
        check(program, Batches(grey, program, 10))


def test_likelihoods_that_would_fit_fit_all_data(monkeypatch):
    from torch.distributions import constraints

    from pyro_vae import likelihoods

    class Counts:
        support = constraints.nonnegative_integer

    class Reals:
        support = constraints.real

    class Unsure:
        support = constraints.dependent

    class Property:
        support = property(lambda self: constraints.real)

    found = {"Counts": Counts, "Reals": Reals, "Unsure": Unsure, "Property": Property, "Silent": object}
    for name, known in found.items():
        monkeypatch.setattr(likelihoods, name, known, raising=False)
    monkeypatch.setattr(likelihoods, "__all__", list(found))
    program = Only(dist.Bernoulli(0.5))
    x = torch.full((20, 2), 7.0)
    with pytest.raises(ValueError, match="would fit: Counts, Reals$"):
        check(program, Batches(x, program, 10))
    x[-1] = -0.5  # the counts come first
    with pytest.raises(ValueError, match="from -0.5 to 7; likelihoods that would fit: Reals$"):
        check(program, Batches(x, program, 10))
    monkeypatch.setattr(likelihoods, "__all__", ["Counts"])
    with pytest.raises(ValueError, match="would fit: none$"):
        check(program, Batches(x, program, 10))


def test_bytes_of_zero_and_one_are_zero_and_one():
    x = torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8)
    assert InMemory(x)[:].tolist() == [[0, 1], [1, 1]]
    assert InMemory(2 * x)[:].tolist() == [[0, pytest.approx(2 / 255)], [pytest.approx(2 / 255)] * 2]


def test_a_batch_lacks_the_exposure_that_the_program_takes():
    vae = pyro_vae.build((2,), latent=2, likelihood="Poisson(exposure=True)")
    with pytest.raises(ValueError, match=r"expected 2 tensors in a batch, such as \(x, exposure\), got 1"):
        check(vae, Batches(torch.ones(3, 2), vae, 3))


def test_a_grid_of_another_size_is_named():
    vae = pyro_vae.build((3,), latent=2, likelihood="DiscretizedLogistic()")
    with pytest.raises(ValueError, match="on a grid of bins=5"):
        check(vae, Batches(torch.tensor([[0.0, 0.25, 1.0]]), vae, 1))


def test_exposures_are_checked_with_the_data():
    """In memory all of them, as later steps do without checks of values."""
    vae = pyro_vae.build((4,), latent=2, likelihood="Poisson(exposure=True)")
    x, exposure = torch.ones(5, 4), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="exposure: expected values above 0, got 0"):
        check(vae, Batches((x, exposure), vae, 2))
    check(vae, Batches(TensorDataset(x, exposure), vae, 2))  # of a stream only the first batch is seen
    with pytest.raises(ValueError, match="exposure: expected values above 0, got 0"):
        check(vae, Batches(TensorDataset(x, exposure.flip(0)), vae, 2))
