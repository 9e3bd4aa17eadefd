"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mpitrain.dataset.recipe import Recipe
from mpitrain.model.card import load_card
from mpitrain.shelf import shelves

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "mpitrain").rglob("*.py"))
WITH_TEXT = [module for module in MODULES if module.stat().st_size]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lines_of_functions() -> dict[str, int]:
    """Lines of every function of the package, signature and docstring included."""
    return {
        f"{named(module)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for module in MODULES
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }


def test_no_file_is_longer_than_300_lines():
    lengths = {named(module): len(module.read_text(encoding="utf-8").splitlines()) for module in MODULES}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_functions_are_short():
    lengths = lines_of_functions()
    assert {name: length for name, length in lengths.items() if length > 60} == {}
    assert sorted(lengths.values())[int(0.9 * len(lengths))] <= 30


@pytest.mark.parametrize("module", WITH_TEXT, ids=named)
def test_a_module_says_its_idea_in_its_first_line(module):
    text = module.read_text(encoding="utf-8")
    first = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    assert text.startswith('"""')
    assert re.fullmatch(r"[A-Za-z`].{10,}\.", first), first


def test_shelves_and_tests_are_no_packages():
    folders = [ROOT / name for name in ("models", "data", "jobs", "tests")]
    assert [named(file) for folder in folders for file in folder.rglob("__init__.py")] == []
    assert [named(file) for folder in folders[:3] for file in folder.rglob("*.py")] == []


@pytest.mark.parametrize("card", sorted((ROOT / "models").glob("*.toml")), ids=named)
def test_every_card_on_the_shelf_loads(card):
    assert load_card(card).num_hidden_layers > 0


@pytest.mark.parametrize("recipe", sorted((ROOT / "data").glob("*.toml")), ids=named)
def test_every_recipe_on_the_shelf_is_valid_and_says_where_its_text_comes_from(recipe):
    read = Recipe.model_validate(tomllib.loads(recipe.read_text(encoding="utf-8")))
    assert read.name == recipe.stem
    assert read.license
    assert read.citation
    assert read.fetch or all((ROOT / "data" / file).is_file() for file in read.files.values())


def test_a_checkout_uses_its_own_shelves():
    assert [shelves(kind) for kind in ("models", "data", "jobs")] == [[ROOT / k] for k in ("models", "data", "jobs")]


@pytest.mark.parametrize("module", ["mpitrain", "mpitrain.__main__", "mpitrain.cli"])
def test_help_costs_no_import_of_mpi_torch_or_hdf5(module):
    script = f"import sys, {module}; print([name for name in ('mpi4py', 'torch', 'h5py') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_what_only_looks_at_files_does_not_wait_for_torch():
    script = "import sys, mpitrain.describe, mpitrain.runtime.agree; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_nothing_is_pickled():
    forbidden = re.compile(r"(?:import|from) (?:pickle|cloudpickle|shelve)\b|torch\.(?:load|save)\(|allow_pickle")
    # mpi4py's lower-case calls pickle their arguments.
    forbidden_calls = re.compile(r"comm\.(?:bcast|gather|allgather|scatter|send|recv|isend|irecv|reduce|allreduce)\(")
    for module in MODULES:
        text = module.read_text(encoding="utf-8")
        assert not forbidden.search(text), named(module)
        assert not forbidden_calls.search(text), named(module)


def test_only_the_start_says_comm_world():
    users = {named(m) for m in MODULES if re.search(r"\bCOMM_WORLD\b", m.read_text(encoding="utf-8"))}
    assert users <= {"mpitrain/cli.py", "mpitrain/runtime/launch.py"}


def test_pre_commit_uses_the_versions_that_ci_uses():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pins = set((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    wanted = re.findall(r"additional_dependencies: \[(.+)\]", hooks)
    assert len(wanted) >= 4
    assert set(wanted) <= pins
