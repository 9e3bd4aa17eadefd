"""Every reader, fed with damaged and random bytes: only errors of our own come out, soon, and without much memory.

What is fed is a valid document with some bytes changed, cut, repeated or put in, or any bytes at all. HDF5 files are
read by a process of their own, so that a crash of the library would be seen.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from examining import ROUNDS, SEED, Exam, newest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launching import mpirun
from small import small_card
from tiny import CARD

from mpitrain import config
from mpitrain.checkpoint.manifest import read_manifest
from mpitrain.dataset.conll import index_file, read_input, read_sentences
from mpitrain.dataset.recipe import load_recipe
from mpitrain.dataset.shards import open_dataset
from mpitrain.dataset.tokenize import load_tokenizer
from mpitrain.errors import MpitrainError
from mpitrain.files import seal
from mpitrain.model.bert import BertStage, num_blocks
from mpitrain.model.card import load_card
from mpitrain.model.pretrained import read_pretrained, write_pretrained
from mpitrain.observe.record import RunDirectory

NUM_INPUTS = 100 * ROUNDS
SECONDS = 5.0
RECIPE = 'name = "fuzzed"\n[files]\ntrain = "text.conll"\n'
TEXT = "Alice B-PER\nwent O\n\nto O\nParis B-LOC\n\u00e9 O\n\n-DOCSTART- O\n\nx I-PER\n"
TABLE = "[train]\nbatch_size = 8\nlearning_rate = 1e-3\n[mesh]\ndata = 2\n[pipeline]\nbalance = [1, 2]\n"
FRAGMENTS = [b"\0", b"\xff\xfe", b"[" * 5000, b'{"a":' * 3000, b"\nx = " + b"[" * 5000, b"1e999", b"-1", b"9" * 20]
FRAGMENTS += [b'"', b"\r", b"\\u0000"]
FRAGMENTS += [b"null", b"true", b"NaN", b"../", b"\xf0\x9f\x92\xa9", b"\n\n\n", b"\t", b"= ", b"[[x]]", b"2024-01-01"]


def mutate(data: bytes, chance: random.Random) -> bytes:
    """A few changes of bytes, or pieces taken out, put in or repeated."""
    found = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 3, 8])):
        where, size = chance.randrange(len(found) + 1), chance.choice([1, 1, 2, 8, 64])
        kind = chance.randrange(6)
        if kind == 0 and where < len(found):
            found[where] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del found[where : where + size]
        elif kind == 2:
            found[where:where] = chance.choice(FRAGMENTS)
        elif kind == 3:
            found[where:where] = found[where : where + size] * chance.choice([1, 2, 50])
        elif kind == 4:
            found[where : where + size] = chance.randbytes(size)
        else:
            del found[where:]
    return bytes(found)


def read_run_files(directory: Path) -> None:
    """What a run left behind, damaged or not, keeps nobody from going on."""
    (directory / "checkpoints").mkdir(exist_ok=True)
    account = (directory / "ledger.json").read_bytes()
    run = RunDirectory(directory)
    run.count_start(3)
    run.begin(3, ranks=2, nodes=1, seconds=4.5)
    run.write_exit(0, "done", 6, 9.5)
    assert json.loads((directory / "exit.json").read_text())["node_hours"]["used"] >= 0
    (directory / "ledger.json").write_bytes(account)  # else thousands of starts would be accounted for


def read_text(directory: Path) -> None:
    recipe = load_recipe(directory)
    index = index_file(recipe.files["train"], recipe)
    read_sentences(recipe.files["train"], recipe, index, 0, len(index.offsets))


def read_stream(directory: Path) -> None:
    with (directory / "input").open("rb") as stream:
        for sentence in read_input(stream):
            assert sentence


def sealed(read: Callable[[Path], Any], name: str) -> Callable[[Path], Any]:
    """Damage that the seal cannot tell: who has made the file has sealed it, too."""

    def read_sealed(directory: Path) -> None:
        try:
            told = json.loads((directory / name).read_bytes())
            (directory / name).write_text(seal(json.dumps(told | {"seal": ""}, indent=1)))
        except (ValueError, TypeError, RecursionError, UnicodeEncodeError):
            pass
        read(directory)

    return read_sealed


Reader = tuple[str, Callable[[Path], Any]]  # the file that is damaged, and what reads its directory
READERS: dict[str, Reader] = {
    "manifest": ("manifest.json", read_manifest),
    "manifest, sealed": ("manifest.json", sealed(read_manifest, "manifest.json")),
    "dataset.json": ("dataset.json", open_dataset),
    "dataset.json, sealed": ("dataset.json", sealed(open_dataset, "dataset.json")),
    "tagged text": ("train.conll", read_text),
    "text to be tagged": ("input", read_stream),
    "recipe": ("recipe.toml", lambda directory: load_recipe(directory / "recipe.toml")),
    "model card": ("card.toml", lambda directory: load_card(directory / "card.toml")),
    "configuration": ("run.toml", lambda directory: config.load([], directory / "run.toml")),
    "config.json of a model": ("config.json", read_pretrained),
    "weights of a model": ("model.safetensors", read_pretrained),
    "tokenizer": ("tokenizer.json", load_tokenizer),
    "metrics of a run": ("metrics.jsonl", read_run_files),
    "scores of a run": ("evaluations.jsonl", read_run_files),
    "starts of a run": ("starts.json", read_run_files),
    "account of a run": ("ledger.json", read_run_files),
}


@pytest.fixture(scope="module")
def valid(reference: Exam) -> Path:
    """A directory with a valid file of each kind."""
    place = reference.place / "valid"
    shutil.copytree(newest(reference.reference(2)), place)
    shards = next(reference.place.glob("cache/**/dataset.json")).parent
    for name in ("dataset.json", "train-00000.h5"):
        shutil.copy(shards / name, place)
    for name in ("metrics.jsonl", "evaluations.jsonl", "ledger.json"):
        shutil.copy(reference.reference(2) / name, place)
    card = small_card(num_hidden_layers=1)
    stage = BertStage(card, 2, [(0, num_blocks(card))])
    write_pretrained(place, card, ["O", "B-X"], {name: each.detach() for name, each in stage.named_parameters()})
    texts = {"train.conll": TEXT, "text.conll": TEXT, "input": TEXT, "recipe.toml": RECIPE, "card.toml": CARD}
    texts |= {"run.toml": TABLE, "starts.json": '{"step": 3, "starts": 2}'}
    for name, text in texts.items():
        (place / name).write_text(text)
    return place


def feed(directory: Path, name: str, data: bytes, read: Callable[[Path], Any]) -> bool:
    """Whether it was taken; anything but an error of our own fails the test."""
    (directory / name).write_bytes(data)
    began = time.perf_counter()
    try:
        read(directory)
        return True
    except MpitrainError as error:
        assert str(error)
        return False
    finally:
        assert time.perf_counter() - began < SECONDS


@pytest.fixture
def fed(valid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, of thousands that come and go: none has to outlive a loss of power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return Path(shutil.copytree(valid, tmp_path / "fed"))


@pytest.mark.case(35)
@pytest.mark.parametrize("reader", READERS)
def test_damaged_documents_give_errors_of_our_own(fed: Path, valid: Path, told, reader):
    name, read = READERS[reader]
    whole, chance = (valid / name).read_bytes(), random.Random(f"{SEED}-{reader}")
    assert feed(fed, name, whole, read), "what is right is read"
    forms = [form for form in (mutate(whole, chance) for _ in range(NUM_INPUTS)) if form != whole]
    taken = sum(feed(fed, name, form, read) for form in forms)
    assert not taken or reader not in ("manifest", "dataset.json"), "what the seal does not fit was taken"
    told(f"{len(forms)} damaged forms of: {reader} (SEED={SEED})", f"{len(forms) - taken} refused, {taken} taken")


@pytest.mark.case(35)
@pytest.mark.parametrize("reader", READERS)
def test_any_bytes_give_errors_of_our_own(fed: Path, reader):
    name, read = READERS[reader]

    @settings(max_examples=25 * ROUNDS, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
    def check(data: bytes) -> None:
        feed(fed, name, data, read)

    check()


# Reads many damaged forms of a file; says how far it is, so that a crash names its input.
HDF5 = """
import random, sys
from pathlib import Path
sys.path[:0] = [{support!r}, {here!r}]
import h5py
from test_fuzz import mutate
from mpitrain.errors import DataError
from mpitrain.hdf5 import map_arrays

source, seed, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
wanted = {{}}
with h5py.File(source) as file:
    file.visititems(lambda name, each: wanted.update({{name: (each.dtype.str,)}}) if hasattr(each, "dtype") else None)
whole, chance, target, taken = source.read_bytes(), random.Random(seed), Path("fed.h5"), 0
for number in range(count):
    head = chance.randrange(200, len(whole))
    target.write_bytes(mutate(whole[:head], chance) + whole[head:])
    Path("number").write_text(str(number))
    try:
        taken += bool([values.sum() for values in map_arrays(target, wanted, DataError).values()])
    except DataError:
        pass
print(taken)
"""


@pytest.mark.case(41)
@pytest.mark.parametrize("name", ["rank-00000.h5", "train-00000.h5"])
def test_damaged_hdf5_files_give_errors_of_our_own(valid: Path, told, tmp_path, name):
    here = Path(__file__).parent
    script = HDF5.format(support=str(here.parent / "support"), here=str(here))
    count = 5 * NUM_INPUTS
    done = mpirun(0, "-W", "ignore", "-c", script, str(valid / name), str(SEED), str(count), cwd=tmp_path, timeout=600)
    assert done.returncode == 0, f"input {(tmp_path / 'number').read_text()}: {done.stderr}"
    taken = int(done.stdout)
    told(f"{count} damaged forms of {name} (SEED={SEED})", f"{count - taken} refused, {taken} taken, no crash")
