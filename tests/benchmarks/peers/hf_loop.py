"""Peer: the training loop of Hugging Face's tutorials in one process.

    python tests/benchmarks/peers/hf_loop.py --model minilm-l6 --batch 64
    python tests/benchmarks/peers/hf_loop.py --model minilm-l6 --batch 16 --precision fp32 --width 128

Sentences of similar length stand together (a length-bucketing sampler), padded to the longest; or, with a width, they
come as they are and all are padded to that, as the plain scripts do, with AdamW as it is by default. bf16 is autocast.
Each turn begins with a line of standard input.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from ddp_gloo import NUM_LABELS, model_of
from turns import parser_of, take_turns


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--width", type=int, help="pad all sentences to it, without bucketing")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = model_of(options.model).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=None if options.width else True)
    lengths = np.sort(np.repeat(*np.loadtxt(options.lengths, np.int64, unpack=True)))
    generator = np.random.default_rng(0)

    def step() -> int:
        if options.width:
            found, width = generator.choice(lengths, options.batch), options.width
        else:
            first = generator.integers(0, len(lengths) - options.batch)
            found = lengths[first : first + options.batch]
            width = found.max()
        mask = torch.from_numpy((np.arange(width) < found[:, None]).astype(np.int64))
        tokens = torch.randint(0, model.config.vocab_size, mask.shape) * mask
        tokens, mask = tokens.to(options.device), mask.to(options.device)
        labels = torch.where(mask == 1, tokens % NUM_LABELS, -100)
        optimizer.zero_grad()
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            loss = model(tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        return int(found.sum())

    take_turns(step, options, 0, torch.cuda.synchronize if options.device == "cuda" else lambda: None)


if __name__ == "__main__":
    main()
