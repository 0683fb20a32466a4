"""A tiny model, and a table about the weather."""

import csv
import dataclasses
import io

import jax
import numpy as np
import pytest
from rich.console import Console

from prograde import lm
from prograde.lab.data import texts
from prograde.lab.display import Display
from prograde.lab.store import Store, claim
from prograde.lab.studies.finetune.plan import Data, Finetune, Model, Plan

TINY = lm.Architecture(
    vocab_size=256, width=32, num_layers=3, num_heads=4, num_kv_heads=2, hidden=48
)
WORDS = {"no": "n", "yes": "y"}


def _rows(count=32):
    """Different texts with the labels no and yes in turn."""
    rng = np.random.default_rng(0)
    pools = (["rain", "mud", "grey", "cold", "storm"], ["sun", "warm", "blue", "clear", "mild"])
    return [
        (" ".join(rng.choice(pools[i % 2], 3)) + f" {i}", ("no", "yes")[i % 2])
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def rows():
    return _rows()


@pytest.fixture(scope="session")
def model():
    return lm.Decoder.create(jax.random.key(1), TINY)


@pytest.fixture(scope="session")
def directory(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    lm.save(path, model, lm.byte_tokenizer())
    return path


@pytest.fixture(scope="session")
def table(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "weather.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture(scope="session")
def examples(rows):
    return texts.examples(rows, WORDS, lm.byte_tokenizer(), "{text} =>", 24, first_token=True)


@pytest.fixture
def plan_of(examples):
    """Makes a plan for the examples."""
    tokens = tuple(int(i) for i in examples.label_tokens)

    def make(**settings):
        given = {"batch_size": 8, "steps": 6, "tangents": 1, "rate": 1e-3, "rank": 1}
        return Plan(**{**given, "label_tokens": tokens, **settings}).resolved()

    return make


@pytest.fixture(scope="session")
def study_of(directory, table):
    """Makes a study of the table: `study_of(plan, data=..., keep_last=...)`."""

    def make(plan=None, data=None, **options):
        given = {
            "data": table,
            "template": "{text} =>",
            "labels": ("no=n", "yes=y"),
            "held_out": 8,
            "max_length": 24,
        }
        plan = {"batch_size": 8, "rate": 0.01, "rank": 1} | (plan or {})
        options = {"keep_last": True, "repeats": 0} | options
        return Finetune(
            Model(str(directory)), Data(**given | (data or {})), Plan(**plan), **options
        )

    return make


@pytest.fixture(scope="session")
def run():
    """Runs a study in a directory; returns the store."""

    def call(study, out, resume=False):
        configs = study.configs()
        claim("finetune", {out: configs["."]}, resume, Finetune.current)
        study.run({".": Store(out)}, quiet())
        return Store(out)

    return call


def quiet():
    return Display(Console(file=io.StringIO()))


@pytest.fixture
def display():
    return quiet()


@pytest.fixture
def field_names():
    return lambda cls: [field.name for field in dataclasses.fields(cls)]
