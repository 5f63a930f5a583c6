"""What a killed controller leaves, on a real cluster: all of it is taken away, and nothing else."""

import time

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from maskray.on_ray import orphans

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0)
class Controller:
    """Holds two CPUs, as Train's does for its workers."""

    def hold(self) -> str:
        group = placement_group([{"CPU": 2}])
        ray.get(group.ready())
        return group.id.hex()


def state(group: str) -> str:
    return placement_group_table()[group]["state"]


def test_what_a_killed_controller_held_is_free_again(ray_cluster):
    dead, living = Controller.remote(), Controller.remote()
    lost, kept = ray.get([each.hold.remote() for each in (dead, living)])
    ray.kill(dead)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(dead.hold.remote())
    time.sleep(1)
    assert state(lost) == "CREATED", "Ray takes it away by itself: orphans.py can go"
    assert orphans.remove("0123") == 1
    assert (state(lost), state(kept)) == ("REMOVED", "CREATED")
