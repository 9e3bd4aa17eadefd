"""Hugging Face directories in and out: config.json and model.safetensors, nothing else, and never a pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mpitrain.errors import DataError
from mpitrain.files import parse_json
from mpitrain.model.bert import parameter_shapes
from mpitrain.model.card import ModelCard, card_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ARCHITECTURE = "BertForTokenClassification"
TOKENIZER_FIELDS = {"do_lower_case"}  # of the card, but not of config.json
# Parts of other BERT models that a token classifier has no use for.
EXTRAS = re.compile(r"cls\.|qa_outputs\.|(bert\.)?pooler\.|(bert\.)?embeddings\.(position_ids|token_type_ids)$")
LEGACY = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
FLOATS = {"F16", "BF16", "F32", "F64"}


@dataclass(frozen=True)
class Source:
    """Where a tensor lies."""

    file: Path
    name: str


@dataclass(frozen=True)
class Pretrained:
    """A checked directory; weights are read when they are asked for.

    `label_names` are those of the head that `weights` gives; `missing_head` says that it gives none, so that the
    head keeps its initial values, and `note` why (for the person).
    """

    directory: Path
    card: ModelCard
    label_names: list[str]
    missing_head: bool
    note: str
    sources: Mapping[str, Source]
    head_rows: list[int] = field(default_factory=list)  # row of the file for each label; empty: as they are

    def weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of the parameters that the directory has, float32 on the CPU; other tensors are not read."""
        found = {}
        for name in names:
            if name not in self.sources:
                assert self.missing_head and name.startswith("classifier."), f"{name} is no parameter of this model"
                continue
            source = self.sources[name]
            with safe_open(source.file, framework="pt") as file:
                tensor = file.get_tensor(source.name).float()
            found[name] = tensor[self.head_rows] if self.head_rows and name.startswith("classifier.") else tensor
        return found


def read_pretrained(directory: Path, label_names: Sequence[str] | None = None) -> Pretrained:
    """Check a directory that holds a BERT of any kind: encoder only, token classifier, masked language model.

    Args:
        directory: with config.json and model.safetensors (or its sharded form); tokenizer files may lie beside them.
        label_names: of the data. A head for the same labels in another order is permuted, any other is left out.
            None takes the head as it is, if there is one.

    Raises:
        DataError: files are missing or damaged, the model is no plain BERT, or tensors are missing, unexpected or of
            another shape; one message lists all of them.
    """
    config = _read_json(directory / "config.json")
    card = _read_card(directory, config)
    sources = _rename(_find_tensors(directory))
    own_labels = _read_labels(directory, config) if _has_head(config, sources) else []
    labels = list(own_labels if label_names is None else label_names)
    note = _why_no_head(own_labels, labels)
    if note:
        sources = {name: source for name, source in sources.items() if not name.startswith("classifier.")}
    _check_tensors(directory, sources, parameter_shapes(card, len(labels)), headless=bool(note))
    rows = [own_labels.index(label) for label in labels] if not note and labels != own_labels else []
    return Pretrained(directory, card, labels, bool(note), note, sources, rows)


def _why_no_head(own: list[str], wanted: list[str]) -> str:
    if not own:
        return "the pretrained directory has no token classifier: the head starts anew"
    if sorted(own) != sorted(wanted):
        return f"the pretrained head is for other labels ({', '.join(own)}): the head starts anew"
    return ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise DataError(f"{path}: a pretrained directory needs this JSON file, but reading it met: {failure}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    return values


def _read_card(directory: Path, config: dict[str, Any]) -> ModelCard:
    path = directory / "config.json"
    expected = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False}
    wrong = {name: value for name, value in expected.items() if config.get(name, value) != value}
    if wrong:
        mistakes = (f"{name} is {config[name]!r}, only {value!r} works" for name, value in wrong.items())
        raise DataError(f"{path}: no BERT encoder as mpitrain trains it: {'; '.join(mistakes)}")
    values = {name: config[name] for name in ModelCard.model_fields if name in config}
    tokenizer = directory / "tokenizer_config.json"
    if tokenizer.is_file():
        values |= {name: value for name, value in _read_json(tokenizer).items() if name in TOKENIZER_FIELDS}
    return card_of(values, str(path), DataError)


def _read_labels(directory: Path, config: dict[str, Any]) -> list[str]:
    labels = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # what transformers does not write
    numbers = [str(number) for number in range(len(labels or ()))]
    if not isinstance(labels, dict) or set(labels) != set(numbers) or len(set(labels.values())) != len(labels):
        raise DataError(
            f"{directory / 'config.json'}: id2label: the weights hold a token classifier, so labels 0, 1, ... with "
            f"different names are needed; found {labels!r}"
        )
    return [str(labels[number]) for number in numbers]


def _has_head(config: dict[str, Any], sources: Mapping[str, Source]) -> bool:
    """Sentence classifiers call their head `classifier` too; the architecture tells them apart."""
    return "classifier.weight" in sources and ARCHITECTURE in (config.get("architectures") or [ARCHITECTURE])


def _find_tensors(directory: Path) -> dict[str, Source]:
    """Every tensor by its name in the file."""
    if (directory / WEIGHTS).is_file():
        return {name: Source(directory / WEIGHTS, name) for name in _names(directory / WEIGHTS)}
    if (directory / INDEX).is_file():
        files = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(files, dict) or any(Path(str(file)).name != file for file in files.values()):
            raise DataError(f"{directory / INDEX}: weight_map must give a file of this directory for each tensor")
        held = {file: _names(directory / file) for file in sorted(set(files.values()))}
        lost = sorted(f"{name} ({file})" for name, file in files.items() if name not in held[file])
        if lost:
            raise DataError(f"{directory / INDEX}: tensors that are not in their files: {', '.join(lost)}")
        return {name: Source(directory / file, name) for name, file in files.items()}
    if list(directory.glob("*.bin")):
        raise DataError(
            f"{directory}: found only *.bin weights, which are Python pickles and can run code when they are read; "
            "convert them once where you trust them:\n"
            '    python -c "from transformers import AutoModelForTokenClassification as Model; '
            f"Model.from_pretrained('{directory}').save_pretrained('{directory}')\""
        )
    raise DataError(f"{directory}: found neither {WEIGHTS} nor {INDEX}")


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as failure:
        raise DataError(f"{file}: no whole safetensors file ({failure}); fetch or copy it again") from None


def _rename(tensors: Mapping[str, Source]) -> dict[str, Source]:
    """To the names of a token classifier, without the parts that it has no use for."""
    renamed = {}
    for name, source in tensors.items():
        for old, new in LEGACY:
            name = name.replace(old, new)
        if not EXTRAS.match(name):
            renamed[f"bert.{name}" if name.startswith(("embeddings.", "encoder.")) else name] = source
    return renamed


def _check_tensors(
    directory: Path, sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]], headless: bool
) -> None:
    needed = {name: shape for name, shape in shapes.items() if not (headless and name.startswith("classifier."))}
    mistakes = [f"{name}: missing, should be {list(needed[name])}" for name in needed if name not in sources]
    mistakes += [
        f"{name}: unexpected, a BERT token classifier has no such tensor" for name in sources if name not in needed
    ]
    for name in (name for name in needed if name in sources):
        with safe_open(sources[name].file, framework="pt") as file:
            tensor = file.get_slice(sources[name].name)
            shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
        if shape != needed[name]:
            mistakes.append(f"{name}: found {list(shape)}, config.json asks for {list(needed[name])}")
        if kind not in FLOATS:
            mistakes.append(f"{name}: found dtype {kind}, one of {', '.join(sorted(FLOATS))} works")
    if mistakes:
        raise DataError(f"{directory}: the weights do not fit config.json:\n  " + "\n  ".join(mistakes))


def write_pretrained(
    directory: Path, card: ModelCard, label_names: Sequence[str], weights: Mapping[str, Tensor]
) -> None:
    """Write config.json and model.safetensors so that transformers' AutoModelForTokenClassification loads them.

    `weights` holds every parameter of the model by its name, in the dtype to write. The directory is made if needed;
    other files in it stay. config.json comes last: with it, the directory is whole.
    """
    shapes = parameter_shapes(card, len(label_names))
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes, "weights of another model"
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / f"{WEIGHTS}.part"
    save_file({name: weights[name].detach().cpu().contiguous() for name in shapes}, aside, metadata={"format": "pt"})
    aside.replace(directory / WEIGHTS)
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "bert",
        **card.model_dump(exclude=TOKENIZER_FIELDS),
        "position_embedding_type": "absolute",
        "pad_token_id": 0,
        "id2label": {str(number): name for number, name in enumerate(label_names)},
        "label2id": {name: number for number, name in enumerate(label_names)},
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
