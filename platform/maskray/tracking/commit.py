"""Which commit the code is from, without a word to MLflow."""

from __future__ import annotations

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
