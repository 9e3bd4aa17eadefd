"""Peer: torch.distributed.pipelining, 1F1B over gloo, with Hugging Face's BERT layers, one stage a rank.

    mpirun -np 2 python tests/benchmarks/peers/pipelining_gloo.py --model minilm-l12 --batch 64 --store FILE

All sentences are of one length, as the library wants static shapes; so nothing is padding. bf16 is autocast (weights,
gradients and what travels are fp32), AdamW is fused. Each turn begins with a line of standard input.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from ddp_gloo import NUM_LABELS, gloo_parser, model_of, start_gloo
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from turns import take_turns


class Stage(nn.Module):
    """An even share of the layers; the first has the embeddings, the last the head."""

    def __init__(self, name: str, rank: int, size: int, bf16: bool) -> None:
        super().__init__()
        whole = model_of(name)
        layers = whole.bert.encoder.layer
        self.embeddings = whole.bert.embeddings if rank == 0 else None
        self.layers = layers[len(layers) * rank // size : len(layers) * (rank + 1) // size]
        self.dropout = whole.dropout if rank == size - 1 else None
        self.classifier = whole.classifier if rank == size - 1 else None
        self.bf16 = bf16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            x = self.embeddings(x) if self.embeddings is not None else x
            for layer in self.layers:
                x = layer(x)
                x = x[0] if isinstance(x, tuple) else x
            x = self.classifier(self.dropout(x)) if self.classifier is not None else x
        return x.float()


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.reshape(-1, NUM_LABELS), labels.reshape(-1))


def main() -> None:
    parser = gloo_parser(__doc__)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--length", type=int, default=32, help="word pieces of every sentence")
    options = parser.parse_args()
    rank, size = start_gloo(options.store)
    model = Stage(options.model, rank, size, options.precision == "bf16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    stage = PipelineStage(model, rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, options.micro_batches, loss_fn=loss_of)

    def step() -> int:
        optimizer.zero_grad(set_to_none=True)
        tokens = torch.randint(0, 30000, (options.batch, options.length))
        schedule.step(*[tokens] if rank == 0 else [], target=tokens % NUM_LABELS if rank == size - 1 else None)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return tokens.numel()

    take_turns(step, options, rank, dist.barrier)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
