"""`ray job submit --working-dir . -- python jobs/promote.py …`: the same as `maskray promote …`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "platform"))  # with --working-dir alone it is not importable

from maskray.cli import promote_main

if __name__ == "__main__":
    sys.exit(promote_main())
