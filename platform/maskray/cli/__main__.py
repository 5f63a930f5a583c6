"""`python -m maskray.cli`."""

import sys

from maskray.cli import main

if __name__ == "__main__":
    sys.exit(main())
