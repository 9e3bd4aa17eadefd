"""Cases 20, 22 and 23: the order of the data, and text that is turned into shards again and again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import pytest
from examining import ROUNDS, SEED, Exam
from launching import command
from tiny import SAMPLE, metrics_of, ranks_of

from mpitrain.dataset.shards import open_dataset


@pytest.mark.case(20)
def test_the_same_data_in_the_same_order_on_any_ranks(reference: Exam, told):
    found = {}
    for ranks, mesh in ((1, ()), (2, ()), (3, ()), (4, ("--mesh.pipe", "2")), (2, ("--mesh.tensor", "2"))):
        out = f"order-{ranks}-{'-'.join(mesh)}"
        done = reference.run(ranks, out, settings=("--train.epochs", "3", *mesh))
        assert done.returncode == 0, done.stderr
        lines = metrics_of(reference.place / out)
        found[out] = [line["tokens"] for line in lines]
        losses = [line["loss"] for line in lines]
        assert losses == pytest.approx([line["loss"] for line in metrics_of(reference.place / "order-1-")], rel=1e-5)
    assert len({tuple(tokens) for tokens in found.values()}) == 1
    tokens = next(iter(found.values()))
    epochs = [tokens[start : start + 3] for start in (0, 3, 6)]
    assert len({sum(epoch) for epoch in epochs}) == 1 and len({tuple(epoch) for epoch in epochs}) == 3
    told(
        "3 epochs on 1, 2, 3, 4 ranks, 3 meshes",
        "the same tokens in each step, each epoch all of them in another order",
    )


def prepare(reference: Exam, out: str, *, ranks: int = 2, **environment: str):
    texts = [str(SAMPLE / f"{split}.conll") for split in ("train", "dev", "test")]
    line = command(ranks, "-m", "mpitrain", "prepare", *texts, "--out", out, "--tokenizer.vocab_size", "300")
    return reference.begin_line(out, line, **environment)


@pytest.fixture(scope="module")
def prepared(reference: Exam) -> tuple[str, float]:
    """The hash of the sample's shards, and how long they took."""
    began = time.monotonic()
    assert prepare(reference, "whole").end().returncode == 0
    return open_dataset(reference.place / "whole").content_hash, time.monotonic() - began


@pytest.mark.case(22)
@pytest.mark.parametrize("number", range(min(20, ROUNDS)))
def test_a_killed_prepare_leaves_all_or_nothing(reference: Exam, told, prepared, number):
    chance, out = random.Random(f"{SEED}-prepare-{number}"), f"prepared-{number}"
    attempt = prepare(reference, out)
    attempt.wait_until(lambda: len(ranks_of(attempt.mark)) == 2)
    delay, victim = chance.uniform(0, prepared[1]), chance.randrange(2)
    time.sleep(delay)
    pids = ranks_of(attempt.mark)
    if len(pids) == 2:
        os.kill(pids[victim], signal.SIGKILL)
    attempt.end()
    was_there = (reference.place / out / "dataset.json").is_file()
    if (reference.place / out).exists():
        assert open_dataset(reference.place / out).content_hash == prepared[0]
    again = prepare(reference, out).end()
    assert again.returncode == 0, again.stderr
    assert open_dataset(reference.place / out).content_hash == prepared[0]
    told(
        f"SIGKILL of rank {victim} of `prepare` after {delay:.2f} s",
        f"{'all' if was_there else 'nothing'}, then the same shards",
    )


@pytest.mark.case(22)
def test_two_prepares_at_once_are_harmless(reference: Exam, told, prepared):
    attempts = [prepare(reference, "twice") for _ in range(2)]
    codes = sorted(attempt.end().returncode for attempt in attempts)
    assert codes in ([0, 0], [0, 64])
    assert open_dataset(reference.place / "twice").content_hash == prepared[0]
    assert not [place for place in reference.place.iterdir() if place.name.startswith(".twice.")]
    told("two `prepare` of one directory at once", f"exit codes {codes}, whole")


@pytest.mark.case(23)
@pytest.mark.parametrize("number", range(min(20, ROUNDS)))
def test_a_cold_cache_is_filled_once_by_whoever_comes(reference: Exam, told, number):
    """Two jobs at once, the first of which is killed in every other round."""
    chance, cache = random.Random(f"{SEED}-cache-{number}"), reference.place / f"cache-{number}"
    outs = [f"cold-{number}-{job}" for job in range(2)]
    settings = ("--train.max_steps", "1", "--checkpoint.best", "false")
    lines = [command(4, *reference.words(out, settings=settings)) for out in outs]
    attempts = [
        reference.begin_line(out, ["env", f"MPITRAIN_CACHE={cache}", *line])
        for out, line in zip(outs, lines, strict=True)
    ]
    killed = number % 2 == 0
    if killed:
        attempts[0].wait_until(lambda: len(ranks_of(attempts[0].mark)) == 4)
        time.sleep(chance.uniform(0, 2))
        for pid in ranks_of(attempts[0].mark)[:1]:
            os.kill(pid, signal.SIGKILL)
    done = [attempt.end(90) for attempt in attempts]
    assert done[1].returncode == 0, done[1].stderr
    assert killed or done[0].returncode == 0, done[0].stderr
    made = [place for place in cache.iterdir() if not place.name.startswith(".")]
    assert len(made) == 1 and open_dataset(made[0]).splits
    shutil.rmtree(cache)
    told(f"two jobs of 4 ranks on a cold cache{', one killed' if killed else ''}", "filled once, whole, trained")
