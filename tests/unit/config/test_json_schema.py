"""The JSON Schema by which editors complete and check the YAML. Read as an editor does, in the little we use of it."""

import json
import re
from pathlib import Path

import pytest
import yaml

from maskray.config.load import dotted_keys, dump, json_schema, parse
from maskray.config.schema import IngestConfig, RunConfig
from maskray.config.sweep import SweepConfig

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads(json_schema())
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
LIMITS = {
    "minimum": lambda value, limit: value >= limit,
    "maximum": lambda value, limit: value <= limit,
    "exclusiveMinimum": lambda value, limit: value > limit,
    "exclusiveMaximum": lambda value, limit: value < limit,
    "minItems": lambda value, limit: len(value) >= limit,
    "maxItems": lambda value, limit: len(value) <= limit,
    "minProperties": lambda value, limit: len(value) >= limit,
    "pattern": lambda value, limit: re.search(limit, value),
    "enum": lambda value, limit: value in limit,
    "const": lambda value, limit: value == limit,
}
NOTES = {"title", "description", "default", "operational", "discriminator", "$defs"}
STRUCTURE = {"type", "$ref", "anyOf", "oneOf", "allOf", "properties", "additionalProperties", "items", "prefixItems"}


def parts(schema, whole=SCHEMA):
    """The alternatives of a schema, references into the whole of it followed."""
    if "$ref" in schema:
        return parts(whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    nested = [part for word in ("anyOf", "oneOf", "allOf") for part in schema.get(word, [])]
    return [schema] if not nested else [p for part in nested for p in parts(part, whole)]


def accepts(schema, value, whole=SCHEMA):
    """Whether an editor would leave `value` without a red line."""
    return any(_accepts(part, value, whole) for part in parts(schema, whole))


def _accepts(part, value, whole):
    assert set(part) <= NOTES | STRUCTURE | set(LIMITS), f"a word that this reader does not know: {sorted(part)}"
    kind = part.get("type")
    if kind == "null":
        return value is None
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if not all(check(value, part[word]) for word, check in LIMITS.items() if word in part):
        return False
    if kind == "object":
        known, others = part.get("properties", {}), part.get("additionalProperties", True)
        return all(k in known or others is not False for k in value) and all(
            accepts(known.get(k, {} if others is True else others), v, whole) for k, v in value.items()
        )
    if kind == "array":
        items = part.get("prefixItems", [part.get("items", {})] * len(value))
        return all(accepts(item, v, whole) for item, v in zip(items, value, strict=False))
    return True


def keys(schema, prefix=""):
    for part in parts(schema):
        for name, below in part.get("properties", {}).items():
            yield prefix + name
            yield from keys(below, f"{prefix}{name}.")


def test_every_key_completes():
    assert set(keys(SCHEMA)) == {key for key, _ in dotted_keys(RunConfig)} | {"extends"}


def test_every_section_closes_and_requires_nothing():
    for section in (SCHEMA, *SCHEMA["$defs"].values()):
        assert section["additionalProperties"] is False
        assert "required" not in section  # an `extends:` may supply it


def test_every_key_says_what_it_is_for_or_shows_it_by_its_name():
    described = [
        p for section in SCHEMA["$defs"].values() for p in section["properties"].values() if "description" in p
    ]
    assert len(described) > 40


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_the_configs_that_we_ship_are_accepted(path):
    schema = next(p for p in (path.parent / "schema.json", path.parents[1] / "schema.json") if p.exists())
    whole = json.loads(schema.read_text())
    assert accepts(whole, yaml.safe_load(path.read_text()), whole)


def test_what_is_dumped_is_accepted():
    config = parse(RunConfig, {"name": "a", "data": {"path": "x"}, "optim": {"steps": 3}})
    assert accepts(SCHEMA, yaml.safe_load(dump(config)))


@pytest.mark.parametrize(
    "part",
    [
        {"extends": "base.yaml"},
        {"extends": ["a.yaml", "b.yaml"], "data": {"image_size": 8}},
        {"data": {"image_size": [8, 16], "crop": {"kind": "whole"}}, "model": {"patch": 2}},
        {"optim": {"epochs": 3, "clip_norm": None}},
    ],
)
def test_parts_of_a_config_are_accepted(part):
    assert accepts(SCHEMA, part)


@pytest.mark.parametrize(
    "part",
    [
        {"mask_ratio": 0.5},
        {"mask": {"ratio": 1}},
        {"data": {"image_size": "8"}},
        {"data": {"image_size": 0}},
        {"data": {"image_size": [8]}},
        {"data": {"crop": {"kind": "whole", "scale": [0.5, 1]}}},
        {"training": {"precision": "fp16"}},
        {"name": "a b"},
        {"extends": 3},
    ],
)
def test_mistakes_are_marked(part):
    assert not accepts(SCHEMA, part)


def test_other_sections_have_one_too():
    assert set(json.loads(json_schema(IngestConfig))["properties"]) == {*IngestConfig.model_fields, "extends"}


SWEEP = json.loads(json_schema(SweepConfig))


@pytest.mark.parametrize(
    "part",
    [
        {"base": "run.yaml", "space": {"mask.ratio": [0.5, 0.75]}},
        {"base": {"name": "run"}, "space": {"model": [{"kind": "vit"}], "data.image_size": [[8, 16], 8]}},
        {"space": {"a": {"kind": "uniform", "low": 0, "high": 1, "when": {"b": 1, "c": ["x", None]}}}},
        {"space": {"a": {"values": [1]}}, "search": {"kind": "optuna", "points": 3}, "stopping": {"kind": "none"}},
    ],
)
def test_a_sweep_may_be_written_short(part):
    assert accepts(SWEEP, part, SWEEP)


@pytest.mark.parametrize(
    "part",
    [
        {"base": 3},
        {"space": {}},
        {"space": {"mask.ratio": 0.5}},
        {"space": {"a": {"kind": "uniform", "values": [1]}}},
        {"space": {"a": {"kind": "normal", "values": [1]}}},
    ],
)
def test_a_sweep_that_is_none_is_marked(part):
    assert not accepts(SWEEP, part, SWEEP)
