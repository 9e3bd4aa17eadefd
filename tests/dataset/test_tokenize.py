"""Words in pieces: none lost, labels on first pieces, the same vocabulary in every run (exam cases 36 and 38)."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mpitrain.dataset.tokenize import (
    SPECIAL_TOKENS,
    Encoded,
    encode_sentences,
    is_lowercase,
    load_tokenizer,
    save_tokenizer_files,
    tokenizer_hash,
    train_tokenizer,
)
from mpitrain.errors import DataError, UsageError

TEXT = ["the lower house knew the newest rules", "Anna saw low rules", "caf\u00e9 \u4e2d\u6587 U.S. don't"] * 20
TRAIN_IN_A_NEW_PROCESS = """
import sys
from mpitrain.dataset.tokenize import tokenizer_hash, train_tokenizer
print(tokenizer_hash(train_tokenizer(sys.stdin.read().split("|"), 120, True)))
"""


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def tokenizer(request) -> Tokenizer:
    return train_tokenizer(TEXT, 200, request.param)


@pytest.fixture(scope="module")
def uncased() -> Tokenizer:
    return train_tokenizer(TEXT, 200, True)


def sequences(encoded: Encoded) -> list[list[int]]:
    return [part.tolist() for part in np.split(encoded.tokens, encoded.offsets[1:-1])]


@pytest.mark.timeout(60)
def test_pieces_are_learned_from_the_beginning_of_words_without_end():
    word = "ab" * 50 + "zq" * 100_000
    tokenizer = train_tokenizer([*TEXT, *[word] * 20], 200, True)
    assert tokenizer.encode(word, add_special_tokens=False).tokens == ["[UNK]"]
    assert "##q" not in tokenizer.get_vocab() and "##abab" in tokenizer.get_vocab()


def test_training_gives_the_same_tokenizer_in_every_process_and_for_any_number_of_threads():
    found = set()
    for threads in ("1", "2", "4"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, "-c", TRAIN_IN_A_NEW_PROCESS]
        run = subprocess.run(command, input="|".join(TEXT), env=environment, capture_output=True, text=True, check=True)
        found.add(run.stdout)
    assert found == {tokenizer_hash(train_tokenizer(TEXT, 120, True)) + "\n"}


def test_special_tokens_come_first_and_the_size_is_kept():
    small = train_tokenizer(TEXT, 70, True)
    assert [small.id_to_token(number) for number in range(5)] == SPECIAL_TOKENS
    assert small.get_vocab_size() == 70
    assert sorted(small.get_vocab().values()) == list(range(70))
    assert small.encode("lower house").tokens[0] == "[CLS]"


def test_a_vocabulary_smaller_than_the_alphabet_is_refused():
    with pytest.raises(UsageError, match=r"vocab_size 20: this text needs at least \d+"):
        train_tokenizer(TEXT, 20, True)


def test_transformers_loads_the_files_and_cuts_the_same(tokenizer, tmp_path):
    save_tokenizer_files(tokenizer, tmp_path, 64, is_lowercase(tokenizer))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    words = ["Anna", "caf\u00e9", "U.S.", "newest", "\u4e2d\u6587x", "don't", "\U0001f600"]
    ours = encode_sentences(tokenizer, [words], 64)
    assert theirs(words, is_split_into_words=True)["input_ids"] == ours.tokens.tolist()
    assert theirs.is_fast and theirs.model_max_length == 64
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(tokenizer)


def test_vocab_txt_alone_gives_the_same_tokenizer(tokenizer, tmp_path):
    save_tokenizer_files(tokenizer, tmp_path, 64, is_lowercase(tokenizer))
    (tmp_path / "tokenizer.json").unlink()
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(tokenizer)


def test_truncation_stored_in_a_tokenizer_does_not_cut_sentences(uncased, tmp_path):
    stored = Tokenizer.from_str(uncased.to_str())
    stored.enable_truncation(4)
    stored.enable_padding(length=9)
    stored.save(str(tmp_path / "tokenizer.json"))
    encoded = encode_sentences(load_tokenizer(tmp_path), [["the"] * 9], 64)
    assert encoded.tokens.tolist() == [2, *[uncased.token_to_id("the")] * 9, 3]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nothing", "", "neither tokenizer.json nor vocab.txt"),
        ("tokenizer.json", "{", "cannot be read"),
        ("vocab.txt", "[UNK]\na\n", r"has no \[CLS\], \[SEP\]"),
    ],
)
def test_a_directory_without_a_bert_tokenizer_is_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_first_pieces_are_marked_and_special_tokens_frame_the_sequence(uncased):
    encoded = encode_sentences(uncased, [["the", "newest"], ["rules"]], 64)
    expected = [uncased.encode(text).ids for text in ("the newest", "rules")]
    assert sequences(encoded) == expected
    marked = [uncased.id_to_token(token) for token in encoded.tokens[encoded.word_starts == 1]]
    assert len(marked) == 3 and not any(piece.startswith("##") for piece in marked)
    assert encoded.words.tolist() == [2, 1] and encoded.sentences.tolist() == [0, 1]


@pytest.mark.parametrize("word", ["", " ", "\u200b", "\u200e", "\ue401\ue401", "\x00"])
def test_a_word_without_a_piece_becomes_unknown_and_is_counted(uncased, word):
    encoded = encode_sentences(uncased, [["the", word, "the"]], 64)
    the = uncased.token_to_id("the")
    assert encoded.tokens.tolist() == [2, the, 1, the, 3]
    assert encoded.word_starts.tolist() == [0, 1, 1, 1, 0]
    assert encoded.counts["words without a piece"] + encoded.counts["words with an unknown piece"] == 1


def test_the_text_of_a_special_token_is_a_word_like_any_other(uncased):
    encoded = encode_sentences(uncased, [["[SEP]", "[CLS]"]], 64)
    assert (encoded.tokens == 3).sum() == 1 and (encoded.tokens == 2).sum() == 1


@pytest.mark.parametrize("num_pieces", [509, 510, 511, 1998])
def test_long_sentences_are_cut_between_words_into_windows(uncased, num_pieces):
    encoded = encode_sentences(uncased, [["the"] * num_pieces], 512)
    assert encoded.words.tolist() == [510] * (num_pieces // 510) + ([num_pieces % 510] if num_pieces % 510 else [])
    assert encoded.counts["sentences split"] == (num_pieces > 510)
    assert np.diff(encoded.offsets).max() <= 512


def test_a_word_longer_than_a_window_keeps_its_first_pieces_and_is_counted(uncased):
    word = "." * 600  # 600 pieces
    encoded = encode_sentences(uncased, [["the", word, "the"]], 512)
    assert encoded.words.tolist() == [1, 1, 1]
    assert np.diff(encoded.offsets).tolist() == [3, 512, 3]
    assert encoded.counts["words cut short"] == 1


def test_no_sentence_or_empty_sentences_give_no_sequence(uncased):
    for sentences in ([], [[]], [[], []]):
        encoded = encode_sentences(uncased, sentences, 64)
        assert (len(encoded.tokens), encoded.offsets.tolist(), len(encoded.words)) == (0, [0], 0)


def test_max_length_without_room_for_a_word_is_refused(uncased):
    with pytest.raises(UsageError, match="max_length 2"):
        encode_sentences(uncased, [["a"]], 2)


@settings(max_examples=200, deadline=None)
@given(sentences=st.lists(st.lists(st.text(max_size=12), max_size=9), max_size=5), max_length=st.integers(3, 12))
def test_no_word_is_ever_lost(uncased, sentences, max_length):
    encoded = encode_sentences(uncased, sentences, max_length)
    assert encoded.words.sum() == encoded.word_starts.sum() == sum(map(len, sentences))
    per_sentence = np.bincount(encoded.sentences, encoded.words, minlength=len(sentences))
    assert per_sentence.tolist() == [len(words) for words in sentences]
    assert all(3 <= length <= max_length for length in np.diff(encoded.offsets))
    assert all(found[0] == 2 and found[-1] == 3 for found in sequences(encoded) if found)
    alone = [
        encode_sentences(uncased, [[word]], max_length).tokens[1:-1].tolist() for words in sentences for word in words
    ]
    inner = [token for found in sequences(encoded) for token in found[1:-1]]
    assert inner == [token for pieces in alone for token in pieces], "a word's pieces do not depend on its neighbours"


def test_settings_of_a_vocab_txt_are_obeyed(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, "A", "\u00e9", "e", ""]), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "strip_accents": False}))
    cased = load_tokenizer(tmp_path)
    assert cased.encode("A \u00e9", add_special_tokens=False).ids == [5, 6] and not is_lowercase(cased)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).encode("\u00e9", add_special_tokens=False).ids == [7]
