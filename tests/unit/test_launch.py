"""The order of a launch: who has the run is settled before anything is asked of a cluster."""

import os
from collections.abc import Callable

import pytest

from maskray import launch
from maskray.bare import BareLauncher
from maskray.config.schema import RunConfig
from maskray.errors import ClusterError
from maskray.launch import Prepared, Summary
from maskray.training import lease


@pytest.fixture
def prepared(tiny: Callable[..., RunConfig]) -> Prepared:
    return launch.prepare(tiny())


class Full(BareLauncher):
    """On a cluster that has no room."""

    def preflight(self, prepared: Prepared) -> None:
        holder = lease.holder_of(prepared.run)
        assert holder is not None
        assert holder.pid == os.getpid()
        raise ClusterError("no room")


def test_the_lease_is_held_while_the_cluster_is_waited_for_and_given_back_when_it_has_no_room(prepared: Prepared):
    with pytest.raises(ClusterError, match="no room"):
        launch.launch(prepared, Full())
    assert prepared.run.list_names() == []


def test_a_run_that_another_launch_has_finished_meanwhile_is_not_run_again(prepared: Prepared):
    done = Summary("tiny-0123", "1", "sqlite:///x", 12, 1.0, 1.0, 0.5, None, "tiny", "1")
    prepared.run.write_bytes(launch.FINISHED, done.dump())
    summary = launch.launch(prepared, Full())
    assert summary.already_finished
    assert summary.run_name == "tiny-0123"
