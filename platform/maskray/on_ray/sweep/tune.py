"""A sweep's trials on Ray Tune, which runs them and remembers nothing.

What is next and who goes on is decided by `sweeps`, on files of the sweep's own; Tune's snapshots are never read.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import ray
from ray import tune
from ray.tune.execution import class_cache

from maskray.calibration import seconds_per_step
from maskray.config.schema import ClusterConfig, RunConfig
from maskray.config.training import FOR_CUBLAS
from maskray.credentials import NAMED
from maskray.data.storage import Storage
from maskray.errors import ClusterError
from maskray.on_ray import background, room, shared
from maskray.on_ray.cluster import wait_for_trial
from maskray.on_ray.growth import may_grow
from maskray.on_ray.sweep import nested, trial
from maskray.on_ray.sweep.book import Asking, Book, Deciding, Show, survive_lost_processes
from maskray.on_ray.sweep.trial import Sweep
from maskray.sweeping.preparing import Prepared

log = logging.getLogger(__name__)

_ENVIRONMENT = {  # read by Tune
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "5",  # what hangs does not answer when it is told to stop
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they are kept, and their last words shown
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_MANY = 10**9

Train = Callable[..., None]
"""What Tune runs of each trial: takes Tune's config of it, and `sweep`."""


def run(prepared: Prepared, parent: str, show: Show, train: Train = trial.run) -> None:
    """Run what is left of a sweep on the cluster that is connected; what comes of it is on record.

    Args:
        prepared: by `sweeping.preparing.prepare`.
        parent: the sweep's run in MLflow.
        show: told of each trial that ends.
        train: as `trial.run`.

    Raises:
        ClusterError: the cluster cannot hold so many trials at once, or any.
        MaskrayError: what came of a trial cannot be put on record.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    concurrency = _concurrency_of(prepared)
    if prepared.config.trials.concurrency is None and may_grow():
        log.warning("Trials at once: %d, for which there are nodes; trials.concurrency asks for more", concurrency)
    # One that waits for a process of its own is given that of one that ends: with fewer, processes start for nothing.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(concurrency)
    for name in ("tune", "execution.tune_controller"):  # they say again, in Tune's words, what came of trials
        logging.getLogger(f"ray.tune.{name}").setLevel(logging.CRITICAL)
    survive_lost_processes()
    keep_secrets()
    config = prepared.config
    sweep = Sweep(
        folder=prepared.folder,
        store=prepared.store,
        parent=parent,
        metric=config.objective.metric,
        limit_seconds=config.trials.limit_seconds,
        code=prepared.code,
    )
    book = Book(prepared, sweep, prepared.queue(), concurrency, show)
    trainable = tune.with_resources(partial(train, sweep=sweep), resources_of(prepared.space.base.cluster))
    # Tune's files are the driver's alone: trials hand it no checkpoints, so their processes do not look there.
    with tempfile.TemporaryDirectory(prefix="maskray-", ignore_cleanup_errors=True) as folder:
        tuner = _tuner(trainable, book, folder)
        try:
            # In the main thread Tune would put handlers of its own in place.
            background.call("maskray-tune", tuner.fit).result()
        except BaseException as error:
            book.close()  # no trial goes on while MLflow is told how it ended
            if isinstance(error, Exception) and book.error is not None:
                raise book.error from error  # of which Tune made a text
            raise


def _tuner(trainable: Callable[..., None], book: Book, folder: str) -> tune.Tuner:
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=Asking(book),
            scheduler=Deciding(book),
            num_samples=_MANY,  # until the search says that there are no more
            reuse_actors=True,  # imports are paid once for each process
            trial_dirname_creator=lambda each: each.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder,
            callbacks=[book],
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    )


def resources_of(cluster: ClusterConfig) -> dict[str, float] | tune.PlacementGroupFactory:
    """What a trial takes, as Tune has it: its own process, or its workers."""
    return nested.resources(cluster) if cluster.workers > 1 else of_worker(cluster)


def of_worker(cluster: ClusterConfig) -> dict[str, float]:
    """What each takes, as Ray has it."""
    gpus = {"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}
    return {"CPU": cluster.cpus_per_worker, **gpus}


def concurrency_of(prepared: Prepared) -> int:
    """Trials at once, when there is a place for the first of them: it is waited for, visibly.

    Raises:
        ClusterError: the cluster has no room for so many, or for any, and no autoscaler; none was free, or could be
            brought, within `cluster.wait_seconds`; or there are places that not all of its nodes reach.
    """
    concurrency = _concurrency_of(prepared)
    if wait_for_trial(prepared.space.base.cluster):
        _check_places(prepared)  # again: nodes may have come
    return concurrency


def _concurrency_of(prepared: Prepared) -> int:
    _check_places(prepared)
    asked, cluster = prepared.config.trials.concurrency, prepared.space.base.cluster
    needs, nodes = of_worker(cluster), room.amounts()
    holds = nested.concurrency(cluster, nodes)
    if may_grow():  # how far, nobody says: it is asked for what is asked for here
        return asked or max(holds, 1)
    each = ", ".join(f"{need:g} {name}{'' if need == 1 else 's'}" for name, need in needs.items())
    each = each if cluster.workers == 1 else f"{cluster.workers} workers with {each}"
    if not holds:
        has = Counter(", ".join(f"{node[name]:g} {name}s" for name in needs) for node in nodes)
        all_have = "; ".join(what if number == 1 else f"{number} × {what}" for what, number in has.items())
        several = f"a worker lies on one node, and the nodes have {all_have}"
        raise ClusterError(
            "there is no room for a trial",
            key="cluster.cpus_per_worker" if cluster.workers == 1 else "cluster.workers",
            found=f"{each} for a trial",
            allowed=f"what one node has: {'; or '.join(has)}" if cluster.workers == 1 else several,
            fix="ask for less, under overrides: cluster.cpus_per_worker, cluster.gpus_per_worker"
            + (", cluster.workers" if cluster.workers > 1 else ""),
        )
    if asked is not None and asked > holds:
        raise ClusterError(
            f"the cluster has room for {holds} trial{'' if holds == 1 else 's'} at once",
            key="trials.concurrency",
            found=f"{asked} of {each} each",
            allowed=f"at most {holds}",
            fix="ask for fewer at once, or for smaller ones, under overrides: cluster.cpus_per_worker",
        )
    return asked or holds


def _check_places(prepared: Prepared) -> None:
    base = prepared.space.base
    shared.check_runs(Storage(base.storage.path), prepared.store.uri)
    shared.refuse_if_not_everywhere(base.data.path, "data.path", "sweep")


def measure(configs: Sequence[RunConfig]) -> list[float]:
    """Seconds that a step of each config takes, with the resources of a trial and nothing beside it."""
    resources = of_worker(configs[0].cluster)
    timed = ray.remote(
        num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), max_retries=0, runtime_env={"env_vars": FOR_CUBLAS}
    )(seconds_per_step)
    # One after another: what runs beside a trial takes some of its time.
    return [ray.get(timed.remote(config)) for config in configs]


def keep_secrets() -> None:
    """Have Tune leave the keys of an object store out of a trial's runtime environment, which Ray's dashboard shows."""
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if not NAMED.search(name)}
