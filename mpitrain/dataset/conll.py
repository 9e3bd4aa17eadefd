"""Labelled text in columns, one word a line, read so that every quirk has a normal form or an error with a line number.

Normal forms (each kept or dropped the same way for any number of ranks; `data/README.md` has the table):
an empty line, or one of blanks and tabs only, ends a sentence; LF, CRLF and CR end lines; a byte order mark,
`-DOCSTART-` lines, comment lines and CoNLL-U ranges (`3-4`) and empty nodes (`5.1`) are dropped and counted;
an empty word, a word with blanks in it, NBSP or a zero-width character is a word like any other; IOB1 and IOBES tags
become IOB2; an I- that follows no B- stays. Everything else is a `DataError`.
"""

from __future__ import annotations

import mmap
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from mpitrain.dataset.recipe import Recipe
from mpitrain.errors import DataError

LINE_END = re.compile(rb"\r\n|\r|\n")
RANGE_OR_EMPTY_NODE = re.compile(rb"\d+[-.]\d+")
TAGS = {
    "iob1": (re.compile(r"O|[BI]-\S+"), "O, B-TYPE or I-TYPE"),
    "iob2": (re.compile(r"O|[BI]-\S+"), "O, B-TYPE or I-TYPE"),
    "iobes": (re.compile(r"O|[BIES]-\S+"), "O, B-TYPE, I-TYPE, E-TYPE or S-TYPE"),
    "none": (re.compile(r"\S+"), "any text without blanks"),
}
LOOKS_TAGGED = re.compile(r"\t|^-DOCSTART-|\s(O|[BIES]-\S+)\s*$")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words, their tags in normal form, and the 1-based line that each came from."""

    words: list[str]
    tags: list[str]
    lines: list[int]


@dataclass(frozen=True)
class FileIndex:
    """Where the sentences of one file begin, and how its lines are read.

    Attributes:
        offsets: byte of the first word line of each sentence, int64 [num_sentences].
        lines: 1-based number of that line, int64 [num_sentences].
        num_bytes: size of the file.
        separator: what stands between columns in this file.
        num_columns: columns of its first word line, and so of all.
        dropped: what was dropped or normalised, by kind.
    """

    offsets: NDArray[np.int64]
    lines: NDArray[np.int64]
    num_bytes: int
    separator: Literal["tab", "space"]
    num_columns: int
    dropped: dict[str, int]


def index_file(path: Path, recipe: Recipe) -> FileIndex:
    """Find the sentences of a file in one cheap pass; words and tags are not looked at.

    Raises:
        DataError: not UTF-8 text, no sentence in it, or fewer columns than the recipe asks for.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; it should hold a word and its tag per line")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _refuse_binary(path, data)
        separator, num_columns = _layout(path, data, recipe)
        offsets, lines, inside = [], [], False
        dropped: Counter[str] = Counter()
        dropped["byte order mark"] = int(data[:3] == BYTE_ORDER_MARK)
        for number, (offset, line, end) in enumerate(_lines_of_map(data), 1):
            dropped["CR line end"] += end[:1] == b"\r"
            kind = _kind(line, recipe, separator, num_columns)
            if kind == "word" and not inside:
                offsets.append(offset)
                lines.append(number)
            inside = kind == "word" or (inside and kind not in ("blank", "-DOCSTART-"))
            dropped[kind] += kind not in ("word", "blank")
        counts = {kind: count for kind, count in sorted(dropped.items()) if count}
        return FileIndex(
            np.array(offsets, np.int64), np.array(lines, np.int64), len(data), separator, num_columns, counts
        )


def read_sentences(path: Path, recipe: Recipe, index: FileIndex, start: int, stop: int) -> list[Sentence]:
    """The sentences [start, stop) of an indexed file.

    Raises:
        DataError: names the line of a missing column, a bad tag or a byte that is not UTF-8.
    """
    if start >= stop:
        return []
    begin = int(index.offsets[start])
    end = int(index.offsets[stop]) if stop < len(index.offsets) else index.num_bytes
    with path.open("rb") as file:
        file.seek(begin)
        data = file.read(end - begin)
    first_line = int(index.lines[start])
    _check_utf8(path, data, first_line)
    sentences: list[Sentence] = []
    inside = False
    for number, line in enumerate(data.splitlines(), first_line):
        kind = _kind(line, recipe, index.separator, index.num_columns)
        if kind == "word":
            if not inside:
                sentences.append(Sentence([], [], []))
            word, tag = _word_and_tag(path, number, line, recipe, index)
            sentences[-1].words.append(word)
            sentences[-1].tags.append(tag)
            sentences[-1].lines.append(number)
        inside = kind == "word" or (inside and kind not in ("blank", "-DOCSTART-"))
    if len(sentences) != stop - start:
        raise DataError(f"{path}: changed while it was being read; start again when it is complete")
    return [Sentence(found.words, to_iob2(found.tags, recipe.scheme), found.lines) for found in sentences]


def to_iob2(tags: list[str], scheme: str) -> list[str]:
    """The tags of one sentence in IOB2; plain tags (scheme "none") as they are.

    IOB1 marks with B- only an entity that touches one of its own type (Ramshaw and Marcus 1995, section 3.1).
    """
    if scheme == "iobes":
        return [{"S": "B", "E": "I"}.get(tag[0], tag[0]) + tag[1:] for tag in tags]
    if scheme == "iob1":
        previous = ["O", *tags]
        return [
            "B" + tag[1:] if tag[1:] != before[1:] and tag != "O" else tag
            for before, tag in zip(previous, tags, strict=False)
        ]
    return tags


def read_input(stream: BinaryIO, format: str = "auto", name: str = "input") -> Iterator[list[str]]:
    """Sentences to be tagged, never an empty one.

    `conll`: a word is the first column of its line; an empty line ends a sentence. `text`: a line is a sentence; words
    stand between blanks, and marks at the ends of a word are words of their own. `auto`: `conll` if the first line
    that is not empty holds a tab or a single word, is a -DOCSTART- or ends in an entity tag, else `text`.

    Raises:
        DataError: a line is not UTF-8 text, or what began like a list of words goes on like text.
    """
    words: list[str] = []
    alone = False  # whether `auto` saw a single word
    for number, line in enumerate(_lines_of_stream(stream), 1):
        _check_utf8(Path(name), line, number)
        text = line.decode("utf-8").strip("\r\n")
        bare = text.strip(" \t")
        if format == "auto" and bare:
            tagged = LOOKS_TAGGED.search(text)
            alone = not tagged and " " not in bare
            format = "conll" if tagged or alone else "text"
        if format == "text":
            if sentence := split_text(bare):
                yield sentence
        elif bare and _kind_without_recipe(line) != "-DOCSTART-":
            columns = text.split("\t") if "\t" in text else bare.split(" ")
            if alone and len(columns) > 1:
                found = f"{name}:{number}: found {bare!r}, though the first line is a single word"
                raise DataError(f"{found}; say what this is: --format text, or conll (first words only)")
            words.append(columns[0])
        elif words:
            yield words
            words = []
    if words:
        yield words


def split_text(line: str) -> list[str]:
    """Words between blanks; punctuation at either end of a word is cut off, mark by mark."""
    words: list[str] = []
    for chunk in line.split():
        start, stop = 0, len(chunk)
        while start < stop and unicodedata.category(chunk[start]).startswith("P"):
            start += 1
        while stop > start and unicodedata.category(chunk[stop - 1]).startswith("P"):
            stop -= 1
        words += [*chunk[:start], *([chunk[start:stop]] if start < stop else []), *chunk[stop:]]
    return words


def _kind(line: bytes, recipe: Recipe, separator: str, num_columns: int) -> str:
    """What a line is. A comment starts with the prefix AND has not the columns of a word: a token `#` is a word."""
    kind = _kind_without_recipe(line)
    if kind != "word":
        return kind
    if recipe.comment and line.startswith(recipe.comment.encode()) and len(_columns(line, separator)) != num_columns:
        return "comment"
    if recipe.id_column is not None:
        columns = _columns(line, separator)
        if len(columns) > recipe.id_column and RANGE_OR_EMPTY_NODE.fullmatch(columns[recipe.id_column]):
            return "range or empty node"
    return "word"


def _kind_without_recipe(line: bytes) -> str:
    if line.startswith(b"-DOCSTART-") and line[10:11] in (b"", b" ", b"\t", b"\r", b"\n"):
        return "-DOCSTART-"
    return "word" if line.strip(b" \t\r\n") else "blank"


def _columns(line: bytes, separator: str) -> list[bytes]:
    """Not `bytes.split()`: a word may hold any other white space."""
    if separator == "tab":
        return line.split(b"\t")
    return [column for column in line.replace(b"\t", b" ").split(b" ") if column]


def _word_and_tag(path: Path, number: int, line: bytes, recipe: Recipe, index: FileIndex) -> tuple[str, str]:
    columns = _columns(line, index.separator)
    if len(columns) != index.num_columns:
        raise DataError(
            f"{path}:{number}: found {len(columns)} column(s) in {line.decode()!r}, "
            f"other lines have {index.num_columns}; columns are separated by "
            f"{'one tab' if index.separator == 'tab' else 'blanks'}, and no tag may be missing"
        )
    tag = columns[-1 if recipe.tag_column == "last" else recipe.tag_column].decode().strip(" ")
    if not _is_tag(tag, recipe.scheme):
        raise DataError(
            f"{path}:{number}: found {tag!r} as a tag; "
            f'with scheme = "{recipe.scheme}" a tag is {TAGS[recipe.scheme][1]}; for plain tags, such as parts of '
            'speech, write a recipe with scheme = "none" (data/README.md)'
        )
    return columns[recipe.word_column].decode(), tag


@lru_cache(maxsize=4096)
def _is_tag(tag: str, scheme: str) -> bool:
    return TAGS[scheme][0].fullmatch(tag) is not None


def _layout(path: Path, data: mmap.mmap, recipe: Recipe) -> tuple[Literal["tab", "space"], int]:
    """Separator and number of columns, from the first line that can only be a word."""
    comment = recipe.comment.encode()
    for number, (_, line, _) in enumerate(_lines_of_map(data), 1):
        if _kind_without_recipe(line) == "word" and not (comment and line.startswith(comment)):
            separator = recipe.separator if recipe.separator != "auto" else "tab" if b"\t" in line else "space"
            num_columns = len(_columns(line, separator))
            tag_column = 1 if recipe.tag_column == "last" else recipe.tag_column
            needed = 1 + max(recipe.word_column, tag_column, recipe.id_column or 0)
            if num_columns < needed:
                raise DataError(
                    f"{path}:{number}: found {num_columns} column(s) in {line.decode(errors='replace')!r}, "
                    f"the recipe asks for {needed}, separated by {separator}; give each word its tag or mend the recipe"
                )
            return separator, num_columns
    raise DataError(f"{path}: holds no sentence, only empty lines and comments")


def _lines_of_map(data: mmap.mmap) -> Iterator[tuple[int, bytes, bytes]]:
    """Offset, text and end of each line, without holding more than one."""
    start = len(BYTE_ORDER_MARK) if data[:3] == BYTE_ORDER_MARK else 0
    for end in LINE_END.finditer(data, start):
        yield start, data[start : end.start()], end.group()
        start = end.end()
    if start < len(data):
        yield start, data[start:], b""


def _lines_of_stream(stream: BinaryIO) -> Iterator[bytes]:
    for number, line in enumerate(stream):
        yield from (line.removeprefix(BYTE_ORDER_MARK) if number == 0 else line).splitlines()


def _refuse_binary(path: Path, data: mmap.mmap) -> None:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}:1: found UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path.name}")
    for bad, name in ((b"\0", "a NUL byte"), (b"\r\r\n", "a line end CR CR LF")):
        place = data.find(bad)
        if place >= 0:
            number = 1 + sum(1 for _ in LINE_END.finditer(data, 0, place))
            raise DataError(f"{path}:{number}: found {name}; the file should be plain UTF-8 text with LF or CRLF")


def _check_utf8(path: Path, data: bytes, first_line: int) -> None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = first_line + sum(1 for _ in LINE_END.finditer(data, 0, error.start))
        raise DataError(
            f"{path}:{number}: found byte 0x{data[error.start]:02x}, which is not UTF-8; convert the file: "
            f"iconv -f LATIN1 -t UTF-8 {path.name}"
        ) from None
    if b"\0" in data:
        raise DataError(
            f"{path}:{first_line + data[: data.index(0)].count(10)}: found a NUL byte; this is not plain text"
        )
