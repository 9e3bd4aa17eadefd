"""Peer: transformers' token-classification pipeline over a file of sentences, tags a line each.

python tests/benchmarks/peers/hf_pipeline.py MODEL_DIRECTORY INPUT OUTPUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from transformers import pipeline


def main() -> None:
    model, source, target = sys.argv[1:]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tag = pipeline("token-classification", model=model, device="cpu", batch_size=32)
    with Path(target).open("w", encoding="utf-8") as out:
        for pieces in tag(Path(source).read_text(encoding="utf-8").splitlines()):
            out.write(" ".join(piece["entity"] for piece in pieces) + "\n")


if __name__ == "__main__":
    main()
