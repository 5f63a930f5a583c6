"""`maskray submit`: a command of maskray's as a job on a cluster that is elsewhere."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from maskray.cli.pretrain import program
from maskray.cli.repair import refuse_unclear_run
from maskray.config.embedding import EmbedConfig
from maskray.config.evaluation import DetectionEvaluation, EvaluateConfig
from maskray.config.load import files_of, load, load_as, parse
from maskray.config.promotion import PromotionConfig
from maskray.config.schema import IngestConfig, RunConfig
from maskray.config.sweep import load_sweep
from maskray.errors import ClusterError, ConfigError

if TYPE_CHECKING:  # a wrong command line must not wait for Ray
    from maskray.on_ray.parcel import Parcel, Resources
    from maskray.on_ray.submit import Ended

FAILED, STOPPED = 1, 143
_TOKEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def add(commands: Any) -> None:
    """Tell the parser of it."""
    parser = commands.add_parser(
        "submit",
        help="run one of these commands as a job on a cluster, and follow it",
        usage="maskray submit [options] -- pretrain --config …\n"
        "       (or sweep, ingest, evaluate, embed, promote, doctor, repair)\n"
        "       maskray submit [--address …] --stop ID | --follow ID",
    )
    parser.add_argument("--address", help="of the cluster's dashboard [RAY_API_SERVER_ADDRESS, http://127.0.0.1:8265]")
    parser.add_argument("--no-wait", action="store_true", help="send it, and do not follow it")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="of the job; no secrets")
    parser.add_argument(
        "--include", action="append", default=[], type=Path, metavar="PATH", help="take a file or folder along"
    )
    parser.add_argument("--submission-id", metavar="ID", help="of the job [made of its config's name and the time]")
    parser.add_argument("--entrypoint-cpus", type=float, metavar="N", help="set aside for the driver itself [none]")
    parser.add_argument("--entrypoint-gpus", type=float, metavar="N", help="as above [none]")
    parser.add_argument("--entrypoint-memory", type=int, metavar="BYTES", help="as above [none]")
    parser.add_argument(
        "--entrypoint-resource", action="append", default=[], metavar="NAME=N", help="as above, one of the cluster's"
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--stop", metavar="ID", help="stop a job, and wait until it has closed what it has open")
    other.add_argument("--follow", metavar="ID", help="follow a job that was sent before")
    parser.add_argument("job", nargs=argparse.REMAINDER, metavar="-- COMMAND …", help="as it would be typed here")
    parser.set_defaults(
        command=_submit, parsers=commands.choices, fail=parser.error, again="Nothing has been sent to the cluster."
    )


def _submit(arguments: argparse.Namespace) -> int:
    if any(os.environ.get(name) for name in _TOKEN):  # Ray reads the mode when it is imported, and sends none without
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    typed = arguments.job[1:] if arguments.job[:1] == ["--"] else arguments.job
    if bool(typed) == bool(arguments.stop or arguments.follow):
        arguments.fail("give the command of a job, or --stop ID, or --follow ID")
    parcel = _parcel(arguments, typed) if typed else None  # what is wrong is said before anything is sent
    from maskray.on_ray.submit import Jobs, address_of

    address = address_of(arguments.address)
    jobs = Jobs(address)
    job = parcel.submission_id if parcel is not None else arguments.stop or arguments.follow
    of_job = f"{program()} submit --address {address}"
    console = Console(highlight=False, stderr=True)
    if arguments.stop:
        arguments.again = f"The job may be stopping; look at it: {of_job} --follow {job}"
        return _say(console, job, jobs.stop(job), wanted="STOPPED")
    stays = f"The job goes on. To follow it: {of_job} --follow {job}, to stop it: {of_job} --stop {job}"
    arguments.again = stays
    if parcel is not None:
        jobs.submit(parcel)
        console.print(f"{job}: {parcel.entrypoint}", markup=False, soft_wrap=True)
        console.print(f"Ctrl-C does not stop it. {stays.partition('. ')[2]}", markup=False, soft_wrap=True)
        if arguments.no_wait:
            return 0
    return _say(console, job, jobs.follow(job, _pass_on))


def _pass_on(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(console: Console, job: str, ended: Ended, wanted: str = "SUCCEEDED") -> int:
    """The end of a job, and the exit code that says the same."""
    console.print(f"{job}: {ended.status}", markup=False)
    if ended.status == wanted:
        return 0
    if ended.status != "FAILED":
        return STOPPED if ended.status == "STOPPED" else 0
    if ended.exit_code is None:  # its entry point was never run, and has said nothing
        console.print(ended.message, markup=False, soft_wrap=True)
    # One that a signal ended has none of its own.
    return ended.exit_code if ended.exit_code is not None and 0 < ended.exit_code < 256 else FAILED


# -------------------------------------------------------------------------------------------------------- what is sent


def _parcel(arguments: argparse.Namespace, typed: list[str]) -> Parcel:
    """What is sent, once it was checked.

    Raises:
        MaskrayError: what is wrong with the command or its config, as the command itself would say it here; or what
            cannot be sent.
    """
    command, *options = typed
    if command not in _CHECKS:
        raise ClusterError("no such job", key="submit", found=command, allowed=", ".join(_CHECKS))
    given = arguments.parsers[command].parse_args(options)
    name, places = _CHECKS[command](given)
    from maskray.on_ray import parcel

    root = Path.cwd().resolve()
    configs = [*files_of(given.config), *_bases(given)] if getattr(given, "config", None) else []
    files = parcel.files_sent(configs, arguments.include, root)
    _refuse_relative(places, root, arguments.include)
    parcel.refuse_credentials({"--": " ".join(options)} | {str(path): path.read_text() for path in configs})
    if configs:
        sent_as = next(sent for sent, path in files.items() if path == configs[0])
        options = list(_with_config(options, sent_as))
    variables, kept = parcel.variables_sent(arguments.env, os.environ)
    if kept:
        console = Console(highlight=False, stderr=True)
        console.print(f"Not sent: {', '.join(kept)}. Secrets come from the environment of the cluster's nodes.")
    verbose = ["-v"] if arguments.verbose else []
    return parcel.Parcel(
        submission_id=arguments.submission_id or _new_id(command, name),
        entrypoint=shlex.join(["python", "-m", "maskray.cli", *verbose, command, *options]),
        files=files,
        variables=variables,
        metadata=parcel.metadata_of(command, name, variables),
        resources=_resources(arguments),
    )


def _new_id(command: str, name: str) -> str:
    return f"{command}-{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"


def _with_config(options: list[str], sent_as: str) -> Iterator[str]:
    """Options with the config's name in the job's folder."""
    rest = iter(options)
    for option in rest:
        name, equals, _ = option.partition("=")
        is_config = len(name) > len("--") and "--config".startswith(name)  # argparse takes the start of a name
        yield f"--config={sent_as}" if is_config else option
        if is_config and not equals:
            next(rest)


def _bases(given: argparse.Namespace) -> Iterator[Path]:
    """Bases of a sweep that `--set` names."""
    for item in given.set:
        if item.startswith("base=") and (base := given.config.parent / item.partition("=")[2]).is_file():
            yield from files_of(base)


def _resources(arguments: argparse.Namespace) -> Resources:
    from maskray.on_ray.parcel import Resources

    custom = {}
    for item in arguments.entrypoint_resource:
        name, _, amount = item.partition("=")
        try:
            custom[name] = float(amount)
        except ValueError as error:
            raise ClusterError(
                "it must read NAME=NUMBER", key="--entrypoint-resource", found=item, allowed="driver=1"
            ) from error
    memory = arguments.entrypoint_memory
    return Resources(arguments.entrypoint_cpus, arguments.entrypoint_gpus, memory, custom)


# -------------------------------------------------------------------------------------------------- what can be checked

Places = Mapping[str, str | None]
"""Keys and the places that they name; those that are written to begin with `>`."""


def _pretrain(given: argparse.Namespace) -> tuple[str, Places]:
    config = load(given.config, given.set)
    return config.name, _places_of_run(config)


def _places_of_run(config: RunConfig) -> Places:
    written = {">storage.path": config.storage.path, ">training.ledger": config.training.ledger}
    return {"data.path": config.data.path, "init_from": config.init_from, **written}


def _sweep(given: argparse.Namespace) -> tuple[str, Places]:
    config = load_sweep(given.config, given.set)
    from maskray.sweeps.space import base_of

    of_run = _places_of_run(base_of(config))
    return config.name, {f">base.{k[1:]}" if k[0] == ">" else f"base.{k}": v for k, v in of_run.items()}


def _ingest(given: argparse.Namespace) -> tuple[str, Places]:
    named = {name: getattr(given, name) for name in IngestConfig.model_fields if hasattr(given, name)}
    config = parse(IngestConfig, named, origin="ingest")
    source = None if config.source == "digits" else config.source
    return "ingest", {"source": source, ">destination": config.destination}


def _evaluate(given: argparse.Namespace) -> tuple[str, Places]:
    config = load_as(EvaluateConfig, given.config, given.set)
    path = config.data.path if config.data is not None else None
    of_detection = {
        f"evaluations.{index}.{split}.{key}": place
        for index, each in enumerate(config.evaluations)
        if isinstance(each, DetectionEvaluation)
        for split, data in (("train", each.train), ("val", each.val))
        for key, place in (("annotations", data.annotations), ("images", data.images))
    }
    return config.name, {
        "model": config.model,
        "data.path": path,
        **of_detection,
        ">storage.path": config.storage.path,
        ">--out": given.out and str(given.out),
    }


def _embed(given: argparse.Namespace) -> tuple[str, Places]:
    config = load_as(EmbedConfig, given.config, given.set)
    read = {"encoder": config.encoder, "images": config.images}
    return "embed", {**read, ">destination": config.destination, **_of_store(config)}


def _promote(given: argparse.Namespace) -> tuple[str, Places]:
    config = load_as(PromotionConfig, given.config, given.set)
    return config.model, {"data.path": config.data.path, ">records": config.records, **_of_store(config)}


def _doctor(given: argparse.Namespace) -> tuple[str, Places]:
    return "doctor", {} if given.config is None else _pretrain(given)[1]


def _repair(given: argparse.Namespace) -> tuple[str, Places]:
    refuse_unclear_run(given)
    return ("repair", {">RUN_FOLDER": given.run}) if given.config is None else _pretrain(given)


def _of_store(config: Any) -> Places:
    """Where MLflow's own store would lie, and the decisions of promotions."""
    return {">storage.path": config.storage.path if config.tracking.uri is None else None}


_CHECKS: dict[str, Callable[[argparse.Namespace], tuple[str, Places]]] = {
    "pretrain": _pretrain,
    "sweep": _sweep,
    "ingest": _ingest,
    "evaluate": _evaluate,
    "embed": _embed,
    "promote": _promote,
    "doctor": _doctor,
    "repair": _repair,
}


def _refuse_relative(places: Places, root: Path, include: list[Path]) -> None:
    """What the job writes to a relative path is lost with it; what it reads there must have been taken along.

    Raises:
        ConfigError: there is such a place.
    """
    taken = [(root / path.expanduser()).resolve() for path in include]
    for key, place in places.items():
        if place is None or ":/" in place or Path(place).expanduser().is_absolute():
            continue
        if key[0] == ">":
            raise ConfigError(
                "a submitted job's own folder does not outlast it",
                key=key[1:],
                found=place,
                allowed="an absolute path that all nodes see, or s3://bucket/prefix",
                fix="give such a path: a relative one lies in that folder",
            )
        whole = (root / place).resolve()
        if not any(whole.is_relative_to(each) for each in taken):
            raise ConfigError(
                "a relative path lies in the job's own folder, and this is not in it",
                key=key,
                found=place,
                allowed="an absolute path that all nodes see, or s3://bucket/prefix",
                fix=f"give such a path, or take it along, if it is small: --include {place}",
            )
