"""A dataset recipe says where labelled text lies and how its columns are read."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mpitrain import shelf
from mpitrain.errors import DataError, UsageError
from mpitrain.files import parse_toml

SPLITS = ("train", "dev", "test")
Split = Annotated[str, Field(pattern="^(train|dev|test)$")]
STEMS = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "test": "test"}
ENDINGS = (".conll", ".txt", ".tsv", ".bio", ".iob", ".iob2", ".conllu")
CONLLU = {"id_column": 0, "word_column": 1, "tag_column": 3, "separator": "tab", "comment": "#", "scheme": "none"}


class Recipe(BaseModel):
    """Where the text is and what its columns mean; `data/README.md` describes the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    files: Annotated[dict[Split, Path], Field(min_length=1)]
    word_column: Annotated[int, Field(ge=0)] = 0
    tag_column: Annotated[int, Field(ge=0)] | Literal["last"] = "last"
    id_column: Annotated[int, Field(ge=0)] | None = None
    separator: Literal["tab", "space", "auto"] = "auto"
    comment: str = ""
    scheme: Literal["iob2", "iob1", "iobes", "none"] = "iob2"
    labels: Annotated[list[str], Field(min_length=1)] | Literal["collect"] = "collect"
    license: str = ""
    citation: str = ""
    homepage: str = ""
    fetch: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.comment != self.comment.lstrip():
            raise ValueError("comment: a line is never matched from a blank on; give a prefix such as '#'")
        if self.tag_column == self.word_column:
            raise ValueError(f"tag_column and word_column are both {self.word_column}")
        if self.labels != "collect":
            wrong = [
                label
                for label in self.labels
                if self.scheme != "none" and label != "O" and label[:2] not in ("B-", "I-")
            ]
            if wrong or len(set(self.labels)) < len(self.labels):
                raise ValueError(f"labels: each once, in IOB2 form (O, B-X, I-X); found {wrong or 'one twice'}")
        return self


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe that a name of the shelf, a .toml file, a directory of text files or one text file means.

    Returns: a recipe whose files are absolute paths that exist.

    Raises:
        UsageError: nothing has that name.
        DataError: the recipe is wrong, or its files are not there; the message says what to fetch and where to put it.
    """
    place = shelf.find("data", str(name_or_path)).resolve()
    if place.is_dir():
        return _recipe_of_directory(place)
    if place.suffix != ".toml":
        return _plain_recipe(place.stem, {"train": place})
    try:
        recipe = Recipe.model_validate(parse_toml(place.read_text(encoding="utf-8")))
    except ValidationError as error:
        mistakes = [f"  {'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors()]
        raise DataError("\n".join([f"{place}: not a dataset recipe:", *mistakes])) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{place}: not TOML: {error}") from None
    return recipe.model_copy(update={"files": _locate(recipe, place.parent)})


def _locate(recipe: Recipe, beside: Path) -> dict[Split, Path]:
    folders = [beside, *([Path(os.environ["MPITRAIN_CORPORA"])] if os.environ.get("MPITRAIN_CORPORA") else [])]
    found: dict[Split, Path] = {}
    missing: list[Path] = []
    for split, file in recipe.files.items():
        candidates = [folder / file for folder in folders if _is_file(folder / file)]
        if candidates:
            found[split] = candidates[0].resolve()
        else:
            missing.append(file)
    if missing:
        raise DataError(
            f"dataset {recipe.name}: found no {', '.join(map(str, missing))} in {' or '.join(map(str, folders))}.\n"
            f"{recipe.fetch.strip() or 'The recipe does not say where they come from.'}\n"
            f"Put them below a folder of yours and set MPITRAIN_CORPORA to it: $MPITRAIN_CORPORA/{missing[0]}."
        )
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name can be too long for the system
        return False


def _recipe_of_directory(directory: Path) -> Recipe:
    files: dict[str, Path] = {}
    for file in sorted(directory.iterdir()):
        split = STEMS.get(file.stem) if file.suffix in ENDINGS else None
        if split in files:
            raise DataError(
                f"{directory}: {files[split].name} and {file.name} both look like the {split} split; write a recipe"
            )
        if split:
            files[split] = file
    if not files and any(directory.glob("*.h5")):
        raise DataError(f"{directory}: holds shards, but no dataset.json: they are not complete; prepare them again")
    if not files:
        raise DataError(
            f"{directory}: holds no train, dev, valid or test file ending in {', '.join(ENDINGS)}; write a recipe"
        )
    return _plain_recipe(directory.name, {split: files[split] for split in SPLITS if split in files})


def recipe_of_files(files: Sequence[str]) -> Recipe:
    """Plain text files in the order train, dev, test.

    Raises:
        UsageError: too many of them.
        DataError: one is not there.
    """
    if len(files) > len(SPLITS):
        raise UsageError(f"prepare: {len(files)} files given; it takes up to three: train, dev and test")
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        folders = [file for file in missing if Path(file).is_dir()]
        hint = f"; for a folder: prepare --data {folders[0]}" if folders else ""
        raise DataError(f"prepare: found no file {', '.join(missing)}{hint}")
    return _plain_recipe(
        Path(files[0]).stem, {split: Path(file).resolve() for split, file in zip(SPLITS, files, strict=False)}
    )


def _plain_recipe(name: str, files: dict[Split, Path]) -> Recipe:
    layout = CONLLU if all(file.suffix == ".conllu" for file in files.values()) else {}
    safe_name = (
        "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name).strip("-") or "data"
    )
    return Recipe.model_validate({"name": safe_name, "files": files, **layout})
