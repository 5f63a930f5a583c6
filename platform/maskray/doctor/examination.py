"""All checks, one after the other. To add one: a function, and its entry in `CHECKS` of the module it belongs to."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator, Sequence

from maskray.doctor.finding import Check, Finding, Subject, fail, refused
from maskray.errors import MaskrayError

# In the order of the report: later checks build on what earlier ones found. Each is imported when it is its turn, since
# a package that cannot be imported is a finding, and those before it are said.
MODULES = ("environment", "run", "machine", "cluster", "places", "numerics")


def examine(subject: Subject, modules: Sequence[str] = MODULES) -> Iterator[tuple[str, Finding | None]]:
    """Name and finding of each check as it is made; None where there was nothing to look at. Nothing is raised."""
    with subject.closing:
        for module in modules:
            try:
                checks = importlib.import_module(f"maskray.doctor.{module}").CHECKS
            except Exception as error:  # noqa: BLE001 - whatever an import does, the others are to be made
                yield module, fail(f"cannot be imported: {_said(error)}", "install anew what the traceback names")
                continue
            for check in checks:
                yield check.name, made(check, subject)


def made(check: Check, subject: Subject) -> Finding | None:
    """What a check says; a check that breaks, or hangs, says so."""
    said: list[Finding | None] = []

    def make() -> None:
        try:
            said.append(check.look(subject))
        except MaskrayError as error:
            said.append(refused(error))
        except Exception as error:  # noqa: BLE001 - a check that breaks says nothing of the others
            said.append(fail(f"the check itself broke: {_said(error)}", "please report it"))

    # A thread that hangs in a call of the system's, on a disk that is away, cannot be ended: it ends with the process.
    thread = threading.Thread(target=make, name=f"maskray-doctor-{check.name}", daemon=True)
    thread.start()
    thread.join(check.limit_seconds)
    if not said:
        return fail(
            f"no answer within {check.limit_seconds:g} s", "see whether what it asks hangs: network, disk, server"
        )
    return said[0]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
