"""Words to word pieces and back: every word gets at least one piece, and its label sits on the first.

WordPiece as in BERT (Devlin et al. 2019, section 3 and appendix A.5), by the `tokenizers` library.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer

from mpitrain.errors import DataError, UsageError

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LONGEST_WORD = 100  # characters; a longer one is [UNK], as in BERT
MAX_ALPHABET = 1000  # characters that get pieces of their own; beyond, WordPiece gives [UNK]
# A piece that occurs once or twice in training is never learned, yet new words would be cut into such pieces. On the
# bundled corpus, whose names are mostly new, leaving them out is worth about 0.08 of test F1 (bert-mini).
MIN_PIECE_FREQUENCY = 10


@dataclass(frozen=True)
class Encoded:
    """Sentences as sequences of word pieces, end to end, each with [CLS] and [SEP].

    Attributes:
        tokens: int32 [num_tokens].
        word_starts: uint8 [num_tokens], 1 where a word's first piece stands.
        offsets: int64 [num_sequences + 1]; sequence i is tokens[offsets[i] : offsets[i + 1]].
        words: int32 [num_sequences], number of words.
        sentences: int64 [num_sequences], index of the sentence that the sequence is (a window of).
        counts: words with an unknown piece, words with no piece ([UNK] was put), words cut short, sentences split.
    """

    tokens: NDArray[np.int32]
    word_starts: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    words: NDArray[np.int32]
    sentences: NDArray[np.int64]
    counts: dict[str, int]


def train_tokenizer(texts: Iterable[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    """A WordPiece tokenizer of at most `vocab_size` pieces; the same bytes in every run.

    Args:
        texts: words or whole sentences.

    Raises:
        UsageError: `vocab_size` has no room for the alphabet.
    """
    blank = _bert_tokenizer(WordPiece({}, unk_token="[UNK]"), {"do_lower_case": lowercase})
    words: Counter[str] = Counter()
    for text in texts:
        found = blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(text))
        words.update(word[:LONGEST_WORD] for word, _ in found)  # the trainer's time grows with the square of the length
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    # The trainer numbers characters in the order of a randomly seeded hash map and breaks ties by that number, so two
    # runs give two vocabularies. Handing it every one-character piece as a "special token" fixes the order.
    alphabet = sorted(sorted(characters, key=lambda found: (-characters[found], found))[:MAX_ALPHABET])
    first_pieces = [*SPECIAL_TOKENS, *alphabet, *(f"##{character}" for character in alphabet)]
    if vocab_size < len(first_pieces):
        raise UsageError(f"tokenizer.vocab_size {vocab_size}: this text needs at least {len(first_pieces)}")
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_PIECE_FREQUENCY,
        special_tokens=first_pieces,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    model = Tokenizer(WordPiece({}, unk_token="[UNK]"))
    model.train_from_iterator((word for word, count in sorted(words.items()) for _ in range(count)), trainer)
    vocabulary = sorted(model.get_vocab(), key=model.get_vocab().__getitem__)
    return _bert_tokenizer(_word_piece(vocabulary), {"do_lower_case": lowercase})


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory or a prepared dataset: `tokenizer.json`, else `vocab.txt`.

    Raises:
        DataError: neither is there, it is damaged, or it is not BERT's (no [UNK], [CLS], [SEP]).
    """
    whole, vocabulary = directory / "tokenizer.json", directory / "vocab.txt"
    try:
        if whole.is_file():
            tokenizer = Tokenizer.from_str(whole.read_text(encoding="utf-8"))
        elif vocabulary.is_file():
            settings = directory / "tokenizer_config.json"
            config = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
            pieces = vocabulary.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
            tokenizer = _bert_tokenizer(_word_piece([piece.rstrip("\r") for piece in pieces]), config)
        else:
            raise DataError(f"{directory}: holds neither tokenizer.json nor vocab.txt; fetch them with the model")
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{directory}: its tokenizer cannot be read: {error}") from None
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if tokenizer.token_to_id(token) is None]
    if missing:
        raise DataError(f"{directory}: its tokenizer has no {', '.join(missing)}; only BERT's WordPiece can be used")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def save_tokenizer_files(tokenizer: Tokenizer, directory: Path, model_max_length: int, lowercase: bool) -> None:
    """Write the files by which `AutoTokenizer` of transformers loads the same tokenizer."""
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": normalizer.get("lowercase", lowercase),
        "strip_accents": normalizer.get("strip_accents"),
        "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
        "model_max_length": model_max_length,
    }
    special = {
        f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is not None
    }
    vocabulary = tokenizer.get_vocab()
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps({**config, **special}, indent=2),
        "special_tokens_map.json": json.dumps(special, indent=2),
        "vocab.txt": "".join(f"{piece}\n" for piece in sorted(vocabulary, key=vocabulary.__getitem__)),
    }
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8", newline="\n")


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """sha256 of the tokenizer's canonical JSON."""
    text = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def is_lowercase(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer folds case."""
    return bool((json.loads(tokenizer.to_str())["normalizer"] or {}).get("lowercase", False))


def encode_sentences(tokenizer: Tokenizer, sentences: list[list[str]], max_length: int) -> Encoded:
    """Cut words into pieces; no word is lost, whatever it holds.

    A word without a piece becomes [UNK]. A sentence of more than `max_length` tokens is cut between words into as few
    sequences as filling them in order allows; a word longer than a sequence keeps its first pieces.

    Raises:
        UsageError: `max_length` is under 3.
    """
    if max_length < 3:
        raise UsageError(f"max_length {max_length}: [CLS], a piece and [SEP] need 3")
    unknown, opening, closing = (_number(tokenizer, token) for token in ("[UNK]", "[CLS]", "[SEP]"))
    num_words = np.array([len(words) for words in sentences], np.int64)
    pieces, owners = _pieces(tokenizer, sentences, num_words)
    found = np.bincount(owners, minlength=int(num_words.sum()))
    # the n-th piece of its word; [UNK] stands in for a word without any
    rank_in_word = np.arange(len(pieces)) - np.repeat(np.cumsum(found) - found, found)
    kept = np.clip(found, 1, max_length - 2)
    first_piece = np.concatenate([[0], np.cumsum(kept)])
    flat = np.full(int(first_piece[-1]), unknown, np.int32)
    fits = rank_in_word < max_length - 2
    flat[first_piece[owners[fits]] + rank_in_word[fits]] = pieces[fits]

    windows, sentence_of_window = _windows(kept, num_words, max_length - 2)
    bounds = first_piece[windows]  # in `flat`, where each sequence begins, and its end
    offsets = bounds + 2 * np.arange(len(bounds))
    tokens = np.empty(int(offsets[-1]), np.int32)
    places = np.arange(len(flat)) + 1 + 2 * np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    tokens[places], tokens[offsets[:-1]], tokens[offsets[1:] - 1] = flat, opening, closing
    word_starts = np.zeros(len(tokens), np.uint8)
    word_starts[places[first_piece[:-1]]] = 1
    counts = {
        "words with an unknown piece": len(np.unique(owners[pieces == unknown])),
        "words without a piece": int((found == 0).sum()),
        "words cut short": int((found > max_length - 2).sum()),
        "sentences split": int((np.bincount(sentence_of_window) > 1).sum()) if len(sentence_of_window) else 0,
    }
    return Encoded(tokens, word_starts, offsets, np.diff(windows).astype(np.int32), sentence_of_window, counts)


def _pieces(
    tokenizer: Tokenizer, sentences: list[list[str]], num_words: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All pieces in order, and the number of the word, counted over all sentences, that each belongs to."""
    tokenizer.encode_special_tokens = True  # the text "[SEP]" is a word like any other
    encodings = tokenizer.encode_batch(sentences, is_pretokenized=True, add_special_tokens=False)
    first_words = np.cumsum(num_words) - num_words
    empty = np.empty(0, np.int64)
    pieces = [np.array(encoding.ids, np.int64) for encoding in encodings]
    owners = [
        np.array(encoding.word_ids, np.int64) + first for encoding, first in zip(encodings, first_words, strict=True)
    ]
    return np.concatenate([empty, *pieces]), np.concatenate([empty, *owners])


def _windows(
    pieces: NDArray[np.int64], num_words: NDArray[np.int64], room: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First words of the sequences [num_sequences + 1] and the sentences they come from [num_sequences]."""
    ends = np.cumsum(num_words)
    before = np.concatenate([[0], np.cumsum(pieces)])
    starts, owners = [], []
    for sentence, (start, stop) in enumerate(zip((ends - num_words).tolist(), ends.tolist(), strict=True)):
        while start < stop:
            starts.append(start)
            owners.append(sentence)
            # the last word that still fits: every word fits alone, so this moves on
            start = min(stop, int(np.searchsorted(before, before[start] + room, side="right")) - 1)
    return np.array([*starts, int(num_words.sum())], np.int64), np.array(owners, np.int64)


def _number(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    assert number is not None, "load_tokenizer and train_tokenizer see to it"
    return int(number)


def _word_piece(vocabulary: list[str]) -> WordPiece:
    numbers = {piece: number for number, piece in enumerate(vocabulary)}
    return WordPiece(numbers, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD)


def _bert_tokenizer(model: WordPiece, config: dict[str, Any]) -> Tokenizer:
    """BERT's text handling around a vocabulary; the settings have the names and defaults of `tokenizer_config.json`."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = BertNormalizer(
        lowercase=cast(bool, config.get("do_lower_case", True)),
        strip_accents=cast("bool | None", config.get("strip_accents")),
        handle_chinese_chars=cast(bool, config.get("tokenize_chinese_chars", True)),
    )
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder()
    known = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens(known)
    if "[CLS]" in known and "[SEP]" in known:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, _number(tokenizer, token)) for token in ("[CLS]", "[SEP]")],
        )
    return tokenizer
