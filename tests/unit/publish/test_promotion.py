import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from maskray.config.load import parse
from maskray.config.promotion import PromotionConfig
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper
from maskray.data.storage import Storage
from maskray.errors import CheckpointError, ConfigError, DataError, RunConflictError, StorageError, TrackingError
from maskray.evaluation.logistic import Correct
from maskray.evaluation.paired import Gain
from maskray.models.encoder import Encoder
from maskray.publish import promotion
from maskray.publish.decisions import Comparison, EvaluationSet, Records
from maskray.publish.promotion import promote, rollback, show
from maskray.publish.versions import RegisteredModel
from maskray.tracking.mlflow_runs import datasets_in_use
from maskray.tracking.mlflow_store import Store
from registered import MODEL, Registered


@pytest.fixture
def registered(store: Store, tmp_path: Path, digits: Path) -> Registered:
    return Registered(store, tmp_path, digits)


def records(registered: Registered) -> Records:
    return Records(Storage(registered.folder / "promotions"), MODEL, "champion")


# ------------------------------------------------------------------------------------------------------------ the gate

SET = EvaluationSet("d16e57", 1000, 4000, "linear probe")


@pytest.mark.parametrize(
    ("gain", "score", "gate", "expected", "words"),
    [
        (Gain(0.02, 0.001, 0.04), 0.9, {}, "promoted", "is above 0"),
        (Gain(0.02, 0.0, 0.04), 0.9, {}, "refused", "is not above 0"),  # as good is not better
        (Gain(0.02, -0.001, 0.04), 0.9, {}, "refused", "+2.00 points, 0.95 interval -0.10 to +4.00"),
        (Gain(0.02, 0.01, 0.04), 0.9, {"min_gain": 0.01}, "refused", "is not above 1"),
        (Gain(-0.002, -0.009, 0.004), 0.9, {"min_gain": -0.01}, "promoted", "is above -1"),
        (Gain(0.02, 0.01, 0.04), 0.9, {"min_score": 0.91}, "refused", "does not reach the floor of 91.00%"),
        (None, 0.9, {}, "promoted", "no champion to compare it with"),
        (None, 0.9, {"min_score": 0.9}, "promoted", "reaches the floor"),
        (None, 0.9, {"min_score": 0.91}, "refused", "does not reach the floor"),
    ],
)
def test_the_gate(gain: Gain | None, score: float, gate: dict, expected: str, words: str):
    config = PromotionConfig(model="m", data={"path": "unused"}, gate=gate)
    compared = Comparison(SET, score, None if gain is None else score - gain.mean, gain, {}, 0, {})
    kind, reason = promotion.verdict(config, compared, "2", None if gain is None else "1")
    assert kind == expected
    assert words in reason


# --------------------------------------------------------------------------------------------------------- a promotion


def test_the_first_challenger_has_nobody_to_be_compared_with(registered: Registered):
    number = registered.add(16)
    decision = promote(registered.config())
    assert decision is not None
    assert (decision.number, decision.kind, decision.version, decision.champion) == (1, "promoted", number, number)
    assert decision.champion_before is None
    assert "no champion to compare it with" in decision.reason
    assert registered.champion == number
    assert records(registered).load() == [decision]


def test_a_worse_challenger_is_refused_with_the_numbers(registered: Registered):
    good, bad = registered.add(64), registered.add(8)
    promote(registered.config(good))
    decision = promote(registered.config(bad))
    assert decision is not None
    assert (decision.kind, decision.champion) == ("refused", good)
    assert registered.champion == good
    compared = decision.comparison
    assert compared is not None
    assert (compared.evaluation.num_rows, compared.evaluation.num_train) == (324, 400)
    own, other = compared.rows_of(bad), compared.rows_of(good)
    assert own is not None
    assert other is not None
    assert (own.mean(), other.mean()) == (compared.score, compared.champion_score)
    assert compared.gain is not None
    assert compared.gain.mean == pytest.approx(own.mean() - other.mean())
    assert compared.gain.low < compared.gain.mean < compared.gain.high < 0
    for shown in (compared.score, compared.champion_score):
        assert f"{shown:.2%}" in decision.reason
    assert f"{100 * compared.gain.low:+.2f} to {100 * compared.gain.high:+.2f}" in decision.reason
    assert records(registered).load()[1] == decision


def test_mlflow_shows_what_was_decided(registered: Registered):
    first, second = registered.add(8), registered.add(64)
    for number in (first, second, first):
        promote(registered.config(number))
    client = registered.client
    tags = client.get_model_version(MODEL, first).tags
    assert tags["maskray.champion.1"].startswith("decision 1, promoted: version 1 names")
    assert tags["maskray.champion.3"].startswith("decision 3, refused: version 1 names")
    run = client.get_run(client.get_model_version(MODEL, first).run_id)
    note = run.data.tags["mlflow.note.content"]
    assert "decision 1, promoted" in note
    assert "decision 3, refused" in note
    history = client.get_metric_history(run.info.run_id, "promotion/champion/score")
    assert [m.step for m in history] == [1, 3]
    assert run.data.metrics["promotion/champion/gain"] < 0


RATES = [0.1, 1.0]


@pytest.mark.parametrize(
    ("evaluation", "measure"),
    [
        ({"kind": "knn", "k": [5]}, "knn, k [5], temperature 0.07"),
        (
            {"kind": "linear", "label_shares": [1.0], "epochs": 5, "learning_rates": RATES},
            f"linear, learning_rates {RATES}, epochs 5, batch 1024, seed 0",
        ),
    ],
)
def test_the_config_says_what_names_the_rows(registered: Registered, evaluation: dict, measure: str):
    better, worse = registered.add(64), registered.add(8)
    assert promote(registered.config(better, evaluation=evaluation)).kind == "promoted"
    decision = promote(registered.config(worse, evaluation=evaluation))
    assert decision.kind == "refused"
    assert decision.comparison.evaluation.measure == measure
    with pytest.raises(ConfigError, match="judged by the same evaluation"):
        promote(registered.config(worse))


@pytest.mark.parametrize(
    "evaluation",
    [{"kind": "knn", "k": [5, 20]}, {"labels_per_class": 5}, {"kind": "linear", "label_shares": [0.1]}],
)
def test_a_promotion_compares_one_answer_for_each_row(evaluation: dict):
    with pytest.raises(ConfigError, match=r"^evaluation: a promotion compares row by row"):
        parse(PromotionConfig, {"model": "m", "data": {"path": "unused"}, "evaluation": evaluation})


def test_a_promotion_that_is_repeated_decides_nothing_new(registered: Registered, caplog: pytest.LogCaptureFixture):
    registered.add(16)
    assert promote(registered.config()) == promote(registered.config())
    assert "Version 1 of tiny is @champion already" in caplog.text
    assert len(records(registered).load()) == 1


def test_a_promoter_that_loses_compares_anew_with_the_new_champion(registered: Registered):
    """While version 1 is judged, a better one becomes champion: that there was none is no longer true."""
    worse, better = registered.add(8), registered.add(64)
    _, probe = promotion.open_set(registered.config())
    judged = []

    def slow(encoder: Encoder) -> Correct:
        if not judged:
            promote(registered.config(better))
        judged.append(encoder.width)
        return probe(encoder)

    decision = promote(registered.config(worse), judge=slow)
    assert decision is not None
    assert (decision.number, decision.kind, decision.champion_before) == (2, "refused", better)
    assert judged == [8, 64]  # itself once, then the new champion
    assert registered.champion == better


def test_a_loser_that_still_wins_names_whom_it_beat(registered: Registered):
    worse, better = registered.add(8), registered.add(64)
    _, probe = promotion.open_set(registered.config())
    judged = []

    def slow(encoder: Encoder) -> Correct:
        if not judged:
            promote(registered.config(worse))
        judged.append(encoder.width)
        return probe(encoder)

    decision = promote(registered.config(better), judge=slow)
    assert decision is not None
    assert (decision.number, decision.kind, decision.champion_before) == (2, "promoted", worse)
    assert registered.champion == better


# --------------------------------------------------------------------------------------------------- and its way back


def test_rollback_restores_the_champion_before(registered: Registered):
    first, second, third = (registered.add(width) for width in (8, 16, 64))
    for number in (first, second, third):
        promote(registered.config(number))
    decision = rollback(registered.config())
    assert (decision.number, decision.kind, decision.champion_before, decision.champion) == (
        4,
        "rolled_back",
        third,
        second,
    )
    assert registered.champion == second
    assert rollback(registered.config()).champion == first
    assert registered.champion == first
    with pytest.raises(ConfigError, match=r"no earlier champion of tiny.*5 decisions, champions: 1"):
        rollback(registered.config())
    assert len(records(registered).load()) == 5
    # The newest was rolled back: a promotion every night would put it there again.
    with pytest.raises(ConfigError, match=r"rolled back.*--set challenger=3"):
        promote(registered.config())
    again = promote(registered.config(third))
    assert again is not None
    assert (again.number, again.kind, again.champion_before) == (6, "promoted", first)


def test_rollback_of_a_champion_that_was_made_meanwhile_is_refused(
    registered: Registered, monkeypatch: pytest.MonkeyPatch
):
    first, second, third = (registered.add(width) for width in (8, 16, 64))
    for number in (first, second):
        promote(registered.config(number))
    append = Records.append

    def overtaken(self: Records, decision: object) -> bool:
        monkeypatch.setattr(Records, "append", append)
        promote(registered.config(third))
        return self.append(decision)

    monkeypatch.setattr(Records, "append", overtaken)
    with pytest.raises(RunConflictError, match=r"version 3 was made champion"):
        rollback(registered.config())
    assert registered.champion == third


def test_without_decisions_there_is_nothing_to_roll_back(registered: Registered):
    registered.add(8)
    with pytest.raises(ConfigError, match="no earlier champion"):
        rollback(registered.config())


# ------------------------------------------------------------------------------------------- the alias and the records


def test_an_alias_that_was_set_by_hand_before_there_were_records_is_the_champion(registered: Registered):
    by_hand, better = registered.add(8), registered.add(64)
    registered.client.set_registered_model_alias(MODEL, "champion", by_hand)
    assert promote(registered.config(by_hand)) is None
    decision = promote(registered.config(better))
    assert decision is not None
    assert (decision.kind, decision.champion_before) == ("promoted", by_hand)
    assert rollback(registered.config()).champion == by_hand
    assert registered.champion == by_hand


@pytest.mark.parametrize("moved", [True, False])
def test_an_alias_that_was_moved_or_deleted_by_hand_follows_the_record_again(
    registered: Registered, moved: bool, caplog: pytest.LogCaptureFixture
):
    other, champion = registered.add(8), registered.add(64)
    promote(registered.config(champion))
    if moved:
        registered.client.set_registered_model_alias(MODEL, "champion", other)
    else:
        registered.client.delete_registered_model_alias(MODEL, "champion")
    history, shown = show(registered.config())
    assert (len(history), shown) == (1, champion)
    assert registered.champion == champion
    assert ("@champion led to version 1, which was not decided: moved to 2" in caplog.text) == moved


def test_an_alias_that_a_slow_promoter_sets_last_is_not_left_behind(
    registered: Registered, monkeypatch: pytest.MonkeyPatch
):
    first, better = registered.add(8), registered.add(64)
    point = RegisteredModel.point

    def slow(self: RegisteredModel, alias: str, number: str) -> None:
        monkeypatch.setattr(RegisteredModel, "point", point)
        promote(registered.config(better))  # a whole one, between the record and the alias of this one
        point(self, alias, number)

    monkeypatch.setattr(RegisteredModel, "point", slow)
    promote(registered.config(first))
    assert [d.champion for d in records(registered).load()] == [first, better]
    assert registered.champion == better


def test_records_in_two_places_are_refused(registered: Registered, tmp_path: Path):
    registered.add(8)
    elsewhere = registered.config(records=str(tmp_path / "other"))
    assert show(elsewhere) == ([], None)
    assert not (tmp_path / "other").exists()  # who only looks leaves no trace
    promote(registered.config())
    for look in (promote, show, rollback):
        with pytest.raises(TrackingError, match=rf"kept elsewhere.*{tmp_path}/other.*Allowed: {tmp_path}/promotions"):
            look(elsewhere)
    assert promote(registered.config(alias="staging", records=str(tmp_path / "other"))) is not None
    shutil.rmtree(tmp_path / "other")
    (tmp_path / "promotions").rename(tmp_path / "other")  # moved, they are still the same
    history, champion = show(elsewhere)
    assert (len(history), champion) == (1, "1")


def test_records_in_a_bucket(registered: Registered, bucket: str):
    first, second = registered.add(8), registered.add(64)
    for number in (first, second):
        assert promote(registered.config(number, records=f"{bucket}/promotions")) is not None
    assert rollback(registered.config(records=f"{bucket}/promotions")).number == 3
    assert registered.champion == first


def test_the_frozen_set_is_in_use_for_who_deletes_old_versions_of_datasets(registered: Registered):
    registered.add(8)
    decision = promote(registered.config())
    assert decision is not None
    assert decision.comparison.evaluation.dataset in datasets_in_use(registered.store)


def test_a_record_that_is_missing_stops_everything(registered: Registered):
    first, second = registered.add(8), registered.add(64)
    for number in (first, second):
        promote(registered.config(number))
    (registered.folder / "promotions" / "tiny@champion" / "000001.json").unlink()
    with pytest.raises(StorageError, match=r"missing or cannot be read.*000001.json"):
        show(registered.config())


# -------------------------------------------------------------------------------------------------------- what is wrong


def test_unknown_model_version_and_alias_are_named(registered: Registered):
    registered.add(8)
    registered.client.set_registered_model_alias(MODEL, "best", "1")
    for wanted in ("7", "nobody", "@nobody"):
        with pytest.raises(TrackingError, match=rf"Found: {wanted}.*versions 1; aliases best"):
            promote(registered.config(wanted))
    for known in ("1", "best", "@best"):
        assert promote(registered.config(known)) is not None
    with pytest.raises(TrackingError, match=r"no such registered model.*Found: unknown.*Allowed: tiny"):
        promote(registered.config(model="unknown"))


def test_a_model_without_versions(registered: Registered):
    with pytest.raises(TrackingError, match="no version at all"):
        promote(registered.config())


def test_a_challenger_whose_files_are_gone_is_named_and_nothing_is_decided(registered: Registered):
    number = registered.add(8)
    registered.lose(number)
    with pytest.raises(CheckpointError, match=r"challenger: the files of models:/tiny/1 are gone.*model-0"):
        promote(registered.config())
    assert records(registered).load() == []


def test_a_champion_whose_files_are_gone_is_compared_by_what_was_kept_of_it(
    registered: Registered, caplog: pytest.LogCaptureFixture
):
    champion, better = registered.add(8), registered.add(64)
    first = promote(registered.config(champion))
    registered.lose(champion)
    decision = promote(registered.config(better))
    assert "champion: the files of models:/tiny/1" in caplog.text
    assert first is not None
    assert decision is not None
    assert decision.kind == "promoted"
    assert decision.comparison.champion_score == first.comparison.score
    with pytest.raises(CheckpointError, match="files of models:/tiny/1"):
        rollback(registered.config())
    assert registered.champion == better


def test_a_champion_without_files_that_was_never_compared_is_an_error(registered: Registered):
    by_hand = registered.add(8)
    registered.client.set_registered_model_alias(MODEL, "champion", by_hand)
    registered.add(64)
    registered.lose(by_hand)
    with pytest.raises(CheckpointError, match="files of models:/tiny/1"):
        promote(registered.config())


def test_a_champion_that_was_deleted_in_mlflow_can_be_replaced(
    registered: Registered, caplog: pytest.LogCaptureFixture
):
    champion, better = registered.add(8), registered.add(64)
    promote(registered.config(champion))
    registered.client.delete_model_version(MODEL, champion)
    decision = promote(registered.config(better))
    assert "Version 1, which is @champion by decision 1, is not in MLflow" in caplog.text
    assert decision is not None
    assert (decision.kind, registered.champion) == ("promoted", better)


def test_another_frozen_set_is_refused_with_both_named(registered: Registered, digits: Path):
    champion, challenger = registered.add(8), registered.add(64)
    promote(registered.config(champion))
    fewer = {"path": str(digits), "max_rows": 100}
    with pytest.raises(ConfigError, match=r"same rows.*Found: 100 held-out rows .* judged on 324 held-out rows"):
        promote(registered.config(challenger, data=fewer))
    assert len(records(registered).load()) == 1
    decision = promote(registered.config(challenger, data=fewer | {"rejudge": True}))
    assert decision is not None
    assert decision.comparison.evaluation.num_rows == 100
    assert decision.comparison.rows_of(champion).shape == (100,)  # judged anew
    with pytest.raises(ConfigError, match=r"Found: 324 held-out rows .* judged on 100"):
        promote(registered.config(champion))


def test_rows_that_cannot_be_judged_on(registered: Registered, tmp_path: Path, digits: Path):
    from maskray.config.schema import IngestConfig

    registered.add(8)
    nothing_held_out = tmp_path / "all"
    ingest(IngestConfig(source="digits", destination=str(nothing_held_out), held_out_fraction=0), thread_mapper(1))
    with pytest.raises(DataError, match="without held-out rows"):
        promote(registered.config(data={"path": str(nothing_held_out)}))
    with pytest.raises(DataError, match="no such dataset"):
        promote(registered.config(data={"path": str(tmp_path / "nowhere")}))


def test_a_model_trained_on_other_images_is_said_to_be(registered: Registered, caplog: pytest.LogCaptureFixture):
    number = registered.add(8)
    registered.client.set_model_version_tag(MODEL, number, "dataset", "0ther")
    promote(registered.config())
    assert "trained on the dataset 0ther" in caplog.text


def test_no_mlflow_beside_the_runs(registered: Registered, tmp_path: Path):
    config = registered.config(tracking={"uri": None}, storage={"path": str(tmp_path / "nowhere")})
    with pytest.raises(TrackingError, match="no MLflow store beside the runs"):
        promote(config)
    assert not (tmp_path / "nowhere").exists()
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "elsewhere.db")
    with pytest.raises(TrackingError, match="no such SQLite file"):
        promote(registered.config(tracking={"uri": f"sqlite:///{tmp_path}/nowhere.db"}))


def test_the_probe_is_that_of_the_runs_own_judgement_and_draws_nothing(registered: Registered):
    from maskray.data.shards import Dataset
    from maskray.data.stream import walk
    from maskray.evaluation.features import pooled_features
    from maskray.evaluation.logistic import full_accuracy

    registered.add(16)
    model = RegisteredModel(registered.store.uri, MODEL)
    encoder = model.encoder(model.find(None))
    evaluation, judge = promotion.open_set(registered.config())
    before = np.random.get_state()[1].copy()  # noqa: NPY002  (what must not move)
    correct = judge(encoder)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    dataset = Dataset.open(str(registered.dataset))
    inputs = []
    for split, rows in (("train", evaluation.num_train), ("held_out", evaluation.num_rows)):
        groups = list(walk(dataset, split, (8, 8), 1, rows))
        images = np.concatenate([g.images_BCHW.numpy() for g in groups])
        inputs += [
            pooled_features(encoder.model, encoder.normalize, images),
            np.concatenate([g.labels for g in groups]),
        ]
    assert correct.mean() == full_accuracy(*inputs)


def test_nothing_is_said_twice_when_all_is_settled(registered: Registered, caplog: pytest.LogCaptureFixture):
    registered.add(8)
    with caplog.at_level(logging.WARNING):
        promote(registered.config())
        show(registered.config())
    assert caplog.text == ""
