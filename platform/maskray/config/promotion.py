"""What a promotion is asked: which version is to be champion, judged on what, and how much better it must be."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from maskray.config.evaluation import FeatureEvaluation, KnnEvaluation, LinearEvaluation, LogisticEvaluation
from maskray.config.section import Fraction, PositiveInt, Section, of_kind
from maskray.errors import ConfigError


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


VersionOrAlias = Annotated[str, BeforeValidator(_as_text, json_schema_input_type=int | str), Field(pattern=r"^[^/:]+$")]


class FrozenSetConfig(Section):
    """The rows that champion and challenger are judged on: the same for both, and for all later promotions."""

    path: str
    """Folder or URI of an ingested dataset with labels and held-out rows."""
    version: str | None = None
    """Fingerprint of its version; None takes the newest, and refuses it where the champion was judged on another."""
    max_rows: PositiveInt = 5000
    """Rows at most of each of the training split, whose labels are used, and the held-out split, which is judged."""
    rejudge: bool = False
    """Go over to these rows though the champion was judged on others: it is judged anew, and the decision says so."""


class GateConfig(Section):
    """What a challenger must reach."""

    min_gain: Annotated[float, Field(ge=-1, lt=1)] = 0.0
    """The lower end of the interval of challenger − champion must be above it; below 0 for a challenger that need only
    not be worse by more."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of the paired bootstrap interval."""
    bootstrap_draws: Annotated[int, Field(ge=100, le=1_000_000)] = 10_000
    min_score: Fraction | None = None
    """Least accuracy of a champion, the first one too; None: none is asked for."""


class RunsConfig(Section):
    """Where runs are kept."""

    path: str = "runs"
    """As the runs' own `storage.path`."""


class RegistryConfig(Section):
    """MLflow."""

    uri: str | None = None
    """MLflow's URI, tracking and registry; None: the SQLite store in `storage.path`."""


class PromotionConfig(Section):
    """One promotion."""

    model: Annotated[str, Field(pattern=r"^[^/:.][^/:]*$")]
    """Name of the registered model."""
    challenger: VersionOrAlias | None = None
    """Number of a version, or an alias; None: the newest version, unless it was rolled back."""
    alias: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")] = "champion"
    """Which leads to the model in use."""
    data: FrozenSetConfig
    evaluation: Annotated[FeatureEvaluation, Field(discriminator="kind"), of_kind("logistic")] = LogisticEvaluation()
    """What names the held-out rows: the same for both, one value of it, and every training label. That of a champion's
    last promotion; another is another yardstick, as other rows are (`data.rejudge`)."""
    gate: GateConfig = GateConfig()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the bootstrap."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    """Where features are computed."""
    records: str | None = None
    """Folder or URI that keeps the decisions, one and the same for all who promote this model; None: `promotions` in
    `storage.path`."""
    storage: RunsConfig = RunsConfig()
    tracking: RegistryConfig = RegistryConfig()

    @model_validator(mode="after")
    def _one_answer_for_each_row(self) -> PromotionConfig:
        match self.evaluation:
            case (
                KnnEvaluation(k=(_,))
                | LogisticEvaluation(labels_per_class=None)
                | LinearEvaluation(label_shares=(1.0,))
            ):
                return self
        raise ConfigError(
            "a promotion compares row by row: it wants one evaluation that uses every training label",
            key="evaluation",
            found=self.evaluation.model_dump(mode="json", exclude_defaults=True) | {"kind": self.evaluation.kind},
            allowed="knn with one k, logistic with labels_per_class null, or linear with label_shares [1]",
        )
