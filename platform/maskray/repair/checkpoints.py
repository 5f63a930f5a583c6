"""Checkpoints of a run, who wrote them, and Ray Train's record of them."""

from __future__ import annotations

from collections.abc import Iterator

from maskray.errors import CheckpointError, StorageError
from maskray.launch import LAUNCHER
from maskray.on_ray import record
from maskray.on_ray.stream import SNAPSHOT
from maskray.repair.case import Case, Finding, State
from maskray.training import checkpoint

LAUNCHERS = ("ray", "torch")
_OF_BARE_TORCH, _PARTIAL, _ASIDE = "-local", ".partial", "left-out-"
_ON_A_BAD_STEP = "it has trained on a step that the run has since gone back from"


def checkpoints(case: Case) -> Iterator[Finding]:
    """All files of all checkpoints are read: a launch reads but those that it goes on from."""
    case.folders = record.folders_of(case.run)
    wrong = {name: record.flaws(case.run.child(name)) for name in case.folders}
    yield from _without_a_name(case, wrong)
    case.whole = sorted(name for name, flaws in wrong.items() if not flaws)
    listed = record.ever_listed(case.run)
    for name, flaws in ((name, flaws) for name, flaws in wrong.items() if flaws):
        why = "; ".join(flaws)
        if not case.whole:
            yield Finding(State.LEFT, name, why, "kept: there is no checkpoint that is whole")
        elif _may_have_been_finished(case, name, listed):
            yield Finding(State.NOTED, name, why, "left out; a later launch removes it, so copy it now if you want it")
        else:
            case.delete(name)
            yield Finding(State.MENDED, name, why, "removed: it never was a checkpoint")


def _without_a_name(case: Case, wrong: dict[str, list[str]]) -> Iterator[Finding]:
    """Bare torch names a folder once it is full, and goes on from none that has no name yet."""
    left_out = _left_out(case)
    for name in [each for each, flaws in wrong.items() if each.endswith(_PARTIAL) and not flaws and case.run.is_local]:
        named, why = name.removesuffix(_PARTIAL), "bare torch was killed before it named this, which is whole"
        is_there = wrong.get(named) == []
        if is_there or record.has_trained_on(case.run.child(name), left_out):
            case.delete(name)
            yield Finding(
                State.MENDED, name, f"{why}; but {'there is another' if is_there else _ON_A_BAD_STEP}", "removed"
            )
        else:
            case.rename(name, named)
            wrong[named] = []
            yield Finding(State.MENDED, name, why, f"renamed to {named}")
        del wrong[name]


def _may_have_been_finished(case: Case, name: str, listed: list[str] | None) -> bool:
    """`state.json` is written last, and may be lost all the same: who put a folder on record had seen all of it."""
    if case.run.exists(f"{name}/{checkpoint.STATE}"):
        return True
    if _is_of_torch(name):  # which names a folder once it is full
        return not name.endswith(_PARTIAL)
    return listed is None or name in listed  # without a record nobody knows


def launcher(case: Case) -> tuple[str, list[Finding]]:
    """Who the run goes on with."""
    try:
        said = case.run.read_bytes(LAUNCHER).decode(errors="replace").strip()
    except FileNotFoundError:
        said = ""
    of_ray = case.run.exists(SNAPSHOT) or any(not _is_of_torch(name) for name in case.folders)
    wrote = "ray" if of_ray or not case.folders else "torch"
    wanted = case.launcher or (said if said in LAUNCHERS else wrote)
    if said == wanted or not (said or case.folders or case.launcher):
        return wanted, []
    case.write(LAUNCHER, wanted.encode())
    why = f"it says {said[:40]!r}" if said else "it is missing"
    done = "as was asked for" if case.launcher else "who wrote the checkpoints"
    return wanted, [Finding(State.MENDED, LAUNCHER, why, f"written anew: {wanted}, {done}")]


def _is_of_torch(name: str) -> bool:
    return name.removesuffix(_PARTIAL).endswith(_OF_BARE_TORCH)


def record_of_torch(case: Case) -> Iterator[Finding]:
    """Bare torch goes by the folders: it would take the newest, and refuse it."""
    for name in _of_bad_steps(case):
        aside = f"{_ASIDE}{name}"
        case.rename(name, aside)
        case.folders.remove(aside)  # to everyone it is no checkpoint any more
        yield Finding(State.MENDED, name, _ON_A_BAD_STEP, f"renamed to {aside}, which no launch looks at")
    if case.run.exists(SNAPSHOT):
        case.delete(SNAPSHOT)
        yield Finding(
            State.MENDED, SNAPSHOT, "bare torch does not keep Ray's record: it grows old", f"removed; {case.goes_on}"
        )


def record_of_ray(case: Case) -> Iterator[Finding]:
    """Train goes by its record."""
    is_lost = bool(case.folders) and not case.whole
    for name in _of_bad_steps(case):
        yield Finding(State.NOTED, name, _ON_A_BAD_STEP, "left out; a later launch removes it")
    try:
        found = record.read(case.run)
        why = _contradiction(case, found)
    except StorageError:  # a ValueError too; the record may be sound
        raise
    except ValueError as error:
        why = " ".join(str(error).split())[:200]
    if not why:
        return
    if is_lost:
        again = f"restore a checkpoint from a copy, or delete {case.run.uri} to begin anew"
        yield Finding(State.LEFT, SNAPSHOT, f"{why}; and no checkpoint is whole", again)
        return
    if not case.dry_run:
        record.make_again(case.run, case.whole)
    yield Finding(State.MENDED, SNAPSHOT, why, f"made again from what is whole; {case.goes_on}")


def _of_bad_steps(case: Case) -> list[str]:
    """Those that the run cannot go on from, no more among the whole ones."""
    left_out = _left_out(case)
    found = [name for name in case.whole if record.has_trained_on(case.folder(name), left_out)]
    case.whole = [name for name in case.whole if name not in found]
    return found


def _left_out(case: Case) -> set[int]:
    try:
        return record.steps_left_out(case.run)
    except CheckpointError:  # `_rewinds` tells of it
        return set()


def _contradiction(case: Case, found: record.Record | None) -> str:
    """What the folders say against the record; nothing where they do not."""
    if found is None:
        return "there is none" if case.whole else ""
    if damaged := sorted(set(found.names) - set(case.whole)):
        return f"it lists what is not whole: {', '.join(damaged)}"
    newer = [name for name in case.whole if record.is_newer(name, found)]
    return f"it does not know of {', '.join(newer)}, newer and whole" if newer else ""
