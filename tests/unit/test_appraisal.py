"""A model through a list of evaluations: of a checkpoint, of an encoder, of a registered one; and what is refused."""

import json

import numpy as np
import pytest
import torch

from maskray import cli
from maskray.appraisal import _first_images, appraise_here, prepare, record
from maskray.config.evaluation import EvaluateConfig
from maskray.config.load import dump, parse
from maskray.config.resolve import resolve
from maskray.config.schema import IngestConfig
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper
from maskray.data.shards import Dataset
from maskray.data.stream import walk
from maskray.errors import CheckpointError, ConfigError, DataError, MaskrayError
from maskray.models.build import initial_model
from maskray.tracking.mlflow_runs import ensure_run
from maskray.training import checkpoint
from maskray.training.optim import build_optimizer
from registered import MODEL, Registered

ALL = [
    {"kind": "knn", "k": [5, 20]},
    {"kind": "logistic", "labels_per_class": 5, "draws": 2},
    {"kind": "logistic"},
    {"kind": "linear", "label_shares": [0.1], "epochs": 3, "draws": 2},
]
TUNE = {
    "kind": "finetune",
    "labels_per_class": [5],
    "label_shares": [0.1],
    "draws": 2,
    "epochs": 2,
    "least_steps": 4,
    "crop": {"kind": "whole"},
    "flip_probability": 0,
}
PAINT = {"kind": "reconstruction", "ratios": [0.5, 0.9], "images": 8, "figure_images": 2}


@pytest.fixture
def checkpoint_folder(tiny, digits, tmp_path):
    """A checkpoint of a run on the digits, as it begins."""
    config = tiny()
    model = initial_model(config)
    fingerprint = resolve(config, Dataset.open(str(digits)).facts()).fingerprint
    folder = tmp_path / "step_000000010-a"
    folder.mkdir()
    facts = checkpoint.Facts(10, fingerprint, 1, 1, {}, [])
    checkpoint.HostCopy(model, build_optimizer(model, config.optim), facts, dump(config)).write(folder)
    return folder


@pytest.fixture
def config(digits, digits_encoder, tmp_path):
    """config(evaluations, **values) -> EvaluateConfig."""

    def build(evaluations, **values):
        plain = {
            "name": "digits",
            "model": str(digits_encoder),
            "data": {"path": str(digits)},
            "evaluations": evaluations,
            "storage": {"path": str(tmp_path)},
        }
        return parse(EvaluateConfig, plain | values)

    return build


def test_an_encoder_is_judged_beside_itself_before_training_and_the_pixels(config):
    found = appraise_here(prepare(config(ALL)))
    assert {each.features for each in found.scores} == {"model", "untrained", "raw pixels"}
    assert (found.num_train, found.num_test) == (1473, 324)
    by = {(each.evaluation, each.features): each.accuracy for each in found.scores}
    assert len(by) == 3 * 5
    assert by["knn, k 5", "raw pixels"] > 0.95
    assert by["logistic, all labels", "raw pixels"] > 0.9
    assert by["knn, k 5", "untrained"] < by["knn, k 5", "raw pixels"]
    assert json.loads(found.dump())["scores"][0]["evaluation"] == "knn, k 5"


def test_what_is_not_asked_for_is_not_computed(config):
    found = appraise_here(prepare(config([{"kind": "knn"}], untrained=False, raw_pixels=False)))
    assert [each.features for each in found.scores] == ["model"]


def test_untrained_is_another_encoder_than_the_model_and_follows_from_the_seed(config):
    scores = [
        appraise_here(prepare(config([{"kind": "knn"}], raw_pixels=False, seed=seed))).scores for seed in (0, 0, 1)
    ]
    (model, untrained), same, (_, other) = scores
    assert (model.features, untrained.features) == ("model", "untrained")
    assert model.accuracy != untrained.accuracy
    assert same == scores[0]
    assert other.accuracy != untrained.accuracy


def test_what_is_painted_is_held_out(config, checkpoint_folder, digits):
    prepared = prepare(config([PAINT], model=str(checkpoint_folder)))
    first = next(iter(walk(Dataset.open(str(digits)), "held_out", (8, 8), 1))).images_BCHW.numpy()[:8]
    assert np.array_equal(_first_images(prepared, prepared.subject.checkpoint, 8), first)


def test_it_is_the_same_each_time_and_leaves_the_generators_alone(config, tmp_path):
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002  (the global one is what must not be touched)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    # Each with a record of its own, of what was fine-tuned.
    places = [{"path": str(tmp_path / name)} for name in ("one", "same")]
    one, same = (appraise_here(prepare(config([*ALL, TUNE], storage=place))) for place in places)
    assert one == same
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_a_checkpoint_paints_too(config, checkpoint_folder):
    found = appraise_here(prepare(config([PAINT, {"kind": "knn"}], model=str(checkpoint_folder))))
    assert [each.ratio for each in found.likenesses] == [0.5, 0.9]
    assert found.likenesses[0].ssim > found.likenesses[1].ssim
    assert all(png.startswith(b"\x89PNG") for png in found.figures.values())
    assert len(found.figures) == 2
    assert {each.features for each in found.scores} == {"model", "untrained", "raw pixels"}


def test_fine_tuning_stands_beside_the_others_and_alone(config):
    both, alone = (appraise_here(prepare(config(each))) for each in ([{"kind": "knn"}, TUNE], [TUNE]))
    assert [each.evaluation for each in alone.scores] == [
        name for name in ("fine-tuned, 5 labels a class", "fine-tuned, 10 % of the labels") for _ in range(2)
    ]
    assert {each.features for each in alone.scores} == {"model", "untrained"}
    assert both.scores[-4:] == alone.scores
    assert (alone.num_train, alone.num_test) == (1473, 324)
    assert alone.metrics()["evaluation/digits/fine-tuned/5_labels_a_class"] == alone.scores[0].accuracy
    assert json.loads(alone.dump())["scores"][0]["std_of_draws"] == alone.scores[0].std_of_draws


def test_without_untrained_nothing_is_trained_from_scratch(config):
    found = appraise_here(prepare(config([TUNE], untrained=False)))
    assert {each.features for each in found.scores} == {"model"}
    assert "scratch" not in found.scores[0].note


def test_a_checkpoints_decoder_plays_no_part(config, checkpoint_folder):
    """The checkpoint and the encoder that is taken from it are one and the same."""
    from maskray.models.encoder import load_encoder, save_encoder

    prepared = prepare(config([TUNE], model=str(checkpoint_folder)))
    found = prepared.subject.checkpoint
    save_encoder(checkpoint_folder.parent / "encoder", found.model, found.normalize, found.run)
    assert load_encoder(checkpoint_folder.parent / "encoder").width == 16
    of_encoder = prepare(config([TUNE], model=str(checkpoint_folder.parent / "encoder")))
    assert appraise_here(of_encoder).scores == appraise_here(prepared).scores
    assert len(list((checkpoint_folder.parent / "evaluations").iterdir())) == 1


def test_mlflows_run_of_the_model_is_told(config, checkpoint_folder, store, tiny, runs):
    from maskray.launch import card
    from maskray.preparing import prepare as prepare_run

    run_id = ensure_run(store, card(prepare_run(tiny())))
    prepared = prepare(config([PAINT, {"kind": "knn"}], model=str(checkpoint_folder)))
    found = appraise_here(prepared)
    assert record(prepared, found) == run_id
    run = store.client().get_run(run_id)
    assert run.data.metrics["evaluation/digits/knn/k_20"] == pytest.approx(found.scores[0].accuracy)
    assert run.data.metrics["evaluation/digits/reconstruction/ratio_0.9/ssim"] == found.likenesses[1].ssim
    kept = [each.path for each in store.client().list_artifacts(run_id, "evaluation/digits")]
    assert kept == [
        f"evaluation/digits/{name}" for name in ("evaluation.json", *map("reconstruction_{}.png".format, (0.5, 0.9)))
    ]


def test_another_evaluation_of_that_name_replaces_the_first(config, checkpoint_folder, store, tiny, runs):
    from maskray.launch import card
    from maskray.preparing import prepare as prepare_run

    run_id = ensure_run(store, card(prepare_run(tiny())))
    found = []
    for max_rows in (200, None):
        data = {"path": tiny().data.path, "max_rows": max_rows}
        prepared = prepare(config([{"kind": "knn"}], model=str(checkpoint_folder), data=data))
        found.append(appraise_here(prepared))
        record(prepared, found[-1])
    assert found[0].scores[0].accuracy != found[1].scores[0].accuracy
    metrics = store.client().get_run(run_id).data.metrics
    assert metrics["evaluation/digits/knn/k_20"] == pytest.approx(found[1].scores[0].accuracy)


def test_the_card_of_a_registered_version_gets_the_table(config, store, tmp_path, digits):
    registered = Registered(store, tmp_path, digits)
    number = registered.add(16)
    store.client().update_model_version(MODEL, number, "What it is.\n\n## How it was trained\n\nLong.")
    for k in (5, 20):
        prepared = prepare(config([{"kind": "knn", "k": [k]}], model=f"models:/{MODEL}/{number}", untrained=False))
        found = appraise_here(prepared)
        record(prepared, found)
    card = store.client().get_model_version(MODEL, number).description
    assert card.startswith(
        "What it is.\n\n## How it was trained\n\nLong.\n\n## Evaluation digits\n\nAccuracy and its 95 % interval on 324"
    )
    score = found.scores[0]
    shown = f"{100 * score.accuracy:.1f} % ({100 * score.low:.1f} to {100 * score.high:.1f})"
    assert f"| knn, k 20 | {shown} |" in card
    assert "knn, k 5" not in card


def test_a_model_that_mlflow_does_not_know_is_judged_all_the_same(config, checkpoint_folder):
    prepared = prepare(config([{"kind": "knn"}], model=str(checkpoint_folder)))
    assert record(prepared, appraise_here(prepared)) is None


@pytest.fixture
def without_labels(tmp_path):
    from PIL import Image

    for i in range(40):
        path = tmp_path / "plain" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(path)
    settings = {"group_rows": 8, "held_out_fraction": 0.2}
    ingest(
        IngestConfig(source=str(tmp_path / "plain"), destination=str(tmp_path / "data"), **settings), thread_mapper(1)
    )
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({"data": {"path": "nowhere"}}, DataError, r"data\.path: there is no such dataset"),
        ({"model": "nowhere"}, CheckpointError, "^model: there is neither a checkpoint nor an encoder"),
        ({"evaluations": [PAINT]}, ConfigError, r"evaluations: an encoder alone paints nothing"),
        ({"evaluations": [{"kind": "knn", "k": [2000]}]}, ConfigError, r"Found: knn with k 2000\. Allowed: 1 to 1473"),
        ({"model": "models:/digits@champion"}, MaskrayError, "MLflow"),
        ({"model": "models:/digits"}, MaskrayError, r"^model: this names no version"),
        ({"evaluations": [{"kind": "knn", "k": []}]}, ConfigError, r"^evaluations\.0\.k:"),
        ({"name": "a/b"}, ConfigError, "name"),
        ({"evaluations": [{"kind": "logistic", "labels_per_class": 900}]}, DataError, r"Allowed: 1 to 1\d\d"),
        ({"evaluations": [TUNE | {"labels_per_class": [5, 900]}]}, DataError, "finetune with labels_per_class 900"),
        ({"evaluations": [TUNE | {"batch": 1}]}, ConfigError, r"^evaluations\.0\.batch:"),
        ({"evaluations": [TUNE, TUNE]}, ConfigError, "finetune stands there twice"),
    ],
)
def test_mistakes_are_said_before_any_feature_is_computed(config, values, error, match):
    with pytest.raises(error, match=match):
        prepare(config(**({"evaluations": ALL} | values)))


def test_a_dataset_without_labels_is_refused_but_for_reconstructions(config, checkpoint_folder, without_labels):
    data = {"path": str(without_labels)}
    with pytest.raises(DataError, match=r"data\.path: these evaluations need labels.*class folders"):
        prepare(config(ALL, data=data))
    found = appraise_here(prepare(config([PAINT], data=data, model=str(checkpoint_folder))))
    assert len(found.likenesses) == 2


def test_the_command_shows_a_table_and_writes_it(config, checkpoint_folder, tmp_path, capsys):
    path = tmp_path / "evaluate.yaml"
    path.write_text(dump(config([*ALL, PAINT], model=str(checkpoint_folder))))
    arguments = ["evaluate", "--config", str(path), "--launcher", "torch", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("324 held-out images", "knn, k 20", "raw pixels", "PSNR", "not in MLflow", "learning rate"):
        assert words in said
    assert {each.name for each in (tmp_path / "out").iterdir()} == {
        "digits.json",
        "reconstruction_0.5.png",
        "reconstruction_0.9.png",
    }
