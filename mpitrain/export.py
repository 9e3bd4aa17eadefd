"""A checkpoint as a directory that transformers loads: config.json, model.safetensors and the tokenizer's files."""

from __future__ import annotations

from pathlib import Path

from mpitrain.dataset.tokenize import save_tokenizer_files
from mpitrain.errors import UsageError
from mpitrain.files import user_path
from mpitrain.model.bert import parameter_shapes
from mpitrain.model.pretrained import write_pretrained
from mpitrain.restore import Trained, restore_weights
from mpitrain.runtime.agree import Comm, together


def export(comm: Comm, trained: Trained, out: Path) -> None:
    """Write `out`; rank 0 works, the others wait for its word (collective).

    Raises:
        UsageError: `out` exists and is not an empty directory.
    """
    problem = trained.problem
    names = list(parameter_shapes(problem.card, len(problem.label_names))) if comm.rank == 0 else []
    weights = restore_weights(comm, trained, names)
    with together(comm, f"writing {out}"):
        if comm.rank == 0:
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise UsageError(f"--out {out}: exists already; give a new or an empty directory")
            card = problem.card
            with user_path("--out", out):
                out.mkdir(parents=True, exist_ok=True)
                save_tokenizer_files(problem.tokenizer, out, card.max_position_embeddings, card.do_lower_case)
                write_pretrained(out, card, problem.label_names, weights)
