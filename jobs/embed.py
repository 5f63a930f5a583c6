"""`ray job submit --working-dir . -- python jobs/embed.py …`: the same as `maskray embed …`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "platform"))  # with --working-dir alone it is not importable

from maskray.cli import embed_main

if __name__ == "__main__":
    sys.exit(embed_main())
