"""What a killed controller leaves, on a real cluster: all of it is taken away, and nothing else."""

import subprocess
import sys
import time

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from maskray.on_ray import orphans

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0)
class Controller:
    """Holds two CPUs, as Train's does for its workers."""

    def hold(self) -> str:
        group = placement_group([{"CPU": 2}])
        ray.get(group.ready())
        return group.id.hex()

    def ping(self) -> None: ...


def end(controller: ray.actor.ActorHandle) -> None:
    ray.kill(controller)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(controller.ping.remote())


def state(group: str) -> str:
    return placement_group_table()[group]["state"]


def test_what_a_killed_controller_held_is_free_again(ray_cluster):
    dead, living = Controller.remote(), Controller.remote()
    lost, kept = ray.get([each.hold.remote() for each in (dead, living)])
    ours = placement_group([{"CPU": 1}])  # as Tune's of a trial, which its driver makes
    ray.get(ours.ready())
    end(dead)
    time.sleep(1)
    assert state(lost) == "CREATED", "Ray takes it away by itself: orphans.py can go"
    assert orphans.remove("0123") == 1
    assert (state(lost), state(kept), state(ours.id.hex())) == ("REMOVED", "CREATED", "CREATED")
    remove_placement_group(ours)
    end(living)
    assert orphans.remove("0123") == 1, "others want the cluster too"


DRIVER = """
import sys, time
import ray
from ray.util.placement_group import placement_group

@ray.remote(num_cpus=0)
class Controller:
    def hold(self):
        self.group = placement_group([{"CPU": 2}])
        ray.get(self.group.ready())
        return self.group.id.hex()

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
controller = Controller.remote()
print(ray.get(controller.hold.remote()), flush=True)
time.sleep(600)
"""


def test_what_a_killed_driver_held_ray_takes_away(ray_cluster):
    """So no actor of Train's need watch for it."""
    address = ray.get_runtime_context().gcs_address
    with subprocess.Popen([sys.executable, "-c", DRIVER, address], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        group = driver.stdout.readline().strip()
        assert state(group) == "CREATED"
        driver.kill()
    deadline = time.monotonic() + 60
    while state(group) != "REMOVED":
        assert time.monotonic() < deadline
        time.sleep(0.1)
