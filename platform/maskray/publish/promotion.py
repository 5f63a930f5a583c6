"""Which version of a registered model is its champion: compared on frozen rows, decided once, kept for ever.

Shape letters: N rows, C channels, H and W pixels down and across.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from maskray.config.promotion import FrozenSetConfig, PromotionConfig
from maskray.config.schema import TrackingConfig
from maskray.data.manifest import SplitName
from maskray.data.portions import of_split
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.errors import CheckpointError, ConfigError, DataError, RunConflictError, TrackingError
from maskray.evaluation.blocks import blocks_here
from maskray.evaluation.classification import Labelled, check_classes, name_rows
from maskray.evaluation.features import Features
from maskray.evaluation.logistic import Correct, Labels
from maskray.evaluation.paired import gain
from maskray.evaluation.pictures import BATCH
from maskray.models.encoder import Encoder
from maskray.publish.decisions import Comparison, Decision, EvaluationSet, Kind, Records, champions, packed, yardstick
from maskray.publish.versions import RECORDS_TAG, RegisteredModel, Version, tag_of
from maskray.tracking import mlflow_store

log = logging.getLogger(__name__)

PROMOTIONS = "promotions"
"""Folder of the records, beside the runs."""

Judge = Callable[[Encoder], Correct]
"""Whether an encoder names each row of the frozen set rightly: (N,), in the order of the rows."""


@dataclass
class Desk:
    """Where decisions on one alias of one model are made."""

    model: RegisteredModel
    alias: str
    records: Records

    @classmethod
    def open(cls, config: PromotionConfig, *, decides: bool = True) -> Desk:
        """Reach the registry and the records.

        Args:
            config: of the promotion.
            decides: False leaves no trace where nothing was decided yet.

        Raises:
            TrackingError: no such MLflow or model, or its decisions are kept elsewhere.
            StorageError: the records cannot be kept there.
        """
        uri, path = config.tracking.uri, config.storage.path
        if uri is not None:
            mlflow_store.refuse_missing(uri)
        elif not mlflow_store.has_embedded_store(path):
            raise TrackingError(
                "there is no MLflow store beside the runs",
                key="tracking.uri",
                found=f"null, with storage.path {Storage(path).uri}",
                fix="set storage.path to where the runs are, or tracking.uri to their MLflow",
            )
        store = mlflow_store.open_store(TrackingConfig(uri=uri), path)
        place = Storage(config.records) if config.records is not None else Storage(path).child(PROMOTIONS)
        desk = cls(RegisteredModel(store.uri, config.model), config.alias, Records(place, config.model, config.alias))
        if decides:
            place.check_writable()
            if desk.model.records_of(config.alias) is None:
                desk.model.note_records(config.alias, desk.records.found(), place.uri)
        desk._refuse_other_records()
        return desk

    def settled(self) -> list[Decision]:
        """The decisions, with the alias and all that MLflow shows brought up to them.

        Whoever was killed between a record and its alias leaves the alias behind; and two who set it at once may do so
        in the wrong order. So it is set from the newest record, and looked at again once it is set.
        """
        while True:
            history = self.records.load()
            if not history:
                return history
            self._mend_alias(history[-1])
            self._announce(history)
            if len(self.records.load()) == len(history):
                return history

    def champion(self, history: Sequence[Decision]) -> str | None:
        """By the records; where they know none, the version that somebody gave the alias by hand."""
        decided = history[-1].champion if history else None
        return decided if decided is not None else self.model.aliases().get(self.alias)

    def _refuse_other_records(self) -> None:
        """Decided on in two places, an alias would have two masters."""
        noted, place = self.model.records_of(self.alias), self.records.place.uri
        if noted is not None and noted[0] != self.records.identity():
            raise TrackingError(
                f"the decisions on @{self.alias} of the registered model {self.model.name} are kept elsewhere",
                key="records",
                found=place,
                allowed=noted[1],
                fix="set records to where they are now; where they are lost for good, delete the tag "
                f"{RECORDS_TAG}.{self.alias} of the registered model",
            )

    def _mend_alias(self, newest: Decision) -> None:
        found, wanted = self.model.aliases().get(self.alias), newest.champion
        if wanted is None or found == wanted:
            return
        if wanted not in self.model.versions():
            log.warning("Version %s, which is @%s by decision %d, is not in MLflow", wanted, self.alias, newest.number)
            return
        if found not in (None, newest.champion_before):
            log.warning("@%s led to version %s, which was not decided: moved to %s", self.alias, found, wanted)
        self.model.point(self.alias, wanted)

    def _announce(self, history: Sequence[Decision]) -> None:
        versions = self.model.versions()
        for decision in history:
            version = versions.get(decision.version)
            if version is not None and tag_of(decision) not in version.tags:
                self.model.announce(decision, version)


def promote(config: PromotionConfig, judge: Judge | None = None) -> Decision | None:
    """Decide whether a version becomes the champion; None where it is, and was made it by hand.

    A version that was made champion before gives that decision again, so a promotion that was killed may be repeated.

    Args:
        config: of the promotion.
        judge: other than the evaluation and the rows that the config names.

    Raises:
        MaskrayError: no such model, version or files; a dataset that cannot be judged on, or is not the one that the
            champion was judged on; a newest version that was rolled back.
    """
    desk = Desk.open(config)
    challenger = desk.model.find(config.challenger)
    evaluation, by_config = open_set(config)
    bench = _Bench(desk.model, evaluation, judge or by_config)
    _say_what_it_may_have_seen(challenger, evaluation)
    while True:
        history = desk.settled()
        champion = desk.champion(history)
        if champion == challenger.number:
            log.warning("Version %s of %s is @%s already: nothing to decide", champion, config.model, config.alias)
            return next((d for d in reversed(history) if d.champion == champion and d.kind != "refused"), None)
        _refuse_what_was_rolled_back(config, challenger, history)
        _refuse_another_set(config.data, evaluation, history)
        decision = _decided(config, bench, history, challenger, champion)
        if desk.records.append(decision):
            desk.settled()
            return decision
        log.info("Decision %d was made by somebody else meanwhile: compared anew", decision.number)


def rollback(config: PromotionConfig) -> Decision:
    """Bring the champion's predecessor back, as a new decision.

    Raises:
        ConfigError: there is none, or it was deleted.
        CheckpointError: its files are gone.
        RunConflictError: another champion was made meanwhile.
    """
    desk = Desk.open(config)
    first = None
    while True:
        history = desk.settled()
        stack = champions(history)
        if len(stack) < 2:
            raise ConfigError(
                f"there is no earlier champion of {config.model} to go back to",
                key="--rollback",
                found=f"{len(history)} decisions, champions: {', '.join(stack) or 'none'}",
            )
        now, before = stack[-1], stack[-2]
        if first not in (None, now):
            raise RunConflictError(
                f"version {now} was made champion of {config.model} meanwhile",
                key="--rollback",
                found=f"asked for while version {first} was",
                fix="look at it (--show), and give the command again",
            )
        first = now
        desk.model.encoder(desk.model.find(before, "--rollback"), "--rollback")  # a champion without files helps nobody
        reason = f"back to version {before} from version {now}"
        decision = Decision(len(history) + 1, config.model, config.alias, "rolled_back", before, now, before, reason)
        if desk.records.append(decision):
            desk.settled()
            return decision


def show(config: PromotionConfig) -> tuple[list[Decision], str | None]:
    """All decisions, and the champion. An alias that is behind is mended.

    Raises:
        TrackingError: no such MLflow or model.
    """
    desk = Desk.open(config, decides=False)
    history = desk.settled()
    return history, desk.champion(history)


# ------------------------------------------------------------------------------------------------------ the frozen set


def open_set(config: PromotionConfig) -> tuple[EvaluationSet, Judge]:
    """The frozen rows, and what names them by an encoder.

    Raises:
        DataError: no such dataset, or it has no labels or no held-out rows.
    """
    data = config.data
    dataset = Dataset.open(data.path, data.version)
    if not dataset.manifest.class_names or not dataset.num_rows("held_out"):
        raise DataError(
            "nothing can be judged on this dataset",
            key="data.path",
            found=f"{dataset.storage.uri}, without {'held-out rows' if dataset.manifest.class_names else 'labels'}",
            fix="ingest pictures in class folders, with held_out_fraction above 0",
        )
    train, test = (min(dataset.num_rows(split), data.max_rows) for split in ("train", "held_out"))

    def judge(encoder: Encoder) -> Correct:
        placed = encoder.to(config.device)
        rows = Labelled(*_features(placed, dataset, "train", train), *_features(placed, dataset, "held_out", test))
        check_classes(rows.train_labels, rows.test_labels, list(dataset.manifest.class_names))
        (named,) = name_rows(config.evaluation, rows, seed=config.seed, device=torch.device(config.device))
        (correct,) = named.draws
        return correct

    return EvaluationSet(dataset.manifest.fingerprint, test, train, _measure(config)), judge


def _measure(config: PromotionConfig) -> str:
    """What is done, with all that it depends on."""
    told = config.evaluation.model_dump(mode="json", exclude={"kind", "draws", "labels_per_class", "label_shares"})
    if config.evaluation.kind == "linear":
        told["seed"] = config.seed
    return ", ".join([config.evaluation.kind, *(f"{key} {value}" for key, value in told.items())])


def _features(encoder: Encoder, dataset: Dataset, split: SplitName, num_rows: int) -> tuple[Features, Labels]:
    """Features (N, D) and labels (N,) of a split's first rows, at the size and with the channels of the encoder."""
    images = of_split(dataset, split, BATCH, num_rows)
    features, labels = [], []
    for block in blocks_here(images, encoder, torch.get_num_threads()):
        for bad in block.undecodable:
            raise DataError(
                "an image of the frozen set cannot be decoded, and a set without it is another one",
                key="data.path",
                found=f"{bad.key}, {split} row {bad.row} of {dataset.storage.uri}: {bad.reason}",
                fix="restore the shards (maskray data check names what is damaged)",
            )
        assert block.labels is not None, "it has classes"
        features.append(block.features)
        labels.append(block.labels)
    return np.concatenate(features), np.concatenate(labels)


# -------------------------------------------------------------------------------------------------------- the decision


class _Bench:
    """What each version names rightly, judged once."""

    def __init__(self, model: RegisteredModel, evaluation: EvaluationSet, judge: Judge) -> None:
        self._model, self.evaluation, self._judge = model, evaluation, judge
        self._correct: dict[str, Correct] = {}

    def correct(self, number: str, role: str, history: Sequence[Decision] = ()) -> Correct:
        """Of a version; of one whose files are gone, what an earlier comparison on the same rows kept.

        Raises:
            TrackingError, CheckpointError: it is gone, and no comparison kept its rows.
        """
        if number not in self._correct:
            try:
                self._correct[number] = self._judge(self._model.encoder(self._model.find(number, role), role))
            except (CheckpointError, TrackingError) as error:
                kept = self._kept(number, history)
                if kept is None:
                    raise
                log.warning("%s What an earlier decision kept of it is taken.", error)
                self._correct[number] = kept
        return self._correct[number]

    def _kept(self, number: str, history: Sequence[Decision]) -> Correct | None:
        compared = [d.comparison for d in history if d.comparison and d.comparison.evaluation == self.evaluation]
        return next((rows for c in reversed(compared) if (rows := c.rows_of(number)) is not None), None)


def _decided(
    config: PromotionConfig, bench: _Bench, history: Sequence[Decision], challenger: Version, champion: str | None
) -> Decision:
    """The next decision, by the gate."""
    own = bench.correct(challenger.number, "challenger")
    correct, gained, champion_score = {challenger.number: packed(own)}, None, None
    if champion is not None:
        other = bench.correct(champion, "champion", history)
        correct[champion], champion_score = packed(other), float(other.mean())
        confidence, num_draws = config.gate.confidence, config.gate.bootstrap_draws
        gained = gain(own, other, confidence=confidence, num_draws=num_draws, seed=config.seed)
    compared = Comparison(
        evaluation=bench.evaluation,
        score=float(own.mean()),
        champion_score=champion_score,
        gain=gained,
        gate=config.gate.model_dump(mode="json"),
        seed=config.seed,
        correct=correct,
    )
    kind, reason = verdict(config, compared, challenger.number, champion)
    after = challenger.number if kind == "promoted" else champion
    return Decision(
        len(history) + 1, config.model, config.alias, kind, challenger.number, champion, after, reason, compared
    )


def verdict(config: PromotionConfig, compared: Comparison, challenger: str, champion: str | None) -> tuple[Kind, str]:
    """What the gate says of a comparison, and why, with the numbers."""
    gate, gained = config.gate, compared.gain
    said = f"version {challenger} names {compared.score:.2%} of the {compared.evaluation} rightly"
    holds = True
    if gained is None:
        said += "; there is no champion to compare it with"
    else:
        holds = gained.low > gate.min_gain
        said += (
            f", the champion, version {champion}, {compared.champion_score:.2%}: a gain of {100 * gained.mean:+.2f} "
            f"points, {gate.confidence:.6g} interval {100 * gained.low:+.2f} to {100 * gained.high:+.2f}, whose lower "
            f"end {'is' if holds else 'is not'} above {100 * gate.min_gain:g}"
        )
    if gate.min_score is not None:
        reaches = compared.score >= gate.min_score
        said += f"; it {'reaches' if reaches else 'does not reach'} the floor of {gate.min_score:.2%}"
        holds = holds and reaches
    return ("promoted" if holds else "refused"), said


def _refuse_what_was_rolled_back(config: PromotionConfig, challenger: Version, history: Sequence[Decision]) -> None:
    back = next((d for d in history if d.kind == "rolled_back" and d.champion_before == challenger.number), None)
    if config.challenger is None and back is not None:
        raise ConfigError(
            f"the newest version of {config.model} was rolled back, and is not promoted again unasked",
            key="challenger",
            found=f"null, which is version {challenger.number}; {back}",
            fix=f"register a better one, or name it: --set challenger={challenger.number}",
        )


def _refuse_another_set(config: FrozenSetConfig, evaluation: EvaluationSet, history: Sequence[Decision]) -> None:
    before = yardstick(history)
    if before is not None and before.evaluation != evaluation and not config.rejudge:
        raise ConfigError(
            "champion and challenger must be judged by the same evaluation of the same rows",
            key="data",
            found=f"{evaluation}; the champion was judged on {before.evaluation}",
            fix="name those rows and that evaluation, or set data.rejudge: true to judge both so from here on",
        )


def _say_what_it_may_have_seen(challenger: Version, evaluation: EvaluationSet) -> None:
    if challenger.dataset not in (None, evaluation.dataset):
        log.warning(
            "Version %s was trained on the dataset %s: whether it has seen held-out rows of %s is not known",
            challenger.number,
            challenger.dataset,
            evaluation.dataset,
        )
