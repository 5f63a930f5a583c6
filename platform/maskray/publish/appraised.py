"""What came out of a model's evaluations, for programs and for people."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from maskray.data.embeddings import Undecodable
from maskray.evaluation.likeness import Likeness
from maskray.evaluation.scores import Score
from maskray.publish.card import percent, table

if TYPE_CHECKING:  # an extra, and long in coming
    from maskray.evaluation.detection.coco import SetAside
    from maskray.evaluation.detection.outcome import DetectionScore


@dataclass(frozen=True)
class Appraisal:
    """What came out."""

    name: str
    """Of the config."""
    model: str
    """What was judged."""
    dataset: str | None
    """Fingerprint; None: detection alone was asked for."""
    num_train: int
    num_test: int
    scores: tuple[Score, ...]
    likenesses: tuple[Likeness, ...]
    detections: tuple[DetectionScore, ...]
    figures: dict[str, bytes]
    """PNG by the name of what it shows."""
    undecodable: tuple[Undecodable, ...]
    """Images that count for nothing in any score."""
    set_aside: tuple[SetAside, ...]
    """Annotations and images that count for nothing in detection."""

    def metrics(self) -> dict[str, float]:
        """As MLflow is told them: shares with the ends of their intervals, likeness by ratio, average precision."""
        out = dict[str, float]()
        for each in self.scores:
            ends = {"": each.accuracy, "/low": each.low, "/high": each.high}
            out |= {f"evaluation/{self.name}/{each.key}{end}": value for end, value in ends.items()}
        for like in self.likenesses:
            of_ratio = {"loss": like.loss, "psnr_db": like.psnr, "ssim": like.ssim}
            at = f"evaluation/{self.name}/reconstruction/ratio_{like.ratio:g}"
            out |= {f"{at}/{name}": value for name, value in of_ratio.items()}
        for found in self.detections:
            out |= {f"evaluation/{self.name}/{name}": value for name, value in found.metrics().items()}
        return out

    def markdown(self) -> str:
        """Accuracies and average precision, for people."""
        parts = list[str]()
        if self.scores:
            said = f"Accuracy and its 95 % interval on {self.num_test:,} held-out images of dataset `{self.dataset}`."
            parts.append(f"{said}\n\n{self._accuracies()}")
        if self.detections:
            first = self.detections[0]
            said = f"Average precision in % on {first.num_images:,} images with {first.num_objects:,} objects."
            parts.append(f"{said}\n\n{self._precisions()}")
        return "\n\n".join(parts)

    def _accuracies(self) -> str:
        kinds = dict.fromkeys(score.features for score in self.scores)
        cells: dict[str, dict[str, str]] = {}
        for s in self.scores:
            shown = percent(s.accuracy, s.low, s.high, s.std_of_draws)
            cells.setdefault(s.evaluation, {})[s.features] = shown
        return table(("", *kinds), [(name, *(row.get(kind, "") for kind in kinds)) for name, row in cells.items()])

    def _precisions(self) -> str:
        rows = [
            (f"{each.precision.of}, {each.features}", *(f"{100 * value:.1f}" for value in each.precision.main))
            for each in self.detections
        ]
        return table(("detection", "AP", "AP50", "AP75"), rows)

    def dump(self) -> str:
        """As JSON, without the figures."""
        plain = {key: value for key, value in asdict(self).items() if key != "figures"}
        plain["likenesses"] = [each._asdict() for each in self.likenesses]
        plain["undecodable"] = [each._asdict() for each in self.undecodable]
        plain["set_aside"] = [each._asdict() for each in self.set_aside]
        return json.dumps(plain, indent=1) + "\n"
