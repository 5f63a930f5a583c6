"""Which code it is that runs: its commit, and its sources. Without a word to MLflow."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any, NamedTuple


class Commit(NamedTuple):
    """A git commit, and whether files were changed since."""

    sha: str
    is_changed: bool


def commit_of(package: Path) -> Commit | None:
    """The commit of a package's folder; None where there is no git, no repository, or not the package's own."""
    git = ("git", "-C", str(package))
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10, "check": True}
    try:
        # A package that is installed below some other repository has nothing to do with that one's commits.
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], **options)
        sha = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return Commit(sha, bool(changed))


def sources_digest(package: Path) -> str:
    """Over the names and contents of a package's modules: the same wherever it lies."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
