"""A model as it is trained."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import maskray
from maskray import masking
from maskray.errors import CheckpointError
from maskray.evaluation.reconstruction import reconstruct
from maskray.models.build import initial_model
from maskray.models.normalize import Normalize
from maskray.objective import Objective
from maskray.pretrain import SOURCES, placed, pretrain
from maskray.tracking.base import MemoryTracker
from maskray.tracking.commit import sources_digest
from maskray.training import checkpoint, folders
from maskray.training.context import LocalContext

IMAGES = 8


@pytest.mark.parametrize("ratios", [0.75, [0.25, 0.5, 0.75]])
def test_a_compiled_model_has_a_graph_of_static_shapes_for_each_ratio_whatever_was_drawn_before(tiny, ratios):
    torch._dynamo.reset()
    config = tiny(mask={"ratio": ratios}, training={"compile": True})
    graphs = []

    def backend(graph, inputs):
        graphs.append([each for each in inputs if not torch.is_tensor(each)])
        return graph.forward

    model = placed(initial_model(config), torch.device("cpu"), config.training, backend)
    pixels = torch.zeros(3, config.data.channels, *config.data.image_size, dtype=torch.uint8)
    normalize, objective = (
        Normalize.from_kind("symmetric", config.data.channels),
        Objective(config.objective, config.cell),
    )
    reconstruct(model, normalize, objective, pixels.numpy(), config.mask, seed=0)
    assert not graphs
    counts = masking.visible_counts(config.mask, config.grid)
    images = torch.randn(IMAGES, config.data.channels, *config.data.image_size)
    for num_visible in counts * 2:
        key = {"seed": 0, "pass_": 0, "rows": np.arange(IMAGES), "view": 0}
        visible = torch.from_numpy(masking.draw(config.mask, config.grid, num_visible, **key))
        num_target = visible[0].numel() - num_visible
        model(images, visible, num_visible, ~visible, num_target, torch.ones(IMAGES)).sum().backward()
    assert graphs == [[]] * len(counts)


def test_steps_at_which_it_is_probed_are_logged_and_kept_and_change_nothing_that_is_learned(tiny, tmp_path):
    weights, steps = {}, {}
    for at in [(), (3, 7, 12)]:  # 12 is the last step: the last judgement is not on the way
        config, probed, tracker = tiny(training={"probe_at": at}), [], MemoryTracker()
        context = LocalContext(
            tmp_path / str(len(at)), config.data, keep_checkpoints=9, probe=lambda folder, to=probed: to.append(folder)
        )
        assert pretrain(config, context, tracker) == 12
        assert [folders.step_of(folder.name) for folder in probed] == [step for step in at if step < 12]
        steps[at] = [point.step for point in tracker.store.points if point.key == "pretrain/loss"]
        with context.latest_checkpoint() as folder:
            weights[at] = (folder / checkpoint.WEIGHTS).read_bytes()
    assert steps == {(): [2, 4, 6, 8, 10, 12], (3, 7, 12): [2, 3, 4, 6, 7, 8, 10, 12]}
    assert weights[()] == weights[(3, 7, 12)]


@pytest.fixture
def begun(tiny, tmp_path):
    """The config of a run that has ended, its context, and its first checkpoint, as if it had come no further."""
    config = tiny()
    context = LocalContext(tmp_path / "run", config.data, keep_checkpoints=9)
    pretrain(config, context, MemoryTracker())
    first, *others = sorted((tmp_path / "run").glob(f"{folders.FOLDER_PREFIX}*"))
    ended = (others[-1] / checkpoint.WEIGHTS).read_bytes()
    for folder in others:
        shutil.rmtree(folder)
    return config, context, first, ended


def altered(folder, **changes):
    """What a checkpoint says of itself, as another set of packages, or another maskray, would have left it."""
    state = json.loads((folder / checkpoint.STATE).read_text())
    (folder / checkpoint.STATE).write_text(json.dumps(state | changes))


def test_a_run_goes_on_under_other_packages_and_names_them(begun, caplog):
    config, context, first, ended = begun
    noted = json.loads((first / checkpoint.STATE).read_text())["packages"]
    altered(first, packages=noted | {"torch": "2.0.1", "left-pad": "1.0"})
    with caplog.at_level(logging.WARNING):
        assert pretrain(config, context, MemoryTracker()) == 12
    assert f"not the same bits: torch 2.0.1 → {noted['torch']}" in caplog.text
    with context.latest_checkpoint() as folder:
        assert (folder / checkpoint.WEIGHTS).read_bytes() == ended


def test_a_run_goes_on_under_other_sources_of_maskray_and_names_them(begun, caplog):
    config, context, first, _ = begun
    noted = json.loads((first / checkpoint.STATE).read_text())["packages"]
    assert noted[SOURCES] == sources_digest(Path(maskray.__file__).parent)
    altered(first, packages=noted | {SOURCES: "0123456789abcdef"})
    with caplog.at_level(logging.WARNING):
        pretrain(config, context, MemoryTracker())
    assert f"not the same bits: maskray's sources 0123456789abcdef → {noted[SOURCES]}" in caplog.text


@pytest.mark.parametrize("version", [0, 99, "2", None])
def test_a_checkpoint_of_another_schema_version_is_refused_with_the_reason(begun, version):
    config, context, first, _ = begun
    altered(first, schema_version=version)
    with pytest.raises(CheckpointError, match=rf"schema_version: .*Found: {version} in .*Allowed: 1 or 2") as refused:
        pretrain(config, context, MemoryTracker())
    assert "continue it with the maskray that wrote it" in str(refused.value)
    assert first.exists()


class Noticed(LocalContext):
    """Is told of one node in the fifth step and of another in the tenth."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.asked, self.made = 0, []

    def report(self, step, *arguments, **options) -> float:
        self.made.append(step)
        return super().report(step, *arguments, **options)

    def leaving(self) -> int:
        self.asked += 1
        return (self.asked > 4) + (self.asked > 9)


def test_a_notice_is_a_checkpoint_at_the_next_log_step_and_changes_nothing_that_is_learned(tiny, tmp_path, caplog):
    config, weights = tiny(training={"log_steps": 2, "checkpoint_steps": 8}), []
    told = Noticed(tmp_path / "told", config.data)
    for context in (LocalContext(tmp_path / "quiet", config.data), told):
        made = []
        report = context.report
        context.report = lambda step, *rest, to=made, go=report, **options: (
            to.append(step) or go(step, *rest, **options)
        )
        pretrain(config, context, MemoryTracker())
        with context.latest_checkpoint() as folder:
            weights.append((folder / checkpoint.WEIGHTS).read_bytes())
    assert told.made == [6, 8, 10, 12]
    assert weights[0] == weights[1]
    said = [text for text in caplog.messages if text.startswith("Notice")]
    assert [text.partition(":")[0] for text in said] == [
        "Notice that a node will be taken away",
        "Notice that 2 nodes will be taken away",
    ]
