"""Fine-tuning: each test row once, rates by layer, what fails is left out, and nothing else touched."""

import random
import re

import numpy as np
import pytest
import torch
from timm.loss import SoftTargetCrossEntropy

from fine_tuning import FIVE, RECIPE, units_of, worker
from maskray.config.evaluation import FinetuneEvaluation
from maskray.config.load import parse
from maskray.config.schema import RunConfig
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.errors import ConfigError
from maskray.evaluation import finetune
from maskray.evaluation.classifier import Classifier
from maskray.evaluation.finetune import Asked, Finetuning, asked_of, finetuned
from maskray.evaluation.units import Units
from maskray.models.encoder import Encoder, encoder_only, load_encoder
from maskray.models.normalize import Normalize
from maskray.training import checkpoint
from maskray.training.context import LocalWorkerContext
from maskray.training.courses import run_all, run_all_here

CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------------------------------- rows


def test_all_labels_are_all_rows_and_a_share_is_that_of_each_class(what):
    labels = Dataset.open(what().dataset.storage.uri).labels("train")
    assert np.array_equal(Asked("model", None, 1.0, 0).rows(labels, 0), np.arange(len(labels)))
    for share, draw in ((0.1, 0), (0.1, 1), (0.01, 0)):
        rows = Asked("model", None, share, draw).rows(labels, 3)
        counts = np.bincount(labels[rows], minlength=10)
        assert counts.tolist() == [max(1, round(share * n)) for n in np.bincount(labels)]
    few = [Asked("model", 5, 1.0, draw).rows(labels, 3) for draw in (0, 1)]
    assert all((np.bincount(labels[rows]) == 5).all() for rows in few)
    assert not np.array_equal(*few)


def test_model_and_untrained_learn_from_the_same_rows(what):
    asked = asked_of(what(label_shares=[0.1, 1.0]).evaluation, ["model", "untrained"])
    of = [[each._replace(features="") for each in asked if each.features == name] for name in ("model", "untrained")]
    assert of[0] == of[1]
    assert len(of[0]) == 2 + 2 + 1
    courses = [what()(FIVE._replace(features=features), worker()) for features in ("model", "untrained")]
    assert np.array_equal(courses[0].units.pictures.rows_R, courses[1].units.pictures.rows_R)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_each_test_row_is_named_once(what, world_size, monkeypatch):
    monkeypatch.setattr(finetune, "BATCH", 48)
    monkeypatch.setattr(finetune, "summed", lambda values: values)
    parts = [what(max_rows=300)(FIVE, worker(rank, world_size)).named_test_rows() + 1 for rank in range(world_size)]
    named = sum(parts)
    assert sum((part > 0).int() for part in parts).tolist() == [1] * 300
    monkeypatch.undo()
    assert torch.equal(named - 1, what(max_rows=300)(FIVE, worker()).named_test_rows())


# ---------------------------------------------------------------------------------------------------------------- rates


MODELS = {
    "vit": ({"kind": "vit", "patch": 8, "width": 16, "depth": 3, "heads": 2, "registers": 2}, 5),
    "timm_vit": ({"kind": "timm_vit", "name": "vit_tiny_patch16_224"}, 14),
    "resnet": ({"kind": "sparse_conv", "name": "resnet18"}, 10),
    "convnext": ({"kind": "sparse_conv", "name": "convnextv2_atto"}, 14),
    "conv": ({"kind": "conv", "widths": [8, 16, 32]}, 4),
}
SIZE = (64, 64)


def encoder_of(name):
    config = parse(RunConfig, {"name": "x", "data": {"path": "x"}, "model": MODELS[name][0], "optim": {"steps": 1}})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = encoder_only(config.model, SIZE, 3)
    return Encoder(model, Normalize([0.5] * 3, [0.5] * 3), SIZE, config.model)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Forty pictures of 64 pixels in two classes, and eight held out."""
    from PIL import Image

    from maskray.config.schema import IngestConfig
    from maskray.data.ingest import ingest
    from maskray.data.mapper import thread_mapper

    folder = tmp_path_factory.mktemp("pictures")
    for i in range(48):
        rng = np.random.default_rng(i)
        base = np.array([200, 60, 60] if i % 2 else [60, 60, 200])
        path = folder / f"in/{'red' if i % 2 else 'blue'}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noisy = (base + rng.integers(-50, 50, (64, 64, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(path)
    settings = {"group_rows": 8, "held_out_fraction": 0.2}
    ingest(IngestConfig(source=str(folder / "in"), destination=str(folder / "data"), **settings), thread_mapper(1))
    return Dataset.open(str(folder / "data"))


@pytest.mark.parametrize("name", MODELS)
def test_rates_fall_from_layer_to_layer_towards_the_pixels(name, pictures):
    """And batch normalisation, where there is one, has learned statistics; a step moves every parameter."""
    num_layers = MODELS[name][1]
    recipe = parse(FinetuneEvaluation, {"kind": "finetune"} | RECIPE | {"layer_decay": 0.5, "drop_path": 0.0})
    course = Finetuning(recipe, {"model": encoder_of(name)}, pictures, None, 0, 1)(FIVE, worker())
    before = {k: v.clone() for k, v in course._network.named_parameters()}
    for number in range(3):  # the first one is at rate 0: the warm-up
        course.step(number)
    rates = {}
    layers = course._network.layers()
    assert len(layers) == num_layers
    for group in course.optimizer.param_groups:
        for parameter in group["params"]:
            rates[parameter] = group["lr"]
    of_layer = [{rates[parameter] for _, parameter in layer} for layer in layers]
    assert all(len(each) == 1 for each in of_layer)
    found = [each.pop() for each in of_layer]
    assert found[-1] > 0
    assert found == pytest.approx([found[-1] * 0.5 ** (num_layers - 1 - i) for i in range(num_layers)])
    still = [k for k, v in course._network.named_parameters() if torch.equal(before[k], v)]
    assert still == []
    assert all(int(norm.num_batches_tracked) == 3 for norm in finetune.group_norms(course._network))


@pytest.mark.parametrize("name", MODELS)
def test_drop_path_rises_with_depth(name):
    from timm.layers import DropPath

    network = Classifier(encoder_of(name), 2, 0.3, 8)
    chances = [m.drop_prob for m in network.modules() if isinstance(m, DropPath)]
    if name == "conv":  # it has no residual blocks
        assert chances == []
        return
    assert chances == sorted(chances)
    assert (chances[0], chances[-1]) == (0, pytest.approx(0.3))


def test_no_decay_for_biases_norms_positions_and_tokens():
    network = Classifier(encoder_of("vit"), 2, 0.1, 8)
    optimizer = finetune.build_layered_optimizer(network.layers(), (0.9, 0.999), 0.05, 0.65)
    names = {parameter: name for name, parameter in network.named_parameters()}
    free = {names[p] for group in optimizer.param_groups if not group["decays"] for p in group["params"]}
    assert {"model.pos_embed", "model.cls_token", "model.reg_token", "head.bias", "fc_norm.weight"} <= free
    assert all(n.endswith(("bias", "embed", "token")) or "norm" in n for n in free)
    assert all(group["weight_decay"] == (0.05 if group["decays"] else 0) for group in optimizer.param_groups)


def test_from_scratch_all_layers_learn_alike(what):
    course = what()(FIVE._replace(features="untrained"), worker())
    assert {group["lr_scale"] for group in course.optimizer.param_groups} == {1.0}


def test_the_encoders_own_norm_is_dropped_and_the_encoder_is_left_alone(digits_encoder):
    encoder = load_encoder(digits_encoder)
    network = Classifier(encoder, 10, 0.1, 8)
    assert not any("model.norm" in name for name, _ in network.named_parameters())
    assert isinstance(encoder.model.norm, torch.nn.LayerNorm)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


# ---------------------------------------------------------------------------------------------------------------- steps


def test_the_loss_is_timms_of_soft_targets(what):
    course = what(mixup=0, cutmix=0, batch=8, drop_path=0)(FIVE, worker())
    (unit,) = units_of(course, 0)
    images, targets = course._mixed(0, unit)
    with torch.no_grad():
        wanted = SoftTargetCrossEntropy()(course._network(images), targets)
        assert torch.allclose(course._loss(0, [unit]), wanted)
    assert targets.max(dim=1).values.tolist() == pytest.approx([0.91] * 8)


def test_mixing_follows_from_seed_step_and_unit(what):
    course = what(mixup=0.8, cutmix=1.0)(FIVE, worker())
    unit = units_of(course, 0)[0]
    one, same, other = (course._mixed(step, unit)[1] for step in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.allclose(one.sum(dim=1), torch.ones(len(one)))


def test_the_generators_of_the_process_are_left_alone(what, tmp_path):
    def state():
        of_numpy = np.random.get_state()  # noqa: NPY002 - the global one is what must not be touched
        return torch.get_rng_state().tolist(), of_numpy[1].tolist(), of_numpy[2], random.getstate()

    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    np.random.rand(3)  # noqa: NPY002
    before = state()
    what()(FIVE, LocalWorkerContext(tmp_path))
    run_all(what(), [FIVE], LocalWorkerContext(tmp_path / "run"), fingerprint="f", checkpoint_steps=3)
    assert state() == before


class KilledError(Exception):
    """Stands for SIGKILL."""


def kill_at(moment):
    count = iter(range(1, 1000))

    def tell(index, step, total):
        if next(count) == moment:
            raise KilledError

    return tell


@pytest.mark.parametrize("moment", [1, 4, 8, 9, 13])
def test_a_fine_tuning_that_was_left_ends_as_one_that_was_not(what, tmp_path, moment):
    asked = [FIVE, FIVE._replace(features="untrained")]
    options = {"fingerprint": "f", "checkpoint_steps": 3}
    trained = []

    def build(each, context):
        trained.append(what()(each, context))
        return trained[-1]

    def weights():
        return {k: v.clone() for k, v in trained[-1]._network.state_dict().items()}

    quiet, wanted = run_all(build, asked, LocalWorkerContext(tmp_path / "quiet"), **options), weights()
    with pytest.raises(KilledError):
        run_all(build, asked, LocalWorkerContext(tmp_path / "left"), **options, tell=kill_at(moment))
    found, mine = run_all(build, asked, LocalWorkerContext(tmp_path / "left"), **options), weights()
    assert all(torch.equal(a["named_M"], b["named_M"]) for a, b in zip(found, quiet, strict=True))
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)


def spoilt_loss(network):
    network.head.bias.data[0] = float("nan")


def spoilt_gradient(network):
    """The loss is finite, and so are the gradients of all that comes after."""
    network.model.pos_embed.register_hook(lambda grad: grad * float("nan"))


@pytest.mark.parametrize("spoil", [spoilt_loss, spoilt_gradient])
@pytest.mark.parametrize("is_last", [False, True])
def test_what_is_not_finite_moves_nothing_and_is_the_result(what, spoil, is_last, monkeypatch):
    course = what()(FIVE, worker())
    first = course.total_steps - 1 if is_last else 2
    for number in range(first):
        course.step(number)
    spoil(course._network)
    before = {name: weight.clone() for name, weight in course._network.named_parameters()}
    for number in range(first, course.total_steps):
        course.step(number)
    after = dict(course._network.named_parameters())
    assert all(torch.equal(before[name].nan_to_num(5.0), after[name].nan_to_num(5.0)) for name in before)
    state = course.state()
    said = course.result()
    assert list(said) == ["failed"]
    assert re.search(
        "fine-tuned, 5 labels a class, model, draw 1: a loss or a gradient .* lower base_lr", said["failed"]
    )

    # Taken up again it trains no more.
    again = what()(FIVE, worker())
    again.load(state)
    monkeypatch.setattr(Units, "steps", None)
    again.step(course.total_steps - 1)
    assert again.result() == said


def test_weights_that_the_last_step_ruined_are_seen(what):
    course = what()(FIVE, worker())
    for number in range(course.total_steps):
        course.step(number)
    course._network.head.weight.data[:] = 3e38
    assert "draw 1: what it makes of test images is not finite" in course.result()["failed"]


# ------------------------------------------------------------------------------------------------------------ all of it


def here(what, folder, *progress):
    def train(*arguments):
        return run_all_here(*arguments, root=Storage(folder), prefix="digits", device=CPU)

    return finetuned(what, train, *progress)


def test_scores_come_with_intervals_and_draws_and_are_on_record(what, tmp_path, monkeypatch):
    told = []
    found = here(what(label_shares=[0.1]), tmp_path, lambda *at: told.append(at))
    assert told[-1] == (2 * told[-1][1] // 2, told[-1][1], "fine-tuned, 10 % of the labels, untrained")
    assert [at[0] for at in told if at[2] == "fine-tuned, 5 labels a class, model"] == list(range(1, 17))
    assert [(each.evaluation, each.features) for each in found.scores] == [
        ("fine-tuned, 5 labels a class", "model"),
        ("fine-tuned, 5 labels a class", "untrained"),
        ("fine-tuned, 10 % of the labels", "model"),
        ("fine-tuned, 10 % of the labels", "untrained"),
    ]
    assert all(each.low < each.accuracy < each.high and each.std_of_draws is not None for each in found.scores)
    assert found.scores[0].key == "fine-tuned/5_labels_a_class"
    assert found.scores[0].note == "50 labels, 8 steps; untrained: from scratch"
    assert (found.num_train, found.num_test, found.undecodable) == (1473, 324, [])
    monkeypatch.setattr(finetune.FinetuneCourse, "step", None)  # nothing is trained again
    assert here(what(label_shares=[0.1]), tmp_path) == found


@pytest.mark.parametrize("bad", [{0}, {1}, {0, 1}])
def test_a_draw_that_fails_is_left_out_and_the_others_count(what, tmp_path, monkeypatch, caplog, bad):
    quiet = here(what(), tmp_path / "quiet")
    loss = finetune.FinetuneCourse._loss

    def spoilt(self, step, units):
        return loss(self, step, units) * (float("nan") if self._asked[0] == "model" and self._asked.draw in bad else 1)

    monkeypatch.setattr(finetune.FinetuneCourse, "_loss", spoilt)
    found = here(what(), tmp_path / "spoilt")
    assert found.scores[-1] == quiet.scores[-1]
    assert (found.num_test, found.undecodable) == (324, [])
    said = [record.getMessage() for record in caplog.records]
    for draw in bad:
        assert sum(f"Left out of the scores: {FIVE.name}, model, draw {1 + draw}: a loss" in each for each in said) == 1
    if len(bad) == 2:
        assert len(found.scores) == 1
        assert f"{FIVE.name}, model: no draw is left, and so there is no score" in said
        return
    model, untrained = found.scores
    assert model.note.endswith("; 1 of 2 draws failed and are left out")
    assert (model.std_of_draws, "failed" in untrained.note) == (None, False)
    both = quiet.scores[0]
    assert abs(model.accuracy - both.accuracy) == pytest.approx(both.std_of_draws / 2**0.5)  # one of the two


def test_whatever_is_learned_otherwise_is_another_run(what):
    one = what()
    other = [what(base_lr=0.1), what(max_rows=500), what(keep_bytes=5), what(pass_units=1)]
    assert what(checkpoint_steps=7).fingerprint() == one.fingerprint()
    assert len({each.fingerprint() for each in (one, *other)}) == 5


@pytest.mark.parametrize("package", ["maskray", "torch", "timm"])
def test_what_another_version_found_is_another_run(what, monkeypatch, package):
    before, real = what().fingerprint(), checkpoint.version
    monkeypatch.setattr(checkpoint, "version", lambda name: "0.0.1" if name == package else real(name))
    assert what().fingerprint() != before


def test_images_that_cannot_be_decoded_count_for_nothing(what, tmp_path, monkeypatch):
    from maskray.data import decode as decoding

    real, bad = decoding.decode, set()
    dataset = what().dataset
    for split, number in (("train", 0), ("held_out", 0)):
        bad.add(dataset.read_group(number, split).images[3])

    def decode(data, channels):
        if data in bad:
            raise decoding.UndecodableError("no such luck")
        return real(data, channels)

    monkeypatch.setattr(decoding, "decode", decode)
    monkeypatch.setattr(finetune, "decode", decode)
    found = here(what(labels_per_class=[], label_shares=[1.0], least_steps=2, epochs=0.1), tmp_path)
    assert found.num_test == 323
    (image,) = found.undecodable
    assert (image.row, image.reason) == (3, "no such luck")
    # And whatever would be mixed with one.
    every = Asked("model", None, 1.0, 0)
    for mixing, num in (({}, 1471), ({"mixup": 0}, 1471), ({"mixup": 0, "cutmix": 0}, 1472)):
        course = what(labels_per_class=[], label_shares=[1.0], batch=1473, **mixing)(every, worker())
        units = units_of(course, 0)
        assert sum(int(unit.weights_N.sum()) for unit in units) == num
        if num == 1471:
            (hit,) = (unit for unit in units if 3 in unit.rows_N)
            assert hit.weights_N[hit.rows_N == 3].tolist() == hit.weights_N.flip(0)[hit.rows_N == 3].tolist() == [0]


def test_nothing_to_train_with_is_refused():
    with pytest.raises(ConfigError, match="give labels_per_class or label_shares"):
        parse(FinetuneEvaluation, {"kind": "finetune", "label_shares": []})


def test_few_labels_learn(what, digits):
    """Five labels a class, of the untrained encoder: far better than chance, in a few steps."""
    course = what(base_lr=0.1, epochs=40, batch=50, unit_rows=50, mixup=0, cutmix=0, crop={"kind": "whole"})
    trained = course(FIVE._replace(features="untrained"), worker())
    for number in range(trained.total_steps):
        trained.step(number)
    named = trained.result()["named_M"].numpy()
    assert (named == course.dataset.labels("held_out")).mean() > 0.3
