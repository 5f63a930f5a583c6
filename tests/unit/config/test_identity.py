"""What a run is, and what only says where and how it is done."""

import pytest

from maskray.config.load import dotted_keys, fingerprint, identity, merge, parse
from maskray.config.resolve import DatasetFacts, resolve
from maskray.config.schema import RunConfig
from maskray.config.section import Section

BASE = {
    "name": "a",
    "data": {"path": "shards", "image_size": 8, "channels": 1},
    "model": {"patch": 2, "width": 16, "depth": 1, "heads": 2, "decoder": {"width": 16, "depth": 1, "heads": 2}},
    "optim": {"global_batch": 64, "steps": 40},
}
FACTS = DatasetFacts(fingerprint="0123456789abcdef", group_rows=16, num_row_groups=80, num_rows=1287)  # 20 steps a pass

# Whoever adds a field says here what it is. A section of `True` is operational as a whole.
OPERATIONAL: dict[str, set[str] | bool] = {
    "": {"init_from"},  # its digest is identity
    "data": {
        "path",  # the dataset's fingerprint is identity
        "version",  # which is that fingerprint
        "stream",
        "local_bytes",
        "cache",
        "cache_folder",
        "groups_per_task",
        "tasks_per_execution",
        "actors",
        "object_store_bytes",
        "prefetch_groups",
        "stall_seconds",
        "decode_threads",
        "unreadable",
    },
    "training": {
        "shard",
        "micro_batch",
        "compile",
        "recompute_activations",
        "deterministic",
        "threads",
        "log_steps",
        "checkpoint_steps",
        "probe_steps",
        "probe_at",
        "rewinds",
        "spike",
        "skip_steps",
        "ledger",
    },
    "training.spike": True,
    "probe": True,
    "cluster": True,
    "storage": True,
    "tracking": True,
}
IDENTITY = {
    "name",
    "seed",
    "data.image_size",
    "data.channels",
    "data.crop.kind",
    "data.crop.scale",
    "data.crop.aspect",
    "data.flip_probability",
    "data.normalize",
    "data.views_per_image",
    "mask.kind",
    "mask.ratio",
    "mask.unit",
    "model.kind",
    "model.patch",
    "model.width",
    "model.depth",
    "model.heads",
    "model.mlp_ratio",
    "model.positions",
    "model.class_token",
    "model.registers",
    "model.decoder.width",
    "model.decoder.depth",
    "model.decoder.heads",
    "model.decoder.mlp_ratio",
    "model.decoder.attention",
    "objective.loss",
    "objective.norm_pix",
    "objective.cells",
    "objective.predict_fraction",
    "optim.name",
    "optim.global_batch",
    "optim.epochs",
    "optim.steps",
    "optim.warmup_epochs",
    "optim.warmup_steps",
    "optim.base_lr",
    "optim.min_lr",
    "optim.weight_decay",
    "optim.weight_decay_end",
    "optim.betas",
    "optim.clip_norm",
    "training.precision",
}
OF_OTHER_KINDS = {"mask.sides", "mask.aspect", "mask.roll", "model.name", "model.widths", "model.decoder.kind"}
"""Identity where the mask or the model is of another kind than the default."""


def built(**sections):
    return parse(RunConfig, merge(BASE, sections))


def run(config, facts=FACTS, init_digest=None):
    return resolve(config, facts, init_digest).fingerprint


def leaves(plain, prefix=""):
    for key, value in plain.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


def fields():
    """Each key that is no section, with whether it is operational."""
    keys = dict(dotted_keys(RunConfig))
    return {key: mark for key, mark in keys.items() if not any(other.startswith(f"{key}.") for other in keys)}


def is_operational(key):
    section, _, name = key.rpartition(".")
    marked = OPERATIONAL.get(section, OPERATIONAL.get(section.partition(".")[0], set()))
    return marked is True or (isinstance(marked, set) and name in marked and "." not in section)


def test_every_field_is_identity_or_operational():
    assert {key for key, mark in fields().items() if mark} == {key for key in fields() if is_operational(key)}
    assert {key for key in fields() if not is_operational(key)} == IDENTITY | OF_OTHER_KINDS


def test_the_identity_holds_the_identity_fields_and_nothing_else():
    assert set(leaves(identity(built()))) == IDENTITY


def test_every_section_is_frozen_and_forbids_unknown_keys():
    def below(section):
        yield section
        for other in section.__subclasses__():
            yield from below(other)

    for section in below(Section):
        assert section.model_config["frozen"], section
        assert section.model_config["extra"] == "forbid", section


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"data": {"image_size": 8}}, {"data": {"image_size": [8, 8]}}),
        ({"model": {"patch": 2}}, {"model": {"patch": [2, 2]}}),
        ({}, {"mask": {"kind": "random", "ratio": 0.75}, "seed": 0, "objective": {}}),
        ({}, {"data": {"crop": {"kind": "random_resized", "scale": [0.2, 1], "aspect": [3 / 4, 4 / 3]}}}),
        ({}, {"data": {"crop": {}}}),
        ({"optim": {"base_lr": 1}}, {"optim": {"base_lr": 1.0}}),
        ({"optim": {"steps": 40}}, {"optim": {"steps": None, "epochs": 2}}),
        ({"optim": {"steps": 40}}, {"optim": {"steps": None, "epochs": 2.01}}),
        ({}, {"optim": {"warmup_steps": 2}}),
        ({}, {"optim": {"warmup_epochs": 0.1}}),
        ({}, {"optim": {"weight_decay_end": 0.05}}),
        ({}, {"data": {"path": "s3://elsewhere/shards"}}),
        ({}, {"data": {"stream": "ray", "decode_threads": 9}}),
        ({}, {"cluster": {"workers": 4, "cpus_per_worker": 2, "address": "auto"}}),
        ({}, {"training": {"micro_batch": 8, "deterministic": True, "threads": 3, "compile": True}}),
        ({}, {"training": {"log_steps": 2, "checkpoint_steps": 4, "ledger": "x"}}),
        ({}, {"storage": {"path": "s3://bucket"}, "tracking": {"uri": "http://x"}, "probe": {"enabled": False}}),
        ({}, {"init_from": "weights.pth"}),
    ],
)
def test_equal_meaning_equal_run(one, other):
    assert run(built(**one)) == run(built(**other))


@pytest.mark.parametrize(
    "sections",
    [
        {"name": "b"},
        {"seed": 1},
        {"mask": {"ratio": 0.5}},
        {"objective": {"loss": "l1"}},
        {"objective": {"norm_pix": False}},
        {"data": {"crop": {"kind": "whole"}}},
        {"data": {"image_size": [8, 16]}},
        {"data": {"normalize": "imagenet"}},
        {"model": {"positions": "learnable"}},
        {"model": {"decoder": {"depth": 2}}},
        {"optim": {"global_batch": 128}},
        {"optim": {"steps": 41}},
        {"optim": {"warmup_steps": 3}},
        {"optim": {"clip_norm": 1}},
        {"optim": {"weight_decay_end": 0.1}},
        {"training": {"precision": "bf16"}},
    ],
)
def test_another_meaning_another_run(sections):
    assert run(built(**sections)) != run(built())


def test_data_and_weights_are_identity_by_what_they_hold():
    other = DatasetFacts("fedcba9876543210", FACTS.group_rows, FACTS.num_row_groups, FACTS.num_rows)
    fingerprints = {
        run(built()),
        run(built(), other),
        run(built(), init_digest="11"),
        run(built(init_from="here"), init_digest="22"),
    }
    assert len(fingerprints) == 4
    assert run(built(init_from="here"), init_digest="22") == run(built(init_from="there"), init_digest="22")


def test_a_fingerprint_does_not_hang_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1, "b": [1, 2]}) != fingerprint({"a": 1, "b": [2, 1]})
    assert len(fingerprint({})) == 16


def test_the_name_of_a_run_is_its_own():
    plan = resolve(built(), FACTS)
    assert plan.run_name == f"a-{plan.fingerprint[:8]}"
