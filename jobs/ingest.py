"""`ray job submit --working-dir . -- python jobs/ingest.py …`: the same as `maskray ingest …`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "platform"))  # with --working-dir alone it is not importable

from maskray.cli import ingest_main

if __name__ == "__main__":
    sys.exit(ingest_main())
