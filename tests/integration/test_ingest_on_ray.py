"""Ingest as Ray tasks: the same dataset, results in order, a user's mistake readable."""

import time

import pytest
from PIL import Image

from maskray.config.schema import IngestConfig
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper
from maskray.errors import DataError
from maskray.on_ray.ingest import ray_mapper

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_tasks_make_the_same_dataset_as_threads(tmp_path):
    one, two = (
        ingest(IngestConfig(source="digits", destination=str(tmp_path / name), group_rows=16), mapper)
        for name, mapper in (("ray", ray_mapper(max_in_flight=2)), ("threads", thread_mapper(2)))
    )
    assert one == two


def test_results_come_in_order_with_few_tasks_in_flight():
    def slow_first(number):
        time.sleep(0.3 if number == 0 else 0)
        return number

    assert list(ray_mapper(max_in_flight=3)(slow_first, range(9))) == list(range(9))
    abandoned = iter(ray_mapper(max_in_flight=3)(slow_first, range(1000)))
    assert next(abandoned) == 0
    abandoned.close()


def test_a_mistake_in_a_task_is_the_users_not_rays(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"in/{i:02d}.png")
    config = IngestConfig(source=str(tmp_path / "in"), destination=str(tmp_path / "out"), group_rows=4)

    def change(done, total, phase):
        if done and phase == "check":
            Image.new("RGB", (8, 8)).save(tmp_path / "in/05.png")

    with pytest.raises(DataError, match=r"the source changed while it was read: 05.png") as caught:
        ingest(config, ray_mapper(), change)
    assert type(caught.value) is DataError
