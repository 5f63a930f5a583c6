"""Detection: an encoder as the backbone of torchvision's Faster and Mask R-CNN, on data in COCO's format.

Nothing is imported here: torchvision's import takes longer than torch's, and the evaluator is an extra.
"""

from __future__ import annotations

from importlib.util import find_spec

from maskray.errors import ConfigError

_NEEDED = "faster_coco_eval"


def check_installed() -> None:
    """Whether the evaluator is there, without which no module of this room can be imported.

    Raises:
        ConfigError: it is not.
    """
    if find_spec(_NEEDED) is None:
        raise ConfigError(
            "detection is an extra",
            key="evaluations",
            found=f"detection, without {_NEEDED}",
            fix="pip install 'maskray[detection]'",
        )
