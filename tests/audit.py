"""Known weaknesses of the packages in constraints.txt, by pip-audit: `make audit`.

An audit that could not be done is not one that found nothing. Exit code 1: something was found; 2: not audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
FOUND, NOT_DONE = 1, 2


class Verdict(NamedTuple):
    code: int
    text: str


def verdict(stdout: str, stderr: str) -> Verdict:
    """Of what pip-audit says, as JSON, and complains of."""
    try:
        packages: list[dict[str, Any]] = json.loads(stdout)["dependencies"]
    except (ValueError, LookupError, TypeError):
        said = [line for line in stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        return _not_done(said[-1].strip() if said else "pip-audit says nothing")
    skipped = [f"{each['name']}: {each['skip_reason']}" for each in packages if "skip_reason" in each]
    if skipped or not packages:
        return _not_done(f"{len(skipped)} of {len(packages)} packages could not be asked for. {'; '.join(skipped[:3])}")
    weak = [each for each in packages if each["vulns"]]
    lines = [
        f"{each['name']} {each['version']}: {known['id']}, mended in {', '.join(known['fix_versions']) or 'no version'}"
        for each in weak
        for known in each["vulns"]
    ]
    counts = f"{len(packages)} packages audited, {len(lines)} known weaknesses in {len(weak)} of them."
    return Verdict(FOUND if weak else 0, "\n".join([*lines, counts]))


def _not_done(why: str) -> Verdict:
    return Verdict(NOT_DONE, f"NOT AUDITED: nothing is known of these packages, good or bad. {why[:400]}")


def audit(requirements: Path, *options: str) -> Verdict:
    """Ask for each version in a file of requirements; nothing is resolved or installed."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--no-deps", "--disable-pip"]
    command += ["--progress-spinner", "off", "--format", "json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return verdict(done.stdout, done.stderr)


if __name__ == "__main__":
    found = audit(ROOT / "constraints.txt", *sys.argv[1:])
    print(found.text)
    sys.exit(found.code)
