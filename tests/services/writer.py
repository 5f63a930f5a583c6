"""One of several processes that write to MLflow at once, as the first worker of a run does: by our own tracker."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from maskray.tracking.mlflow_tracker import MlflowTracker


def main(uri: str, run_id: str, steps: int, keys: int, pause_seconds: float, go: Path) -> None:
    """Log `steps` times `keys` metrics when the file `go` is there; says what that was like, as JSON.

    A file beside it says that this is ready.
    """
    tracker = MlflowTracker(uri, run_id)
    (go.parent / f"ready-{run_id}").touch()
    while not go.exists():
        time.sleep(0.05)
    slowest = 0.0
    for step in range(1, steps + 1):
        start = time.perf_counter()
        tracker.log({f"metric/{key}": step + key / keys for key in range(keys)}, step)
        slowest = max(slowest, time.perf_counter() - start)
        time.sleep(pause_seconds)
    spooled = len(tracker.pending())
    stored = tracker.close(300)
    print(json.dumps({"stored": stored, "slowest_call_seconds": slowest, "spooled": spooled}), flush=True)


if __name__ == "__main__":
    uri, run_id, steps, keys, pause_seconds, go = sys.argv[1:]
    main(uri, run_id, int(steps), int(keys), float(pause_seconds), Path(go))
