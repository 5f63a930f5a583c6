"""Units: the same rows on any number of workers, images in pairs, threads that share a step and end."""

import gc
import os
import pickle
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from fine_tuning import FIVE, units_of, worker
from maskray.evaluation import finetune
from maskray.evaluation.finetune import Asked
from maskray.evaluation.units import Units


def rows_of(what, asked, step, world_size):
    """What each real row of a step comes to: unit, place in it, pixels, label."""
    out = {}
    for rank in range(world_size):
        for unit in units_of(what(asked, worker(rank, world_size)), step):
            for place, weight in enumerate(unit.weights_N.tolist()):
                if weight:
                    at = (unit.number, place)
                    assert at not in out, "a row counts twice"
                    image = unit.images_NCHW[place].numpy().tobytes()
                    out[at] = int(unit.rows_N[place]), image, int(unit.labels_N[place])
    return out


@pytest.mark.parametrize("step", [0, 1, 3])
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_workers(what, step):
    alone = rows_of(what(), FIVE, step, 1)
    assert len(alone) == 26
    for world_size in (2, 3, 4, 7):
        assert rows_of(what(), FIVE, step, world_size) == alone


def test_all_workers_have_equally_many_units_to_compute(what):
    for world_size in (1, 2, 3, 7):
        counts = {len(units_of(what()(FIVE, worker(rank, world_size)), 0)) for rank in range(world_size)}
        assert counts == {-(-4 // world_size)}


def test_each_row_comes_once_in_a_pass_and_differs_from_pass_to_pass(what):
    passes = [[], []]
    for step in range(100):  # 50 rows in steps of 26: the border lies in the middle of a step
        for row in sorted(rows_of(what(), FIVE, step, 1).items()):
            passes[0 if len(passes[0]) < 50 else 1].append(row[1])
        if len(passes[1]) >= 50:
            break
    one, two = passes[0], passes[1][:50]
    rows = [sorted(row for row, *_ in each) for each in (one, two)]
    assert rows[0] == rows[1]
    assert len(set(rows[0])) == 50
    assert [row for row, *_ in one] != [row for row, *_ in two]
    assert {row: image for row, image, _ in one} != {row: image for row, image, _ in two}


@pytest.mark.parametrize("num", range(1, 9))
def test_each_image_is_mixed_with_its_partner_and_a_filler_with_none(what, num):
    """Whatever a unit has, the image as far from the other end is a real one, or the image itself."""
    course = what()(FIVE, worker())
    rows = course.units.pictures.rows_R[:num]
    unit = course.units.unit(0, np.zeros(num, np.int64), rows)
    real = unit.weights_N.numpy() == 1
    assert unit.rows_N[real].tolist() == rows.tolist()
    partners, images = unit.rows_N[::-1], unit.images_NCHW
    assert partners[real].tolist() == rows[::-1].tolist()
    if num % 2:  # the middle one
        at = (num - 1) // 2
        assert torch.equal(images[at], images.flip(0)[at])


def test_rows_that_do_not_fit_are_read_again_and_are_the_same_images(what):
    kept, read = what()(FIVE, worker()), what(keep_bytes=1)(FIVE, worker())
    for course in (kept, read):
        course.units.pictures.load()
    assert kept.units.pictures.is_kept
    assert not read.units.pictures.is_kept
    for row in kept.units.pictures.rows_R.tolist():
        assert torch.equal(kept.units.pictures.get(row), read.units.pictures.get(row))
    # And each row of a pass once, those of a row group one after the other.
    taken = read.units.passes.take(0, 50).rows_N
    assert sorted(taken.tolist()) == kept.units.pictures.rows_R.tolist()
    groups = read.units.pictures.groups_R[np.searchsorted(read.units.pictures.rows_R, taken)]
    assert (np.diff(groups) != 0).sum() == len(np.unique(groups)) - 1


def test_threads_share_a_step_and_look_ahead_by_units(what, monkeypatch):
    """A step may be gigabytes: what is made ahead of need is a few units, however many a step has."""
    make, made, both = Units.unit, [], threading.Barrier(2)

    def slow(self, number, *rows):
        if len(made) < 2:
            made.append(number)
            both.wait(timeout=20)  # one thread alone would wait here in vain
        else:
            made.append(number)
        return make(self, number, *rows)

    course = what(labels_per_class=[], label_shares=[1.0], batch=256)(Asked("model", None, 1.0, 0), worker())
    monkeypatch.setattr(Units, "unit", slow)
    with closing(course.units.steps(0, 5, threads=2)) as steps:
        first = next(steps)
    assert [unit.number for unit in first] == list(range(32))
    assert 32 <= len(made) <= 32 + 2 * 2 + 1


def test_threads_end_with_the_steps_or_with_a_course_that_was_left(what):
    others = set(threading.enumerate())  # those of courses that other tests have left

    def decoding():
        return [t for t in threading.enumerate() if t.name.startswith("maskray-ingest") and t not in others]

    ended, left = what()(FIVE, worker()), what()(FIVE, worker())
    for number in range(ended.total_steps):
        ended.step(number)
    assert decoding()
    ended.result()
    assert not decoding()
    left.step(0)
    assert decoding()
    del left
    gc.collect()
    assert not decoding()


LEFT = """
import pickle, sys, torch
from pathlib import Path
from types import SimpleNamespace

what, asked = pickle.loads(Path(sys.argv[1]).read_bytes())
course = what(asked, SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu")))
course.step(0)
"""


def test_a_process_that_leaves_a_course_says_nothing(what, tmp_path):
    (tmp_path / "what").write_bytes(pickle.dumps((what(), FIVE)))
    (tmp_path / "left.py").write_text(LEFT)
    environment = {**os.environ, "PYTHONPATH": str(Path(finetune.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "left.py"), str(tmp_path / "what")]
    found = subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True, text=True)
    assert found.stderr == ""
