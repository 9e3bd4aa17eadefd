"""Peer: DistributedDataParallel over gloo with Hugging Face's BERT, as its tutorials train it.

    mpirun -np 2 python tests/benchmarks/peers/ddp_gloo.py --model minilm-l6 --batch 64

Sentences of similar length stand together (a length-bucketing sampler), padded to the longest of each rank's share;
bf16 is autocast, AdamW is fused, buckets and threads are DDP's own. Each turn begins with a line of standard input.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForTokenClassification
from turns import parser_of, take_turns

from mpitrain.model.card import load_card

NUM_LABELS = 7


def launched(*names: str) -> int:
    """What mpirun says, in the words of MPICH or Open MPI."""
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def model_of(card_name: str) -> BertForTokenClassification:
    card = load_card(card_name).model_dump()
    del card["do_lower_case"]
    return BertForTokenClassification(BertConfig(**card, num_labels=NUM_LABELS))


def gloo_parser(description: str | None) -> argparse.ArgumentParser:
    """What all peers over gloo take."""
    parser = parser_of(description)
    parser.add_argument("--store", required=True, help="a file that does not exist yet, where ranks find each other")
    return parser


def start_gloo(store: str) -> tuple[int, int]:
    """Rank and size of a group of even shares of the cores, all with the same seed."""
    rank = launched("PMI_RANK", "OMPI_COMM_WORLD_RANK")
    size = launched("PMI_SIZE", "OMPI_COMM_WORLD_SIZE") or 1
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.manual_seed(0)
    return rank, size


def step_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, options: argparse.Namespace, rank: int, size: int
) -> Callable[[], int]:
    """A step up to the gradients of this rank's share of a batch; it returns the tokens of all ranks."""
    lengths = np.sort(np.repeat(*np.loadtxt(options.lengths, np.int64, unpack=True)))
    generator, words = np.random.default_rng(0), load_card(options.model).vocab_size

    def step() -> int:
        first = generator.integers(0, len(lengths) - options.batch)
        whole = lengths[first : first + options.batch]
        share = whole[rank::size]
        mask = torch.from_numpy((np.arange(share.max()) < share[:, None]).astype(np.int64))
        tokens = torch.randint(0, words, mask.shape) * mask
        labels = torch.where(mask == 1, tokens % NUM_LABELS, -100)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            loss = model(tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        return int(whole.sum())

    return step


def main() -> None:
    options = gloo_parser(__doc__).parse_args()
    rank, size = start_gloo(options.store)
    model = DistributedDataParallel(model_of(options.model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    gradients = step_of(model, optimizer, options, rank, size)

    def step() -> int:
        tokens = gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return tokens

    take_turns(step, options, rank, dist.barrier)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
