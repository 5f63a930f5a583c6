"""`make infra`: all files below `infra/`, as they are now. Exit code 1 where something is wrong."""

import sys

from manifests.files import INFRA, check, manifests

if __name__ == "__main__":
    found = [
        (path, finding) for path in manifests() for finding in check(str(path.relative_to(INFRA)), path.read_text())
    ]
    for path, finding in found:
        print(f"{path.relative_to(INFRA.parent)}: {finding}")
    print(f"{len(manifests())} files, {len(found)} findings")
    sys.exit(bool(found))
