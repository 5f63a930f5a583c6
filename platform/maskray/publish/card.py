"""Where an encoder comes from: facts for programs (JSON, tags), and the same facts for people (Markdown)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from maskray.wording import short

SCHEMA_VERSION = 1
LINEAGE, CONFIG, FIGURE = "lineage.json", "config.yaml", "reconstruction.png"
"""Files beside the model."""
VERSION, MODEL_ID = "{version}", "{model_id}"
"""Stand in the card for what the registry gives."""
_FIGURE_ADDRESS = f"ajax-api/2.0/mlflow/logged-models/{MODEL_ID}/artifacts/files?artifact_file_path={FIGURE}"
"""Where MLflow's own pages get a model's file from, relative to them."""
SUBJECTS = {"before": "before pretraining", "after": "after", "pixels": "raw pixels"}


@dataclass(frozen=True)
class Score:
    """What the encoder was worth at the end of its run, or what it is compared with."""

    measure: str
    """Name of the metric."""
    meaning: str
    """Of the measure, in a few words."""
    of: str
    """One of `SUBJECTS`."""
    value: float
    low: float
    high: float
    """95 % interval over held-out images as these."""
    std: float | None = None
    """Between draws of labels."""


@dataclass(frozen=True)
class Trained:
    """What training took."""

    steps: int
    global_batch: int
    views: int
    """Crops trained on: an image counts as often as it was seen."""
    passes: float
    """Over the data."""
    flops: float
    """Forward and backward passes, by arithmetic; recomputation is not counted."""
    seconds: float
    """In the training loop, by the run's own rate: without starts, and steps that a kill made it repeat count once."""
    hours: float
    """Of all workers' accelerators or cores together, as many as the last launch had."""
    hours_of: str
    """`accelerator` or `core`."""
    workers: int
    skipped: tuple[int, ...] = ()
    """Numbers of those of the steps that were left out."""


@dataclass(frozen=True)
class Data:
    """What it was trained on."""

    fingerprint: str
    place: str
    train_rows: int
    held_out_rows: int
    classes: int


@dataclass(frozen=True)
class Lineage:
    """All that is known at the end of a run."""

    model: str
    """Name in the registry."""
    run: str
    run_id: str
    fingerprint: str
    """Of the run's identity."""
    architecture: str
    image_size: tuple[int, int]
    channels: int
    encoder_parameters: int
    feature_width: int
    mask: Mapping[str, Any]
    """The config's section, in full."""
    seeds: Mapping[str, int]
    data: Data
    init_from: str | None
    init_digest: str | None
    code: Mapping[str, str]
    """Git commit where it is known, whether there were changes on it, digest of the sources, versions of Python and of
    the packages: of the launch that finished the run."""
    trained: Trained
    first_loss: float
    last_loss: float
    scores: tuple[Score, ...]
    """Empty where the dataset cannot be probed."""
    scored_rows: int
    """Held-out images that the scores are over."""

    def dump(self) -> bytes:
        """As JSON."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1).encode() + b"\n"

    def tags(self) -> dict[str, str]:
        """The small facts, by which versions are searched."""
        code = {"mlflow.source.git.commit": "maskray.commit", "maskray.sources": "maskray.sources"}
        return {
            "maskray.run": self.run,
            "maskray.fingerprint": self.fingerprint,
            "maskray.architecture": self.architecture,
            "maskray.mask": _mask(self.mask),
            "maskray.seed": ", ".join(str(seed) for seed in self.seeds.values()),
            "maskray.views": str(self.trained.views),
            "maskray.flops": f"{self.trained.flops:.4g}",
            f"maskray.{self.trained.hours_of}_hours": f"{self.trained.hours:.4g}",
            **{tag: self.code[name] for name, tag in code.items() if name in self.code},
        }


def markdown(lineage: Lineage) -> str:
    """The card: what it is worth, how it was trained, on what, how it is loaded. No title: its page has one."""
    height, width = lineage.image_size
    head = (
        f"{lineage.run}: the encoder of a masked autoencoder, {lineage.architecture}, "
        f"{short(lineage.encoder_parameters)} parameters, images of {height} × {width} × {lineage.channels}, "
        f"features of {lineage.feature_width} numbers."
    )
    seen = f"{FIGURE}, beside the model: fixed images under fixed masks, as the finished model paints them."
    return "\n\n".join(
        [
            head,
            *_scores(lineage),
            "## How it was trained",
            table(("", ""), _training(lineage)),
            "## How to load it",
            _loading(lineage),
            "## What it paints",
            f"![reconstructions]({_FIGURE_ADDRESS})",
            f"{seen} All of this, for programs: {LINEAGE}; the whole config: {CONFIG}.",
        ]
    )


def _scores(lineage: Lineage) -> list[str]:
    heading = "## What it is worth"
    if not lineage.scores:
        return [heading, "Not known: the probe was off or failed, or the dataset has no labels or no held-out images."]
    subjects = [s for s in SUBJECTS if any(score.of == s for score in lineage.scores)]
    rows = []
    for measure, meaning in dict.fromkeys((score.measure, score.meaning) for score in lineage.scores):
        found = {score.of: score for score in lineage.scores if score.measure == measure}
        cells = [_percent(found[s]) if s in found else "" for s in subjects]
        rows.append((f"{meaning} (`{measure}`)", *cells))
    said = (
        f"Accuracy on {lineage.scored_rows:,} held-out images, which pretraining never saw; in brackets the 95 % "
        "interval over such images."
    )
    return [heading, said, table(("", *(SUBJECTS[s] for s in subjects)), rows)]


def _percent(score: Score) -> str:
    return percent(score.value, score.low, score.high, score.std)


def percent(value: float, low: float, high: float, std: float | None) -> str:
    """An accuracy with its interval, and its spread between draws where there are several."""
    drawn = "" if std is None else f" ± {100 * std:.1f}"
    return f"{100 * value:.1f}{drawn} % ({100 * low:.1f} to {100 * high:.1f})"


def _training(lineage: Lineage) -> list[tuple[str, str]]:
    trained, data, code = lineage.trained, lineage.data, lineage.code
    changed = ", with uncommitted changes" if code.get("git.uncommitted_changes") == "yes" else ""
    versions = [f"{name.removeprefix('version.')} {code[name]}" for name in code if name.startswith("version.")]
    return [
        ("data", f"{data.train_rows:,} images of `{data.place}`, fingerprint `{data.fingerprint}`"),
        (
            "length",
            f"{trained.steps:,} steps of {trained.global_batch:,} views, {trained.passes:.4g} passes"
            + (f"; left out: steps {', '.join(map(str, trained.skipped))}" if trained.skipped else ""),
        ),
        ("mask", _mask(lineage.mask)),
        ("loss", f"{lineage.first_loss:.4g} first, {lineage.last_loss:.4g} last"),
        (
            "cost",
            f"{short(trained.views)} views, {short(trained.flops, 'FLOP')}, "
            f"{trained.hours:.3g} {trained.hours_of} hours on {_number(trained.workers, 'worker')}",
        ),
        ("seed", ", ".join(f"{seed}" for seed in lineage.seeds.values())),
        ("started from", f"`{lineage.init_from}` (`{lineage.init_digest}`)" if lineage.init_from else "noise"),
        ("code", f"commit `{code.get('mlflow.source.git.commit', 'unknown')}`{changed}"),
        ("packages", ", ".join([f"Python {code.get('python', 'unknown')}", *versions])),
        ("run", f"`{lineage.run_id}`, identity `{lineage.fingerprint}`"),
    ]


def _loading(lineage: Lineage) -> str:
    height, width = lineage.image_size
    return (
        "```python\n"
        "import mlflow.pyfunc\n\n"
        f'encoder = mlflow.pyfunc.load_model("models:/{lineage.model}/{VERSION}")\n'
        f"features = encoder.predict(images)  # uint8 (B, H, W, {lineage.channels}) "
        f"-> float32 (B, {lineage.feature_width})\n```\n\n"
        f"Images of another size are resized to {height} × {width}."
    )


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _mask(mask: Mapping[str, Any]) -> str:
    others = [f"{key} {value}" for key, value in mask.items() if key not in ("kind", "ratio")]
    return ", ".join([f"{mask['kind']}, {mask['ratio']} hidden", *others])


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """In Markdown."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
