"""The config, its dataset, and the run that they name."""

from __future__ import annotations

from maskray.config.resolve import padding_waste, resolve
from maskray.data import lease
from maskray.data.places import with_absolute_paths
from maskray.data.shards import Dataset
from maskray.data.spec import StreamSpec
from maskray.data.storage import Storage
from maskray.doctor.asking import date_at, s3_endpoint
from maskray.doctor.finding import Check, Finding, Subject, counted, fail, ok, refused, warning
from maskray.models.build import build_normalize, initial_model, weightless_model
from maskray.models.foreign import weights_digest
from maskray.wording import short

_SAMPLE_BYTES = 64 * 2**20


def config(subject: Subject) -> Finding | None:
    """Whether the config is valid, and its model can be made."""
    if subject.config_error is not None:
        return refused(subject.config_error)
    if subject.config is None:
        return None
    if not subject.object_store_is_away:  # pyarrow asks a bucket for its region
        subject.config = with_absolute_paths(subject.config)
    parameters = sum(p.numel() for p in weightless_model(subject.config).parameters())
    return ok(f"{subject.config.name}: {subject.config.model.kind}, {short(parameters)} parameters")


def object_store(subject: Subject) -> Finding | None:
    """Whether S3 answers at all: requests to one that is away are tried again for two minutes."""
    if subject.config is None:
        return None
    places = (subject.config.data.path, subject.config.storage.path, subject.config.init_from or "")
    endpoint = next((s3_endpoint(place) for place in places if place.startswith("s3://")), None)
    if endpoint is None:
        return None
    try:
        date_at(endpoint)
    except OSError as error:
        subject.object_store_is_away = True
        return fail(f"{endpoint} does not answer: {error}", "check network and AWS_ENDPOINT_URL, AWS_REGION")
    return ok(f"{endpoint} answers")


def dataset(subject: Subject) -> Finding | None:
    """Whether the dataset is there, whole, and goes with the config."""
    if subject.config is None or subject.is_away(subject.config.data.path):
        return None
    data = subject.config.data
    found = Dataset.open(data.path, data.version, unreadable=data.unreadable)
    plan = resolve(subject.config, found.facts(), weights_digest(subject.config.init_from))
    StreamSpec.of(subject.config, plan, found)
    build_normalize(subject.config, found.manifest)
    if subject.config.init_from is not None:
        initial_model(subject.config)
    subject.dataset, subject.plan = found, plan
    return ok(
        f"{found.num_rows():,} images, fingerprint {found.manifest.fingerprint[:12]}, for {plan.total_steps:,} steps"
    )


def checksums(subject: Subject) -> Finding | None:
    """Whether a sample of the shards is as it was written."""
    if subject.dataset is None:
        return None
    return ok(f"{short(subject.dataset.check(_SAMPLE_BYTES), 'B')} of the shards are as they were written")


def shares(subject: Subject) -> Finding | None:
    """Whether the workers divide a step."""
    if subject.config is None or subject.plan is None:
        return None
    workers, groups = subject.config.cluster.workers, subject.plan.groups_per_step
    waste = padding_waste(workers, groups)
    if waste:
        better = max(n for n in range(1, workers + 1) if groups % n == 0)
        return warning(
            f"{workers} workers do not divide the {groups} row groups of a step: {waste:.0%} of their time is padding",
            f"--set cluster.workers={better}",
        )
    return ok(f"{counted(groups, 'row group')} a step for {counted(workers, 'worker')}")


def held(subject: Subject) -> Finding | None:
    """Whether a launch has the run: who looks into a run that is slow, or hangs, asks this too."""
    if subject.config is None or subject.plan is None:
        return None
    if subject.is_away(subject.config.storage.path):
        return None
    name = subject.plan.run_name
    holder = lease.holder_of(Storage(subject.config.storage.path).child(name))
    if holder is not None and holder.is_alive():
        return ok(f"{name} is running, {holder.words()}: until it ends, another launch is refused")
    return ok(f"{name}: nobody has it")


CHECKS = [
    Check("S3", object_store),
    Check("config", config),
    Check("dataset", dataset),
    Check("checksums", checksums),
    Check("shares of a step", shares),
    Check("run", held),
]
