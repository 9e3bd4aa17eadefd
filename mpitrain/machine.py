"""What a machine does in a second, in the few figures that a training step can be foretold from."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt, ValidationError

from mpitrain.config import Config, describe
from mpitrain.dataset.cache import cache_directory
from mpitrain.errors import UsageError
from mpitrain.files import parse_toml, replace_file, user_path
from mpitrain.sections import Section

Some = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Machine(Section):
    """A machine of nodes that are alike; the text under a field is its help in a file that is written.

    Times are those of a processor (a core, or a GPU) that a rank has for itself.
    """

    name: str = ""
    """whose figures these are"""
    ranks_per_node: PositiveInt = 1
    """that are started on a node"""
    processors_per_node: PositiveInt = 1
    """cores that ranks compute on, or GPUs"""
    gpus: bool = False
    """these are GPUs"""
    memory_gib_per_node: Positive
    """of which all ranks of the node have an even share; with GPUs, theirs together"""
    gflops: Positive
    """of one processor in the passes of a model, 10^9 operations a second"""
    sharing_loss: Some = 0.05
    """by how much passes are slower for each rank more that shares their layers: their products are smaller"""
    sum_gb_per_second: Positive = 2.0
    """gradients of one rank that are summed over the replicas on a node, 10^9 bytes a second"""
    update_mega_per_second: Positive = 150.0
    """parameters that one rank updates, 10^6 a second"""
    step_ms: Some = 1.0
    """of a step besides all else: data, votes"""
    message_us: Some = 50.0
    """from one stage to another"""
    exchange_us: Some = 50.0
    """of ranks of a node that share layers, besides the bytes: eight a layer and micro-batch"""
    exchange_gb_per_second: Positive = 5.0
    """of rows that such a rank gathers or scatters, 10^9 bytes a second"""
    network_us: Some = 20.0
    """latency of a message between nodes"""
    network_gb_per_second: Positive = 1.0
    """of a node to others, 10^9 bytes a second"""

    def text(self) -> str:
        """As a file for `--machine`."""
        lines = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            shown = f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
            lines.append(f"{name} = {shown}  # {field.description}\n")
        return "".join(lines)

    def write(self, file: Path) -> None:
        """Keep it, for other plans.

        Raises:
            UsageError: there is no writing there.
        """
        with user_path("--out", file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, self.text())


def read_machine(file: Path) -> Machine:
    """What a file for `--machine` says.

    Raises:
        UsageError: it cannot be read, or a field of it is wrong: all of them at once.
    """
    try:
        return Machine.model_validate(parse_toml(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(
            f"--machine {file}: cannot be read: {error.strerror}; `plan --out DIR` writes one, DIR/machine.toml"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--machine {file}: is not TOML: {error}") from None
    except ValidationError as error:
        mistakes = "\n  ".join(describe(mistake) for mistake in error.errors())
        raise UsageError(f"--machine {file}:\n  {mistakes}") from None


def kept_file(config: Config, num_ranks: int) -> Path:
    """Where a plan leaves the figures it has measured, for the run that it is of, on a node like this one."""
    options = config.train
    job = [config.model, options.precision, options.batch_size, options.micro_batches, options.recompute, num_ranks]
    node = [platform.machine(), os.cpu_count(), sorted(os.sched_getaffinity(0)), options.device, options.threads]
    digest = hashlib.sha256(json.dumps([job, node]).encode()).hexdigest()
    return cache_directory() / "machines" / f"{digest[:16]}.toml"


def known_machine(config: Config, num_ranks: int) -> Machine | None:
    """Of `--machine`, or what a plan of the same job has measured; None if there is neither.

    Raises:
        UsageError: there is something wrong with the file that was given.
    """
    if config.machine is not None:
        return read_machine(config.machine)
    with suppress(UsageError):
        return read_machine(kept_file(config, num_ranks))
    return None


@dataclass(frozen=True)
class Load:
    """What a job asks of a machine.

    Attributes:
        ranks: of the job.
        sequences: of an epoch.
        length: tokens of a sequence, on average.
    """

    ranks: int
    sequences: int
    length: float
