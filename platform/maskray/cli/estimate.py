"""`maskray estimate`: what a run will take, before it is started."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from maskray.cli.rate import rate_of
from maskray.config.load import load
from maskray.config.schema import RunConfig
from maskray.wording import short, time_of

if TYPE_CHECKING:  # a wrong command line must not wait for torch
    from maskray.estimate import Estimate

MILLION = 1_000_000


def add(commands: Any) -> None:
    """Tell the parser of it."""
    parser = commands.add_parser("estimate", help="parameters, operations, memory and hours of a run, by arithmetic")
    parser.add_argument("--config", required=True, type=Path, help="YAML of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. seed=1")
    parser.add_argument("--gpus", type=int, metavar="N", help="workers [cluster.workers]")
    parser.add_argument(
        "--rate", type=float, metavar="FLOP/s", help="what each of them reaches, such as 4e14, for hours"
    )
    parser.set_defaults(command=_estimate)


def _estimate(arguments: argparse.Namespace) -> int:
    gpus = [] if arguments.gpus is None else [f"cluster.workers={arguments.gpus}"]
    config = load(arguments.config, [*arguments.set, *gpus])
    rate = rate_of(arguments.rate)
    from maskray.estimate import estimate

    facts = Table.grid(padding=(0, 3))
    for name, words in _facts(estimate(config), config, rate):
        facts.add_row(name, words)
    Console(highlight=False).print(facts)
    return 0


def _facts(found: Estimate, config: RunConfig, rate: float | None) -> Iterator[tuple[str, str]]:
    first, memory, length = found.costs[0], found.memory, found.length
    forward = found.encoder_flops + found.decoder_flops
    encoder, decoder = first.encoder_parameters, first.decoder_parameters
    yield "parameters", f"{short(encoder + decoder)}: {short(encoder)} encoder, {short(decoder)} decoder"
    shares = f"encoder {found.encoder_flops / forward:.0%}, decoder {found.decoder_flops / forward:.0%}"
    several = "" if len(found.costs) == 1 else f" (mean of {len(found.costs)} mask ratios)"
    yield "training", f"{short(found.training_flops, 'FLOP')} an image{several}: {shares}"
    yield "features", f"{short(first.encode_flops, 'FLOP')} an image, nothing hidden"
    yield "memory", f"{short(memory.total, 'B')} a worker, and what its kernels need as they run"
    yield (
        "  weights",
        f"{short(memory.weights, 'B')}, gradients {short(memory.gradients, 'B')}, "
        f"moments {short(memory.optimizer, 'B')}",
    )
    images = f"{found.micro_batch:,} images in {config.training.precision}"
    yield "  activations", f"{short(memory.activations, 'B')} for {images}; less with a smaller training.micro_batch"
    yield "padding", f"{found.waste:.0%} of the time of {found.workers} workers, in row groups of {length.group_rows}"
    passes = "" if length.passes is None else f"{length.passes:,.4g} passes over the data"
    if length.views is not None:
        yield (
            "length",
            f"{length.views:,} images in steps of {config.optim.global_batch:,}" + (passes and f", {passes}"),
        )
    else:
        yield "length", f"{passes}; there is no dataset at {config.data.path}"
    if rate is not None and (cores := found.decoding_cores(rate)) is not None:
        key = "cluster.cpus_per_worker" if config.data.stream == "local" else "cluster.data_cpus"
        images = f"{found.images_per_second(rate):,.0f} images/s"
        yield "decoding", f"about {cores:,} CPU cores for {images}; with fewer in {key} the workers wait"
    if rate is not None and length.views is not None:
        yield "time", time_of(found.hours(length.views, rate))
    elif rate is not None and length.passes is not None:
        hours = found.hours(length.passes * config.data.views_per_image * MILLION, rate)
        yield "time", f"{time_of(hours)} for each million images of the dataset"
