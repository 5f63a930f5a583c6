"""How many workers there are, decided without any."""

from types import SimpleNamespace

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from maskray.data.storage import Storage
from maskray.on_ray import elastic

SPARE = [{"CPU": 1.0}]


class Cluster:
    """What Ray would say of nodes, by name."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, float]] = {}
        self.free: dict[str, dict[str, float]] = {}
        self.given: dict[str, dict[str, float]] | None = None
        self.draining: dict[str, int] = {}
        self.dead: set[str] = set()
        self.record, self.now = "step_000000004-a", 0.0
        self.said: list[str] = []


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    at = Cluster()
    listed = lambda: [{"NodeID": n, "Resources": r, "Alive": n not in at.dead} for n, r in at.nodes.items()]  # noqa: E731
    monkeypatch.setattr(elastic.ray, "nodes", listed)
    monkeypatch.setattr(elastic, "available_resources_per_node", lambda: at.free)
    monkeypatch.setattr(elastic.ray_state, "get_draining_nodes", lambda: at.draining)
    monkeypatch.setattr(elastic, "registered_checkpoint", lambda _: at.record)
    monkeypatch.setattr(elastic, "time", SimpleNamespace(monotonic=lambda: at.now, sleep=lambda _: None))
    monkeypatch.setattr(elastic.Policy, "_maybe_send_resource_request", lambda _: None)
    monkeypatch.setattr(elastic.Policy, "_get_reserved_resources", lambda _: at.nodes if at.given is None else at.given)
    return at


def policy(at: Cluster, counts=(4, 2, 1), beside=(), grow_seconds: float = 60) -> elastic.Policy:
    board = SimpleNamespace(warn=SimpleNamespace(remote=at.said.append))
    scaling = ScalingConfig(num_workers=(counts[-1], counts[0]), resources_per_worker={"CPU": 1})
    return elastic.Policy(scaling, elastic.Terms(counts, list(beside), grow_seconds, Storage("/nowhere"), board))


def started(of: elastic.Policy) -> int:
    """Workers that are started; 0: none."""
    decision = of.make_decision_for_non_running_worker_group()
    return decision.num_workers if isinstance(decision, ResizeDecision) else 0


def changed(of: elastic.Policy, running: int) -> int | None:
    """Workers that take the place of those that run."""
    decision = of.make_decision_for_running_worker_group(SimpleNamespace(num_workers=running), None)
    assert isinstance(decision, ResizeDecision | NoopDecision)
    return decision.num_workers if isinstance(decision, ResizeDecision) else None


def test_only_numbers_that_divide_a_step(at: Cluster):
    at.nodes = {"a": {"CPU": 3}}
    assert started(policy(at)) == 2
    assert started(policy(at, counts=(3, 1))) == 3


def test_room_is_left_for_what_lies_beside(at: Cluster):
    at.nodes = {"a": {"CPU": 2}, "b": {"CPU": 2}}
    assert started(policy(at)) == 4
    assert started(policy(at, beside=SPARE)) == 2
    at.dead = {"b"}
    assert started(policy(at, beside=SPARE)) == 1
    at.nodes["a"] = {"CPU": 1}
    assert started(policy(at, beside=SPARE)) == 0
    assert at.said == ["Waiting for room for 1 of 4 workers"]


def test_a_node_that_is_about_to_leave_gets_no_workers(at: Cluster):
    at.nodes, at.draining = {"a": {"CPU": 2}, "b": {"CPU": 2}}, {"b": 1}
    assert started(policy(at)) == 2
    assert changed(policy(at), 4) is None, "those that are there use the time that is left"


def test_what_could_not_be_started_is_not_tried_again_at_once(at: Cluster):
    at.nodes = {"a": {"CPU": 4}}
    of = policy(at)
    assert [started(of) for _ in range(4)] == [4, 2, 1, 4]
    changed(of, 4)
    assert started(of) == 4


def test_more_workers_wait_for_a_checkpoint(at: Cluster):
    at.nodes, at.free = {"a": {"CPU": 2}}, {"a": {"CPU": 0.0}}
    of = policy(at)
    assert changed(of, 2) is None
    at.nodes["b"] = at.free["b"] = {"CPU": 2.0}
    at.now = 59
    assert changed(of, 2) is None, "too early"
    at.now = 61
    assert changed(of, 2) is None, "what was trained since the last checkpoint would be lost"
    at.record = "step_000000008-a"
    assert changed(of, 2) == 4
    assert started(of) == 2, "they could not be started"


def test_more_workers_start_only_on_what_nobody_uses(at: Cluster):
    at.nodes, at.free = {"a": {"CPU": 4}}, {"a": {"CPU": 1.0}}
    of = policy(at, grow_seconds=1)
    changed(of, 2)
    at.now = 2
    changed(of, 2)
    at.record = "step_000000008-a"
    assert changed(of, 2) is None
    at.record = "step_000000012-a"
    assert changed(of, 2) is None, "it looks again only when it is time to"


def test_fewer_workers_where_ray_data_has_lost_its_room(at: Cluster):
    at.nodes = {"a": {"CPU": 2}, "b": {"CPU": 1}}
    of = policy(at, counts=(2, 1), beside=SPARE)
    assert changed(of, 2) is None
    at.dead = {"b"}
    assert changed(of, 2) == 1


def test_what_a_killed_run_had_been_given_is_not_waited_for(at: Cluster):
    at.nodes, at.given, at.free = {"a": {"CPU": 4}}, {"a": {"CPU": 1}}, {"a": {"CPU": 4.0}}
    of = policy(at)
    assert started(of) == 4
    at.free = {"a": {"CPU": 0.0}}
    assert changed(of, 4) is None, "they have what they need"


def test_what_another_run_was_given_is_left_to_it(at: Cluster):
    at.nodes, at.given, at.free = {"a": {"CPU": 4}}, {"a": {"CPU": 2}}, {"a": {"CPU": 1.0}}
    assert started(policy(at)) == 2


def test_each_change_is_said(at: Cluster):
    at.nodes = {"a": {"CPU": 4}}
    of = policy(at)
    changed(of, 4)
    assert at.said == []
    changed(of, 2)
    assert at.said == ["2 of 4 workers train on from step_000000004-a"]
