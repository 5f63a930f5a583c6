"""Trainings that follow one another in one group of workers, such as a fine-tuning for each draw of labels.

Starting a group costs seconds, so a list of courses is one run, that may be left anywhere and taken up again: in the
middle of a course, with the results of those before it. A checkpoint of it is a folder like a run's:

    course.pt     state of the course that was under way, and results of those before it; loaded with
                  `weights_only=True`
    state.json    schema version, kind, fingerprint, how far it was; written last
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from maskray.data import lease
from maskray.data.storage import Storage
from maskray.errors import CheckpointError
from maskray.training import checkpoint
from maskray.training.context import LocalWorkerContext, Snapshot, WorkerContext

KIND = "courses"
COURSE = "course.pt"

T = TypeVar("T")
State = dict[str, Any]
"""Tensors, numbers, strings, and dictionaries and lists of them: what `torch.load` reads with `weights_only=True`."""


class Course(Protocol):
    """A training with an end, and what came of it. All workers have one each, and call its methods together."""

    total_steps: int

    def step(self, number: int) -> None:
        """Train on step `number`, from 0; each one once, in their order, from 0 or from where `load` left it."""
        ...

    def state(self) -> State:
        """All that the next step hangs on, but its number: of model and optimiser."""
        ...

    def load(self, state: State) -> None:
        """Go on from a state."""
        ...

    def result(self) -> State:
        """What came of it, after the last step: the same on all workers."""
        ...


Build = Callable[[T, WorkerContext], Course]
"""A course from its description. Picklable: it may be large, and goes once to each machine."""


Tell = Callable[[int, int, int], object]
"""Called with the number of a course, steps done of it, and its steps in all."""


@dataclass
class Progress:
    """How far a list of courses is."""

    results: list[State] = field(default_factory=list)
    """Of the courses that are done."""
    step: int = 0
    """Steps done of the one that is under way."""
    number: int = 0
    """Grows with each step and each result: checkpoints are named by it."""
    course: State | None = None
    """State of the one that is under way, in a checkpoint."""

    def snapshot(self, fingerprint: str) -> Snapshot:
        """A checkpoint to be: copies, so training may go on."""
        held = checkpoint.on_host({"course": self.course, "results": self.results})
        content = {checkpoint.KIND: KIND, "fingerprint": fingerprint, "step": self.step, "number": self.number}

        def write(folder: Path) -> None:
            torch.save(held, folder / COURSE)
            checkpoint.seal(folder, [COURSE], content)

        return write

    @staticmethod
    def read(folder: Path, fingerprint: str) -> Progress:
        """From a checkpoint.

        Raises:
            CheckpointError: damaged, of another schema version, or of other courses.
        """
        said = checkpoint.unsealed(folder, [COURSE])
        if (said.get(checkpoint.KIND), said.get("fingerprint")) != (KIND, fingerprint):
            raise CheckpointError(
                "the checkpoint belongs to another list of trainings",
                key="fingerprint",
                found=f"{said.get('fingerprint')} in {folder}",
                allowed=fingerprint,
                fix="remove that folder, or give this evaluation another name",
            )
        held = torch.load(folder / COURSE, weights_only=True, map_location="cpu")
        return Progress(held["results"], said["step"], said["number"], held["course"])


def run_all(
    build: Build[T],
    asked: Sequence[T],
    context: WorkerContext,
    *,
    fingerprint: str,
    checkpoint_steps: int,
    tell: Tell | None = None,
) -> list[State]:
    """Train one course after the other, from the latest checkpoint or from the start; their results.

    Args:
        build: makes a course of a description, when its turn has come.
        asked: descriptions.
        context: of this worker.
        fingerprint: of all that is trained: a checkpoint of something else is refused.
        checkpoint_steps: steps of a course between two checkpoints; there is one after each result too.
        tell: called after each step.

    Raises:
        CheckpointError: the latest checkpoint is damaged, or of other courses.
        MaskrayError, TrainingError: as the courses do.
    """
    progress = Progress()
    with context.latest_checkpoint() as folder:
        if folder is not None:
            progress = Progress.read(folder, fingerprint)

    def report() -> None:
        # A course's state may take all workers to gather; it is written by the first.
        snapshot = progress.snapshot(fingerprint) if context.rank == 0 else None
        context.report(progress.number, snapshot, probed=False)

    for index in range(len(progress.results), len(asked)):
        course = build(asked[index], context)
        if progress.course is not None:
            course.load(progress.course)
            progress.course = None
        for step in range(progress.step, course.total_steps):
            course.step(step)
            progress.step, progress.number = step + 1, progress.number + 1
            if tell is not None:
                tell(index, step + 1, course.total_steps)
            if progress.step % checkpoint_steps == 0 and progress.step < course.total_steps:
                progress.course = course.state()
                report()
                progress.course = None
        progress.results.append(checkpoint.on_host(course.result()))
        del course  # before the next is built: two models with their optimisers may not fit the device
        progress.step, progress.number = 0, progress.number + 1
        report()
    return progress.results


def run_all_here(
    build: Build[T],
    asked: Sequence[T],
    fingerprint: str,
    checkpoint_steps: int,
    tell: Tell | None = None,
    *,
    root: Storage,
    prefix: str,
    device: torch.device,
) -> list[State]:
    """As `run_all`, in this process; what was done before is kept, where `root` is a local folder.

    Args:
        build: as there.
        asked: descriptions.
        fingerprint: as there.
        checkpoint_steps: as there.
        tell: as there.
        root: where runs are kept.
        prefix: of the run's folder there.
        device: of this process.

    Raises:
        RunConflictError: the same courses are running somewhere else.
        MaskrayError, TrainingError: as `run_all` does.
    """
    with tempfile.TemporaryDirectory(prefix="maskray-") as temporary:
        name = run_name(prefix, fingerprint)
        run = (root if root.is_local else Storage(temporary)).child(name)
        context = LocalWorkerContext(Path(run.uri), device=device, keep_checkpoints=1)
        with lease.hold(run, name, lease.EVALUATION):
            options = {"fingerprint": fingerprint, "checkpoint_steps": checkpoint_steps, "tell": tell}
            return run_all(build, asked, context, **options)  # type: ignore[arg-type]


def run_name(prefix: str, fingerprint: str) -> str:
    """Name and folder of a list of courses: another one for whatever is trained differently."""
    return f"{prefix}-{fingerprint[:8]}"


# ------------------------------------------------------------------------------------------------- for those who train


def summed_gradients(model: nn.Module) -> None:
    """Each gradient summed over all workers, in one transfer; nothing where there is one worker.

    Not DDP, which lays its buckets anew after the first backward pass of each start: a course that is taken up again
    would add in another order.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([each.flatten() for each in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def summed(values: torch.Tensor) -> torch.Tensor:
    """Values of all workers, added up: such as what each found out about its rows, zero for those of others."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values
