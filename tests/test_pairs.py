"""The table of what trains together is the one that `examples/reproductions/pairs.py` makes of today's components."""

import csv
import importlib.util
from pathlib import Path

import pytest

from pyro_vae import expressions

ROOT = Path(__file__).parents[1]
SLOTS = ("prior", "posterior", "likelihood")


@pytest.fixture(scope="module")
def pairs():
    spec = importlib.util.spec_from_file_location("pairs", ROOT / "examples/reproductions/pairs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table():
    with (ROOT / "docs/pairs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(pairs):
    return pairs.triples({slot: expressions.names(slot) for slot in SLOTS})


def test_every_two_components_that_fit_have_met(made):
    chosen, refused = made
    fitting = {pair[:2] for pair in chosen}
    assert len(fitting) + len(refused) == len(expressions.names("prior")) * len(expressions.names("posterior"))
    for first, second in (("prior", "likelihood"), ("posterior", "likelihood")):
        met = {(triple[SLOTS.index(first)], triple[SLOTS.index(second)]) for triple in chosen}
        assert len(met) == len(expressions.names(first)) * len(expressions.names(second))


def test_the_table_is_of_todays_components_and_all_trained(made, table):
    chosen, refused = made
    rows = [tuple(row[slot] for slot in SLOTS) for row in table]
    assert sorted(rows) == sorted(chosen + [(*pair, "any") for pair in refused])
    assert not [row for row in table if row["result"] == "failed"]
    reasons = {(row["prior"], row["posterior"]): row["reason"] for row in table if row["likelihood"] == "any"}
    assert reasons == refused
    for slot in SLOTS:  # every component has trained with another
        trained = {row[slot] for row in table if row["result"] == "trained"}
        assert trained == set(expressions.names(slot))


@pytest.mark.slow
def test_one_triple_of_each_likelihood_trains(pairs, made):
    suited = pairs.datasets()
    for likelihood in expressions.names("likelihood"):
        fitting = [triple for triple in made[0] if triple[2] == likelihood and "SemiAmortized" not in triple]
        row = pairs.result(*fitting[len(fitting) // 2], suited[likelihood], 150)
        assert row["result"] == "trained", row
