"""Each quirk of labelled text has its normal form or an error that names file and line (exam cases 35 and 38)."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.dataset.conll import index_file, read_input, read_sentences, split_text, to_iob2
from mpitrain.dataset.recipe import Recipe
from mpitrain.errors import DataError


def recipe_of(path: Path, **fields) -> Recipe:
    return Recipe.model_validate({"name": "made", "files": {"train": path}, **fields})


def read(folder: Path, content: bytes | str, **fields) -> list[list[tuple[str, str]]]:
    path = folder / "made.conll"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    recipe = recipe_of(path, **fields)
    index = index_file(path, recipe)
    sentences = read_sentences(path, recipe, index, 0, len(index.offsets))
    assert [found.lines[0] for found in sentences] == index.lines.tolist()
    return [list(zip(found.words, found.tags, strict=True)) for found in sentences]


PLAIN = [[("a", "O"), ("b", "B-X")], [("c", "O")]]
NORMAL_FORMS = {
    "plain": (b"a\tO\nb\tB-X\n\nc\tO\n\n", {}, PLAIN),
    "no final newline": (b"a\tO\nb\tB-X\n\nc\tO", {}, PLAIN),
    "several empty lines": (b"\n\na\tO\nb\tB-X\n\n\n\nc\tO\n\n\n", {}, PLAIN),
    "sentence end is a line of one tab": (b"a\tO\nb\tB-X\n\t\nc\tO\n", {}, PLAIN),
    "sentence end is a line of blanks": (b"a\tO\nb\tB-X\n  \t \nc\tO\n", {}, PLAIN),
    "CRLF": (b"a\tO\r\nb\tB-X\r\n\r\nc\tO\r\n", {}, PLAIN),
    "lone CR": (b"a\tO\rb\tB-X\r\rc\tO\r", {}, PLAIN),
    "byte order mark": (b"\xef\xbb\xbfa\tO\nb\tB-X\n\nc\tO\n", {}, PLAIN),
    "runs of blanks": (b"a   O\nb \t B-X  \n\nc O\n", {}, PLAIN),
    "blanks around a tag": (b"a\tO \nb\t B-X\n\nc\tO\n", {}, PLAIN),
    "docstart, three forms": (b"-DOCSTART-\n\na\tO\nb\tB-X\n-DOCSTART-\tO\n\n-DOCSTART- -X- O O\n\nc\tO\n", {}, PLAIN),
    "comments": (b"# id 1\na\tO\nb\tB-X\n# inside\n\n# id 2\nc\tO\n# end\n", {"comment": "# "}, PLAIN),
    "comment before the file's first word, blanks": (b"# a comment x\na O\nb B-X\n\nc O\n", {"comment": "#"}, PLAIN),
    "token # without comments": (b"#\tO\n#tag\tO\n", {}, [[("#", "O"), ("#tag", "O")]]),
    "token # with comments, tabs": (b"a\tO\n#\tO\n#t\tO\n", {"comment": "#"}, [[("a", "O"), ("#", "O"), ("#t", "O")]]),
    "token # with comments, blanks": (b"a O\n# O\n# a comment\n", {"comment": "# "}, [[("a", "O"), ("#", "O")]]),
    "empty words": (b"a\tO\n\tO\n \tO\n", {}, [[("a", "O"), ("", "O"), (" ", "O")]]),
    "word with blanks": (b"a b\tO\nc \tO\n", {}, [[("a b", "O"), ("c ", "O")]]),
    "odd characters": ("\u00a0\tO\n\u200b\tO\n\ufe0f\tO\n\ue401\tO\n\u2028\tO\n\x0b\tO\n\x85\tO\n", {},
                       [[(word, "O") for word in "\u00a0\u200b\ufe0f\ue401\u2028\x0b\x85"]]),
    "odd characters between blanks": ("\u00a0 O\na\u2028b O\n", {}, [[("\u00a0", "O"), ("a\u2028b", "O")]]),
    "inside without begin": (b"a\tI-X\nb\tI-Y\n", {}, [[("a", "I-X"), ("b", "I-Y")]]),
    "IOB1": (b"a\tI-X\nb\tI-X\nc\tB-X\nd\tI-Y\n", {"scheme": "iob1"},
             [[("a", "B-X"), ("b", "I-X"), ("c", "B-X"), ("d", "B-Y")]]),
    "IOBES": (b"a\tS-X\nb\tB-X\nc\tI-X\nd\tE-X\n", {"scheme": "iobes"},
              [[("a", "B-X"), ("b", "B-X"), ("c", "I-X"), ("d", "I-X")]]),
    "plain tags": (b"a\tNOUN\nb\tB_PER\n", {"scheme": "none"}, [[("a", "NOUN"), ("b", "B_PER")]]),
    "CoNLL-U ranges and empty nodes": (b"# text = ab\n1-2\tab\t_\n1\ta\tDET\n1.1\tx\tDET\n2\tb\tNOUN\n\n",
        {"id_column": 0, "word_column": 1, "comment": "#", "scheme": "none"}, [[("a", "DET"), ("b", "NOUN")]]),
    "tag is not the last column": (b"1\ta\tO\t-\tann\n2\tb\tB-X\t-\tann\n", {"word_column": 1, "tag_column": 2},
                                   [[("a", "O"), ("b", "B-X")]]),
}  # fmt: skip


@pytest.mark.parametrize("quirk", NORMAL_FORMS)
def test_normal_form(quirk, tmp_path):
    content, fields, expected = NORMAL_FORMS[quirk]
    assert read(tmp_path, content, **fields) == expected


ERRORS = {
    "empty file": (b"", {}, "the file is empty"),
    "only empty lines and comments": (b"\n# a\n\n# b\n", {"comment": "#"}, "holds no sentence"),
    "only docstart": (b"-DOCSTART- -X- O O\n\n", {}, "holds no sentence"),
    "UTF-16": ("a\tO\n".encode("utf-16"), {}, ":1: found UTF-16"),
    "latin-1 byte": (b"a\tO\n\nb\xe9\tO\n", {}, ":3: found byte 0xe9"),
    "NUL": (b"a\tO\r\nb\0\tO\n", {}, ":2: found a NUL byte"),
    "CR CR LF": (b"a\tO\n\nb\tO\r\r\n", {}, ":3: found a line end CR CR LF"),
    "missing tag": (b"a\tO\nb\n", {}, r":2: found 1 column\(s\) in 'b', other lines have 2"),
    "no tag at all": (b"a\nb\n", {}, r":1: found 1 column\(s\) in 'a', the recipe asks for 2"),
    "ragged columns": (b"a\tx\tO\nb\tO\n", {}, r":2: found 2 column\(s\)"),
    "blank for a tab": (b"a\tO\nb O\n", {}, r":2: found 1 column\(s\)"),
    "empty tag": (b"a\tO\nb\t\n", {}, ":2: found '' as a tag"),
    "underscore": (b"a\tO\n\nb\tB_PER\n", {}, ":3: found 'B_PER' as a tag; .* B-TYPE"),
    "no type": (b"a\tB-\n", {}, ":1: found 'B-' as a tag"),
    "lower case": (b"a\tb-PER\n", {}, ":1: found 'b-PER'"),
    "unknown prefix": (b"a\tX-PER\n", {}, ":1: found 'X-PER'"),
    "IOBES in an IOB2 file": (b"a\tS-PER\n", {}, ":1: found 'S-PER'"),
    "annotator's name for a tag": (b"1\ta\tO\t-\tann\n", {"word_column": 1}, ":1: found 'ann'"),
    "comment with the columns of a word": (b"# x\na O\n", {"comment": "#"}, ":1: found 'x' as a tag"),
    "too few columns": (b"a\tO\n", {"word_column": 4}, "the recipe asks for 5"),
}


@pytest.mark.parametrize("quirk", ERRORS)
def test_error_with_a_line_number(quirk, tmp_path):
    content, fields, message = ERRORS[quirk]
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, content, **fields)
    assert str(caught.value).startswith(str(tmp_path / "made.conll"))


def test_what_was_dropped_is_counted(tmp_path):
    path = tmp_path / "made.conll"
    path.write_bytes(b"\xef\xbb\xbf-DOCSTART-\tO\r\n\r\n# c\r\n1-2\tx\r\n1\tO\r\n")
    index = index_file(path, recipe_of(path, comment="#", id_column=0))
    assert index.dropped == {
        "-DOCSTART-": 1,
        "CR line end": 5,
        "byte order mark": 1,
        "comment": 1,
        "range or empty node": 1,
    }


LINES = st.lists(
    st.sampled_from(["a\tO", "#\tO", "\tB-X", "# comment", "", "\t", "-DOCSTART-\tO", "\u00e9 \tI-X"]), min_size=1
)


@given(lines=LINES, end=st.sampled_from(["\n", "\r\n", "\r"]), cut=st.integers(0, 50))
def test_reading_in_two_parts_equals_reading_at_once(tmp_path_factory, lines, end, cut):
    path = tmp_path_factory.mktemp("parts") / "made.conll"
    path.write_bytes(end.join(["x\tO", *lines]).encode())
    recipe = recipe_of(path, comment="# ")
    index = index_file(path, recipe)
    num_sentences = len(index.offsets)
    cut = min(cut, num_sentences)
    parts = read_sentences(path, recipe, index, 0, cut) + read_sentences(path, recipe, index, cut, num_sentences)
    assert parts == read_sentences(path, recipe, index, 0, num_sentences)
    words = [line.split("\t")[0] for line in lines if line.strip() and not line.startswith(("# ", "-DOC"))]
    assert [word for found in parts for word in found.words] == ["x", *words]
    assert index.offsets.dtype == index.lines.dtype == np.int64


def test_a_file_that_changed_after_indexing_is_noticed(tmp_path):
    path = tmp_path / "made.conll"
    path.write_text("a\tO\n\nb\tO\n")
    recipe = recipe_of(path)
    index = index_file(path, recipe)
    path.write_text("a\tO\nbbbb\tO\n")
    with pytest.raises(DataError, match="changed"):
        read_sentences(path, recipe, index, 0, 2)


TYPED = st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"]))


@given(TYPED)
def test_iob1_tags_keep_their_entities(tags):
    def spans(found: list[str], opens) -> list[tuple[int, str]]:
        return [(place, tag[2:]) for place, tag in enumerate(found) if tag != "O" and opens(["O", *found][place], tag)]

    before = spans(tags, lambda last, tag: tag[0] == "B" or last[1:] != tag[1:])
    assert spans(to_iob2(tags, "iob1"), lambda _, tag: tag[0] == "B") == before


INPUTS = {
    "columns with tags": (b"a b\tB-X\n\tO\n\nc\tO\n", "auto", [["a b", ""], ["c"]]),
    "one word a line, no end": (b"\xef\xbb\xbfa\r\nb\r\n\r\nc", "auto", [["a", "b"], ["c"]]),
    "columns between blanks": (b"a O\nb O\n\n-DOCSTART- O\n\nc O\n", "conll", [["a", "b"], ["c"]]),
    "a sentence a line": (
        b"\nHe (Ann) left.\n\nDon't go!\n",
        "auto",
        [["He", "(", "Ann", ")", "left", "."], ["Don't", "go", "!"]],
    ),
    "a single word as text": (b"Oslo\n", "text", [["Oslo"]]),
    "lone CR": (b"a\tO\rb\tO\r\rc\tO", "auto", [["a", "b"], ["c"]]),
    "nothing": (b"\n\n", "auto", []),
}


@pytest.mark.parametrize("case", INPUTS)
def test_text_to_be_tagged(case):
    content, chosen, expected = INPUTS[case]
    assert list(read_input(BytesIO(content), chosen)) == expected


@pytest.mark.parametrize(
    ("content", "message"), [(b"a\tO\nb\xff\tO\n", "in.txt:2: found byte"), (b"a\n\0\n", "in.txt:2: found a NUL")]
)
def test_text_to_be_tagged_that_is_not_text_is_refused(content, message):
    with pytest.raises(DataError, match=message):
        list(read_input(BytesIO(content), "auto", name="in.txt"))


@given(st.text())
def test_splitting_text_loses_no_character_but_blanks(line):
    assert "".join(split_text(line)) == "".join(line.split())
