"""Peer: Horovod over the same MPI with Hugging Face's BERT, as its examples train it.

    mpirun -np 2 python tests/benchmarks/peers/horovod_mpi.py --model minilm-l6 --batch 64

All is that of ddp_gloo.py, but for who sums. Horovod 0.28.1, the last release, asks for C++14, with which torch's
headers do not compile any more: unpack its source (`pip download --no-binary :all: --no-deps horovod`), let
`CMAKE_CXX_STANDARD` be 20 in CMakeLists.txt and horovod/torch/CMakeLists.txt, and there

    HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITHOUT_GLOO=1 pip install --no-build-isolation .
"""

from __future__ import annotations

import os

import horovod.torch as hvd
import torch
from ddp_gloo import model_of, step_of
from turns import parser_of, take_turns


def main() -> None:
    options = parser_of(__doc__).parse_args()
    hvd.init()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // hvd.size()))
    torch.manual_seed(0)
    model = model_of(options.model)
    adam = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    optimizer = hvd.DistributedOptimizer(adam, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    gradients = step_of(model, optimizer, options, hvd.rank(), hvd.size())

    def step() -> int:
        tokens = gradients()
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with optimizer.skip_synchronize():
            optimizer.step()
        return tokens

    take_turns(step, options, hvd.rank(), hvd.barrier)


if __name__ == "__main__":
    main()
