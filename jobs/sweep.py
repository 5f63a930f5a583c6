"""`ray job submit --working-dir . -- python jobs/sweep.py …`: the same as `maskray sweep …`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "platform"))  # with --working-dir alone it is not importable

from maskray.cli import sweep_main

if __name__ == "__main__":
    sys.exit(sweep_main())
