"""Tags for new text: words in are tags out, in the same order, whatever the mesh."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from mpitrain.dataset.batches import evaluation_plan
from mpitrain.dataset.conll import read_input
from mpitrain.dataset.sequences import MemorySplit
from mpitrain.dataset.tokenize import encode_sentences
from mpitrain.errors import DataError
from mpitrain.evaluate import TOKENS_PER_MICRO_BATCH, infer, words_per_sentence
from mpitrain.files import user_path
from mpitrain.pipeline.executor import Executor
from mpitrain.place import Place
from mpitrain.problem import Problem
from mpitrain.runtime.agree import Comm, collect, share, share_array, together
from mpitrain.runtime.notes import State

SENTENCES_AT_ONCE = 2048  # bounds rank 0's memory, whatever the input's size
Tagged = tuple[list[str], list[str], list[float]]  # words, tags, probability of each tag


def predict(
    executor: Executor,
    place: Place,
    problem: Problem,
    sentences: Iterator[list[str]],
    *,
    output: Path | None,
    output_format: str,
) -> int:
    """Tag the sentences of rank 0 (collective); their number.

    Raises:
        DataError: the input is not what it began like; on all ranks.
    """
    comm = place.mesh.world
    target: TextIO = sys.stdout
    with together(comm, "opening --out"), user_path("--out", output or Path("-")):
        if comm.rank == 0 and output is not None:
            target = output.open("w", encoding="utf-8")
    number = 0
    while True:
        chunk: list[list[str]] = []
        with together(comm, "reading the input", State.LISTENING):
            if comm.rank == 0:
                chunk = list(islice(sentences, SENTENCES_AT_ONCE))
        if not share(comm, len(chunk)):
            break
        tagged = tag_sentences(executor, place, problem, chunk)
        with together(comm, "writing tags", State.LISTENING), user_path("--out", output or Path("-")):
            if comm.rank == 0 and not _write(target, tagged, output_format):
                sentences = iter(())  # nobody reads on, as in `predict ... | head`
        number += len(tagged)
    if target is not sys.stdout:
        target.close()
    return number


def open_input(comm: Comm, source: str, input_format: str) -> Iterator[list[str]]:
    """The sentences of a file, or of standard input if `source` is "-", on rank 0; none on others (collective).

    Raises:
        DataError: it cannot be opened; on all ranks.
    """
    with together(comm, f"opening {source}", State.LISTENING):
        if comm.rank == 0:
            try:
                stream = sys.stdin.buffer if source == "-" else Path(source).open("rb")  # noqa: SIM115 - it is read bit by bit
            except OSError as error:
                raise DataError(f"{source}: cannot be read: {error.strerror}") from None
            return read_input(stream, input_format, name=source)
    return iter(())


def tag_sentences(executor: Executor, place: Place, problem: Problem, sentences: list[list[str]]) -> list[Tagged]:
    """Tag what rank 0 gives (collective); rank 0 gets the result, others an empty list."""
    mesh = place.mesh
    split = share_encoded(mesh.world, problem, sentences)
    plan = evaluation_plan(split.index.lengths, split.index.sentences, TOKENS_PER_MICRO_BATCH)
    found: list[tuple[list[int], list[int], list[int], list[float]]] = []
    for sequences, logits in infer(executor, mesh, plan, split, place.transport.device):
        scores, labels = torch.softmax(logits.float().cpu(), dim=-1).max(dim=-1)
        numbers, words = words_per_sentence(split, sequences)
        found.append((numbers.tolist(), words.tolist(), labels.tolist(), scores.tolist()))
    everything = [part for rank_parts in collect(mesh.world, found) for part in rank_parts]
    return _in_input_order(problem.label_names, sentences, everything) if mesh.world.rank == 0 else []


def share_encoded(comm: Comm, problem: Problem, sentences: list[list[str]]) -> MemorySplit:
    """Rank 0's sentences as word pieces on every rank (collective)."""
    arrays: list[NDArray[Any] | None] = [None] * 5
    with together(comm, "cutting words into pieces"):
        if comm.rank == 0:
            cut = encode_sentences(problem.tokenizer, sentences, problem.card.max_position_embeddings)
            arrays = [cut.tokens, cut.word_starts, np.diff(cut.offsets), cut.words, cut.sentences]
    tokens, word_starts, *rest = (share_array(comm, array) for array in arrays)
    return MemorySplit({"tokens": tokens, "word_starts": word_starts}, *rest)


def _in_input_order(label_names: Sequence[str], sentences: list[list[str]], parts: Iterable[Any]) -> list[Tagged]:
    result: list[Tagged] = [(words, [], []) for words in sentences]
    for numbers, sizes, labels, scores in parts:
        position = 0
        for number, size in zip(numbers, sizes, strict=True):
            tags = [label_names[label] for label in labels[position : position + size]]
            result[number] = (sentences[number], tags, scores[position : position + size])
            position += size
    for words, tags, _ in result:
        assert len(words) == len(tags), "words in are tags out"
    return result


def _write(target: TextIO, tagged: Iterable[Tagged], output_format: str) -> bool:
    """Whether somebody still reads."""
    try:
        target.write("".join(_lines(tagged, output_format)))
        target.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it ends
        return False
    return True


def _lines(tagged: Iterable[Tagged], output_format: str) -> Iterator[str]:
    for words, tags, scores in tagged:
        if output_format == "jsonl":
            rounded = [round(score, 6) for score in scores]
            yield json.dumps({"words": words, "tags": tags, "scores": rounded}, ensure_ascii=False) + "\n"
        else:
            rows = zip(words, tags, scores, strict=True)
            yield "".join(f"{word}\t{tag}\t{score:.4f}\n" for word, tag, score in rows) + "\n"
