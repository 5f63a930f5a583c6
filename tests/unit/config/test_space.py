"""The space of a sweep: its axes and their conditions, and in which words one that is none is refused."""

import pytest

from maskray.config.load import parse
from maskray.config.space import Choice, Grid, LogUniform, RandInt, Uniform, in_order
from maskray.config.sweep import SweepConfig
from maskray.errors import ConfigError

RATIOS = {"mask.ratio": [0.5, 0.75]}


def sweep(space=RATIOS, **sections):
    return parse(SweepConfig, {"name": "s", "base": {}, "space": space, **sections}, origin="sweep.yaml")


def test_a_bare_list_is_a_grid():
    assert sweep().space == {"mask.ratio": Grid(values=(0.5, 0.75))}
    assert sweep(space={"mask.ratio": {"values": [0.5, 0.75]}}) == sweep()
    assert sweep(space={"mask.ratio": {"kind": "grid", "values": [0.5, 0.75]}}) == sweep()


def test_each_kind_of_axis():
    space = {
        "a": {"kind": "choice", "values": [1, 1.5, "x", True, None, [1, 2], {"kind": "whole"}]},
        "b": {"kind": "uniform", "low": 0, "high": 1},
        "c": {"kind": "loguniform", "low": 1e-4, "high": 1},
        "d": {"kind": "randint", "low": -1, "high": 3},
    }
    found = sweep(space=space, search={"kind": "random", "points": 3}).space
    assert found == {
        "a": Choice(values=(1, 1.5, "x", True, None, [1, 2], {"kind": "whole"})),
        "b": Uniform(low=0, high=1),
        "c": LogUniform(low=1e-4, high=1),
        "d": RandInt(low=-1, high=3),
    }
    assert [type(value) for value in found["a"].values] == [int, float, str, bool, type(None), list, dict]


def test_a_condition_has_one_value_or_several():
    axis = {"values": [1, 2], "when": {"mask.ratio": 0.5, "other": [True, "x"]}}
    found = sweep(space={**RATIOS, "other": [True, False, "x"], "third": axis})
    assert found.space["third"].when == {"mask.ratio": (0.5,), "other": (True, "x")}


def test_keys_come_after_those_that_their_conditions_are_about():
    space = {"c": {"values": [1], "when": {"b": 1, "a": 1}}, "b": {"values": [1], "when": {"a": 1}}, "a": [1], "z": [1]}
    order = in_order(sweep(space=space).space)
    assert sorted(order) == ["a", "b", "c", "z"]
    assert order.index("a") < order.index("b") < order.index("c")
    assert in_order(sweep(space={"b": [1], "a": [1], "c": [1]}).space) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, r"^space: .*at least 1 item"),
        ({"a": []}, r"^space\.a\.values: there is nothing to take\. Found: \[\]\. Allowed: values"),
        ({"a": {"kind": "choice", "values": []}}, r"^space\.a\.values: there is nothing to take"),
        ({"a": {"kind": "uniform", "low": 1, "high": 1}}, r"^space\.a: low must be below high\. Found: low 1\.0, high"),
        ({"a": {"kind": "loguniform", "low": 2, "high": 1}}, r"^space\.a: low must be below high"),
        ({"a": {"kind": "randint", "low": 2, "high": 1}}, r"^space\.a: low must be below high\. Found: low 2, high 1"),
        ({"a": {"kind": "loguniform", "low": 0, "high": 1}}, r"^space\.a\.low: .*found 0\). Allowed: greater than 0"),
        ({"a": {"kind": "randint", "low": 0.5, "high": 1}}, r"^space\.a\.low: "),
        ({"a": {"kind": "normal", "low": 0, "high": 1}}, r"^space\.a\.kind: no such kind \(found 'normal'\)\."),
        ({"a": {"kind": "uniform", "low": 0, "hihg": 1}}, r"space\.a\.hihg: no such key\. Did you mean space\.a\.high"),
        ({"a": {"kind": "uniform", "low": 0}}, r"^space\.a\.high: this key is required"),
        ({"a": 3}, r"^space\.a: "),
        ({"a": {"values": [1], "when": {"b": 1}}}, r"^space\.a\.when: .*Found: b\. Allowed: none: there is no other"),
        (
            {"a": {"values": [1], "when": {"a": 1}}, "b": [1]},
            r"^space\.a\.when: .*another key of the space\. Found: a\. Allowed: b\.",
        ),
        (
            {key: {"values": [1], "when": {other: 1}} for key, other in ("ab", "bc", "ca")},
            r"^space: conditions hang on each other in a circle.*Found: (. → ){3}.\.",
        ),
        (
            {"a": {"values": [1], "when": {"b": [1, 3]}}, "b": [1, "x"]},
            r"^space\.a\.when\.b: it is never so.*Found: 3\. Allowed: 1, \"x\"\.",
        ),
        (
            {"a": {"values": [1], "when": {"b": True}}, "b": [1, 2]},
            r"^space\.a\.when\.b: it is never so.*Found: true\. Allowed: 1, 2\.",
        ),
        (
            {"a": {"values": [1], "when": {"b": [1.0, 2]}}, "b": [1, 2]},
            r"^space\.a\.when\.b: it is never so.*Found: 1\.0\. Allowed: 1, 2\.",
        ),
        (
            {"a": {"values": [1], "when": {"b": True}}, "b": {"kind": "randint", "low": 1, "high": 3}},
            r"^space\.a\.when\.b: it is never so.*Found: true\. Allowed: whole numbers from 1 to 3\.",
        ),
        (
            {"a": {"values": [1], "when": {"b": 4}}, "b": {"kind": "randint", "low": 1, "high": 3}},
            r"^space\.a\.when\.b: it is never so.*Found: 4\. Allowed: whole numbers from 1 to 3\.",
        ),
        (
            {"a": {"values": [1], "when": {"b": 0.5}}, "b": {"kind": "uniform", "low": 0, "high": 1}},
            r"^space\.a\.when\.b: it is never so.*Found: 0\.5\. Allowed: none: .* that one is uniform\.",
        ),
        ({"seed": [1, 2]}, r"^space\.seed: a seed is no axis.*What to do: list seeds"),
    ],
)  # fmt: skip
def test_a_space_that_is_none_is_refused(space, message):
    with pytest.raises(ConfigError, match=message):
        sweep(space=space)
