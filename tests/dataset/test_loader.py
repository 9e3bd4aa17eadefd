"""Arrays a step ahead of the computation: in order, with the errors of the thread, and no thread left behind."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mpitrain.dataset.loader import Split, open_split, prefetch
from mpitrain.dataset.prepare import prepare
from mpitrain.dataset.recipe import Recipe
from mpitrain.dataset.sequences import MemorySplit
from mpitrain.runtime.agree import share


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_come_in_order_with_what_was_made_of_them():
    assert list(prefetch(range(20), lambda item: item * item)) == [(item, item * item) for item in range(20)]
    assert threads() == []


def test_nothing_to_do_ends_at_once():
    assert list(prefetch([], str)) == []


def test_what_making_raises_comes_after_the_items_before_it():
    seen = []
    with pytest.raises(ZeroDivisionError):
        for item, _ in prefetch([2, 1, 0, 5], lambda item: 1 / item):
            seen.append(item)
    assert seen == [2, 1]
    assert threads() == []


def test_what_the_plan_raises_comes_too():
    def items():
        yield 1
        raise KeyError("plan")

    with pytest.raises(KeyError, match="plan"):
        list(prefetch(items(), str))
    assert threads() == []


def test_closing_early_ends_the_thread_even_if_it_waits_for_room():
    made = []
    batches = prefetch(range(1000), made.append)
    assert next(batches) == (0, None)
    time.sleep(0.05)
    assert threads() == ["prefetch"]
    batches.close()
    assert threads() == []
    assert len(made) <= 5, "two wait, one is being made, one was taken"


def test_work_is_done_ahead_of_time_in_another_thread():
    ahead = threading.Event()
    batches = prefetch(range(3), lambda item: (ahead.set() if item == 1 else None, threading.current_thread().name))
    _, (_, name) = next(batches)
    assert ahead.wait(5), "item 1 is made while item 0 is in use"
    assert name == "prefetch"
    batches.close()


@pytest.mark.mpi(min_size=1)
def test_all_ranks_read_every_sequence_of_every_shard(comm, tmp_path, monkeypatch):
    monkeypatch.setattr("mpitrain.dataset.prepare.MIN_BLOCK", 3)
    folder = Path(share(comm, str(tmp_path)))
    if comm.rank == 0:
        text = "\n".join("".join(f"w{place}\tO\n" for place in range(1 + number % 5)) for number in range(11))
        (folder / "train.conll").write_text(text)
    comm.Barrier()
    recipe = Recipe.model_validate({"name": "made", "files": {"train": folder / "train.conll"}})
    settings = {"tokenizer": None, "vocab_size": 90, "lowercase": True, "max_length": 16, "progress": lambda _: None}
    info = prepare(comm, recipe, folder / "out", **settings)
    split = open_split(comm, folder / "out", info, "train")
    assert open_split(comm, folder / "out", info, "dev") is None
    assert isinstance(split, Split) and len(info.splits["train"]) == 4
    assert split.index.words.tolist() == [1 + number % 5 for number in range(11)]
    assert split.index.sentences.tolist() == list(range(11))
    order = np.array([10, 0, 4, 3])
    starts = split.read("word_starts", order)
    assert starts.dtype == np.int64 and len(starts) == split.index.lengths[order].sum()
    ends = np.cumsum(split.index.lengths[order])
    tokens = split.read("tokens", order)
    opening, closing = tokens[0], tokens[-1]
    assert tokens[np.concatenate([[0], ends[:-1]])].tolist() == [opening] * 4
    assert tokens[ends - 1].tolist() == [closing] * 4 != [opening] * 4
    assert [int(part.sum()) for part in np.split(starts, ends[:-1])] == [1, 1, 5, 4]
    assert len(split.read("tokens", np.empty(0, np.int64))) == 0


def test_sequences_in_memory_read_as_those_of_shards_do():
    split = MemorySplit({"tokens": np.arange(9)}, np.array([4, 2, 3]), np.array([2, 1, 1]), np.array([0, 1, 1]))
    assert split.read("tokens", np.array([2, 0])).tolist() == [6, 7, 8, 0, 1, 2, 3]
