"""YAML and --set to a config: what is merged, what is refused, and in which words."""

import pytest
import yaml

from maskray.config.evaluation import EvaluateConfig
from maskray.config.load import dump, files_of, load, merge, parse, with_overrides
from maskray.config.schema import IngestConfig, RunConfig
from maskray.errors import ConfigError

BASE = {"name": "a", "data": {"path": "shards"}, "optim": {"steps": 30}}


def built(**sections):
    return parse(RunConfig, merge(BASE, sections), origin="run.yaml")


@pytest.fixture
def write(tmp_path):
    """write(name, text or mapping) -> path of a file."""

    def to(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return to


# --------------------------------------------------------------------------------------------------------------- files


def test_a_file_is_laid_over_those_it_extends_the_last_wins(write):
    write("bases/one.yaml", {**BASE, "seed": 1, "optim": {"steps": 30, "base_lr": 0.1}, "cluster": {"workers": 2}})
    write("bases/two.yaml", {"seed": 2, "optim": {"min_lr": 0.01}})
    path = write("run.yaml", {"extends": ["bases/one.yaml", "bases/two.yaml"], "name": "b", "optim": {"base_lr": 0.2}})
    config = load(path)
    assert (config.name, config.seed, config.cluster.workers) == ("b", 2, 2)
    assert (config.optim.steps, config.optim.base_lr, config.optim.min_lr) == (30, 0.2, 0.01)


def test_extends_is_relative_to_its_file_and_goes_on(write):
    write("deep/er/ground.yaml", BASE)
    write("deep/middle.yaml", {"extends": "er/ground.yaml", "seed": 7})
    assert load(write("top.yaml", {"extends": "deep/middle.yaml"})).seed == 7


@pytest.mark.parametrize("wrong", [3, None, {"a": 1}, ["x.yaml", 3]])
def test_extends_must_name_files(write, wrong):
    with pytest.raises(ConfigError, match=r"^extends: must be a path or a list of paths\. Found: .* in .*run.yaml"):
        load(write("run.yaml", {**BASE, "extends": wrong}))


def test_a_circle_is_named(write):
    write("a.yaml", {"extends": "b.yaml"})
    path = write("b.yaml", {"extends": "a.yaml"})
    with pytest.raises(
        ConfigError, match=r"^extends: files extend each other in a circle.*b.yaml → .*a.yaml → .*b.yaml"
    ):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", r"the config file is not YAML\. Found: .*run.yaml\", line 1"),
        ("- 1\n- 2\n", r"the config file must hold keys and values\. Found: .*run.yaml: list"),
        ("", r"must hold keys and values\. Found: .*run.yaml: NoneType"),
        (
            "name: a\nseed: 1\nname: b\n",
            r"the key 'name' stands twice\. Found: .*run.yaml, line 3\. What to do: keep one",
        ),
        ("data:\n  path: x\n  path: y\n", r"the key 'path' stands twice\. Found: .*run.yaml, line 3\."),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(write, content, message):
    with pytest.raises(ConfigError, match=message):
        load(write("run.yaml", content))


def test_a_file_that_is_missing_or_no_text_is_refused(write, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read\. Found: .*gone.yaml .*What to do: check the path"):
        load(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read\. Found: .*gone.yaml"):
        load(write("run.yaml", {"extends": "gone.yaml"}))
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ConfigError, match=r"cannot be read\. Found: .*picture.yaml"):
        load(tmp_path / "picture.yaml")


def test_yaml_may_share_parts_with_anchors(write):
    text = (
        "name: a\noptim: {steps: 30}\ndata: {path: x}\n"
        "model:\n  width: 64\n  heads: 4\n  decoder: &small {width: 32, depth: 1, heads: 4}\n"
    )
    assert load(write("run.yaml", text)).model.decoder.width == 32
    merged = text.replace("&small {width: 32, depth: 1, heads: 4}", "{<<: {width: 32, heads: 4}, depth: 1}")
    assert load(write("merged.yaml", merged)).model.decoder.depth == 1


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1.5e-4", 1.5e-4), ("2E3", 2000.0), ("+3e+2", 300.0), ("1_0e-1", 1.0)]
)
def test_scientific_notation_is_a_number(write, text, value):
    path = write("run.yaml", f"name: a\ndata: {{path: x}}\noptim: {{steps: 30, base_lr: {text}}}\n")
    assert load(path).optim.base_lr == value
    assert load(path, [f"optim.min_lr={text}"]).optim.min_lr == value


# --------------------------------------------------------------------------------------------------------------- merge


def test_merge_goes_section_by_section_and_changes_nothing_it_was_given():
    base, over = {"a": {"b": 1, "c": [1, 2]}, "d": 4}, {"a": {"c": [3]}, "e": None}
    assert merge(base, over) == {"a": {"b": 1, "c": [3]}, "d": 4, "e": None}
    assert (base, over) == ({"a": {"b": 1, "c": [1, 2]}, "d": 4}, {"a": {"c": [3]}, "e": None})


def test_a_section_of_another_kind_replaces_the_whole():
    base = {"crop": {"kind": "random_resized", "scale": [0.5, 1]}}
    assert merge(base, {"crop": {"kind": "whole"}}) == {"crop": {"kind": "whole"}}
    assert merge(base, {"crop": {"aspect": [1, 1]}})["crop"] == {**base["crop"], "aspect": [1, 1]}
    assert merge(base, {"crop": {"kind": "random_resized", "aspect": [1, 1]}})["crop"]["scale"] == [0.5, 1]


def test_saying_the_kind_that_was_meant_anyway_loses_nothing():
    assert merge({"mask": {"ratio": 0.5}}, {"mask": {"kind": "random"}}) == {"mask": {"ratio": 0.5, "kind": "random"}}


def test_a_crop_without_its_kind_is_of_the_default_one():
    assert built(data={"crop": {"scale": [0.5, 1]}}) == built(
        data={"crop": {"kind": "random_resized", "scale": [0.5, 1]}}
    )


# ----------------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_read_as_yaml_in_order(write):
    config = load(
        write("run.yaml", {**BASE, "optim": {"steps": 30, "clip_norm": 1.0}}),
        [
            "optim.steps=null",
            "optim.epochs=2",
            "optim.clip_norm=",
            "data.image_size=[32, 48]",
            "data.path=s3://bucket/a=b",
            "seed=1",
            "seed=2",
            "training.deterministic=true",
        ],
    )
    assert (config.optim.steps, config.optim.epochs, config.optim.clip_norm) == (None, 2.0, None)
    assert (config.data.image_size, config.data.path, config.seed) == ((32, 48), "s3://bucket/a=b", 2)
    assert config.training.deterministic


def test_overrides_switch_and_fill_unions():
    raw = {**BASE, "data": {"path": "x", "crop": {"kind": "random_resized", "scale": [0.5, 1]}}}
    assert parse(RunConfig, with_overrides(raw, ["data.crop.kind=whole"])).data.crop.kind == "whole"
    assert parse(RunConfig, with_overrides(raw, ["data.crop.scale=[0.9, 1]"])).data.crop.scale == (0.9, 1.0)
    assert parse(RunConfig, with_overrides(BASE, ["data.crop.scale=[0.9, 1]"])).data.crop.scale == (0.9, 1.0)
    assert raw["data"]["crop"]["scale"] == [0.5, 1]


@pytest.mark.parametrize("wrong", ["seed", "=1", "a..b=1", ".a=1", ""])
def test_an_override_must_be_key_equals_value(wrong):
    with pytest.raises(ConfigError, match=r"^--set: an override must read key=value\..*Allowed: a\.b=c"):
        with_overrides(BASE, [wrong])


def test_an_override_must_be_yaml():
    with pytest.raises(ConfigError, match=r"^--set: the value is not YAML\. Found: name=\[1\. What to do: quote it"):
        with_overrides(BASE, ["name=[1"])


# -------------------------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mask_ratio": 0.5}, "mask_ratio: no such key. Did you mean mask.ratio?"),
        ({"model_width": 64}, "model_width: no such key. Did you mean model.width?"),
        ({"data_path": "x"}, "data_path: no such key. Did you mean data.path?"),
        ({"data_pth": "x"}, "data_pth: no such key. Did you mean data.path?"),
        ({"decoder_depth": 2}, "decoder_depth: no such key. Did you mean model.decoder.depth?"),
        ({"model": {"decoder_depth": 2}}, "model.decoder_depth: no such key. Did you mean model.decoder.depth?"),
        ({"workers": 2}, "workers: no such key. Did you mean cluster.workers?"),
        ({"optim": {"seed": 2}}, "optim.seed: no such key. Did you mean seed?"),
        ({"path": "x"}, "path: no such key. Did you mean data.path or storage.path?"),
        ({"sed": 2}, "sed: no such key. Did you mean seed?"),
        ({"trainnig": {"threads": 1}}, "trainnig: no such key. Did you mean training?"),
        ({"optim": {"epoch": 2}}, "optim.epoch: no such key. Did you mean optim.epochs?"),
        ({"model": {"decoder": {"widht": 64}}}, "model.decoder.widht: no such key. Did you mean model.decoder.width?"),
        (
            {"data": {"crop": {"kind": "random_resized", "scales": [0.5, 1]}}},
            "data.crop.scales: no such key. Did you mean data.crop.scale?",
        ),
        ({"data": {"crop": {"kind": "whole", "scale": [0.5, 1]}}}, "data.crop.scale: no such key. Valid here: kind."),
        ({"mask": {"zzzzz": 1}}, "mask.zzzzz: no such key. Valid here: ratio, unit, kind."),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(sections, message):
    with pytest.raises(ConfigError) as caught:
        built(**sections)
    assert str(caught.value) == message


# --------------------------------------------------------------------------------------------------------- wrong values


def takes(key, found, allowed):
    return f"{key}: it does not take this value (found {found}). Allowed: {allowed}. What to do: give it such a value."


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"name": 3}, takes("name", "3", "a string")),
        ({"name": "a b"}, takes("name", "'a b'", "match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$'")),
        ({"seed": -1}, takes("seed", "-1", "greater than or equal to 0")),
        ({"data": None}, takes("data", "None", "a section of keys and values")),
        ({"data": {"image_size": "big"}}, takes("data.image_size", "'big'", "a list")),
        ({"data": {"image_size": [8]}}, "data.image_size.1: this value is required."),
        ({"data": {"image_size": [8, 0]}}, takes("data.image_size.1", "0", "greater than or equal to 1")),
        ({"data": {"channels": 65}}, takes("data.channels", "65", "less than or equal to 64")),
        (
            {"data": {"flip_probability": float("nan")}},
            takes("data.flip_probability", "nan", "a finite number"),
        ),
        (
            {"data": {"crop": {"kind": "centre"}}},
            "data.crop.kind: no such kind (found 'centre'). Allowed: random_resized, whole.",
        ),
        (
            {"data": {"crop": {"kind": "random_resized", "scale": [0.5, 1.5]}}},
            takes("data.crop.scale.1", "1.5", "less than or equal to 1"),
        ),
        (
            {"data": {"crop": {"scale": [0.9, 0.1]}}},
            "data.crop: scale must be [low, high] with 0 < low <= high (found [0.9, 0.1]).",
        ),
        ({"mask": {"ratio": 75}}, "mask.ratio: ratio is a share above 0 and below 1, or a list of such (found 75)."),
        ({"mask": {"ratio": [0.5, 1]}}, takes("mask.ratio.1", "1", "less than 1")),
        (
            {"optim": {"base_lr": "fast"}},
            takes("optim.base_lr", "'fast'", "a number"),
        ),
        ({"optim": {"clip_norm": True}}, "optim: clip_norm cannot be true or false (found true)."),
        (
            {"cluster": {"workers": 1.5}},
            takes("cluster.workers", "1.5", "an integer"),
        ),
        ({"training": {"skip_steps": [3, -1]}}, takes("training.skip_steps.1", "-1", "greater than or equal to 0")),
        ({"training": {"rewinds": -1}}, takes("training.rewinds", "-1", "greater than or equal to 0")),
        ({"training": {"spike": {"factor": 1}}}, takes("training.spike.factor", "1", "greater than 1")),
        ({"training": {"spike": {"window": 1}}}, takes("training.spike.window", "1", "greater than or equal to 2")),
        ({"training": {"precision": "fp16"}}, takes("training.precision", "'fp16'", "'fp32' or 'bf16'")),
        (
            {"model": {"width": 64, "heads": 5}},
            "model: heads 5 must divide width 64; the nearest that do are [2, 4, 8].",
        ),
        (
            {"model": {"decoder": {"width": 60, "heads": 7}}},
            "model.decoder: heads 7 must divide width 60; the nearest that do are [4, 5, 6].",
        ),
        (
            {"model": {"width": 66, "heads": 6}},
            "model: width 66 must be a multiple of 4 (2-D sine-cosine positions); the nearest are [64, 68].",
        ),
        ({"optim": {"epochs": 2}}, "optim: give exactly one of epochs and steps (set the other to null)."),
        ({"optim": {"steps": None}}, "optim: give exactly one of epochs and steps (set the other to null)."),
        (
            {"optim": {"warmup_steps": 1, "warmup_epochs": 1}},
            "optim: give at most one of warmup_epochs and warmup_steps (set the other to null).",
        ),
        (
            {"training": {"log_steps": 10, "checkpoint_steps": 25}},
            "training: checkpoint_steps 25 must be a multiple of log_steps 10, so that a resumed run logs the same "
            "values.",
        ),
        (
            {"training": {"checkpoint_steps": 20, "probe_steps": 30}},
            "training: probe_steps 30 must be a multiple of checkpoint_steps 20: a probe step is a checkpoint step.",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(sections, message):
    with pytest.raises(ConfigError) as caught:
        built(**sections)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("size", "patch", "side", "found", "allowed"),
    [
        ((30, 32), 16, "height", "image height 30, model.patch height 16", "16 or 32"),
        ((32, 40), 16, "width", "image width 40, model.patch width 16", "32 or 48"),
        ((8, 8), (4, 16), "width", "image width 8, model.patch width 16", "16"),
    ],
)
def test_the_patch_divides_the_image(size, patch, side, found, allowed):
    with pytest.raises(ConfigError) as caught:
        built(data={"image_size": size}, model={"patch": patch})
    assert str(caught.value) == (
        f"data.image_size: the patch's {side} must divide the image's {side}. Found: {found}. Allowed: {allowed}. "
        "What to do: change data.image_size or model.patch."
    )


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, {"nam": "a", "data": {}, "seed": "x", "optim": {"steps": 3, "lr": 1}}, origin="run.yaml")
    assert str(caught.value) == (
        "run.yaml: 5 mistakes: (1) name: this key is required. "
        "(2) seed: it does not take this value (found 'x'). Allowed: an integer. What to do: give it such a value. "
        "(3) data.path: this key is required. "
        "(4) optim.lr: no such key. Valid here: name, global_batch, epochs, steps, warmup_epochs, warmup_steps, "
        "base_lr, min_lr, weight_decay, weight_decay_end, betas, clip_norm. "
        "(5) nam: no such key. Did you mean name?"
    )


def test_keys_must_be_texts(write):
    with pytest.raises(ConfigError, match="keys should be strings"):
        load(write("run.yaml", "1: 2\n"))


# ---------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"name": "1e5"},  # a number to the loader, were it not in quotes
        {"name": "0123", "data": {"path": "on"}, "storage": {"path": "2024-01-01"}},
        {"optim": {"base_lr": 1e-5, "min_lr": 1.5e-300, "betas": [0.9, 1 - 2**-53], "weight_decay": 1e22}},
        {"data": {"image_size": [32, 48], "crop": {"kind": "whole"}}, "tracking": {"uri": "http://ümlaut: #x"}},
        {"seed": 2**63 - 1, "training": {"ledger": "'quoted\" \\ path'"}},
    ],
)
def test_what_is_dumped_loads_as_the_same(write, sections):
    config = built(**sections)
    again = load(write("dumped.yaml", dump(config)))
    assert again == config
    assert dump(again) == dump(config)


def test_a_dump_spells_every_field_out():
    raw = yaml.safe_load(dump(built()))
    assert set(raw) == set(RunConfig.model_fields)
    assert set(raw["model"]["decoder"]) == {"width", "depth", "heads", "mlp_ratio", "attention"}
    assert set(yaml.safe_load(dump(IngestConfig(source="digits", destination="x")))) == set(IngestConfig.model_fields)


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        built().optim.steps = 3


def test_transformers_alone_compute_activations_again():
    training = {"recompute_activations": True}
    assert built(training=training).training.recompute_activations
    for kind in ("conv", "sparse_conv"):
        with pytest.raises(ConfigError, match=rf"^training\.recompute_activations: a model of kind {kind} remembers"):
            built(model={"kind": kind}, training=training)


def test_a_stride_that_does_not_divide_the_image_is_named():
    raw = merge(BASE, {"data": {"image_size": 225}})
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, {**raw, "model": {"kind": "conv"}, "mask": {}})
    assert str(caught.value) == (
        "data.image_size: the stride's height must divide the image's height. Found: image height 225, a stride of 8. "
        "Allowed: 224 or 232. What to do: change data.image_size."
    )


@pytest.mark.parametrize(
    ("sections", "found"),
    [
        ({"model": {"kind": "conv"}}, "model.kind conv"),
        ({"model": {"kind": "sparse_conv"}, "optim": {"name": "lamb"}}, "model.kind sparse_conv, optim.name lamb"),
        ({"training": {"compile": True}}, "training.compile True"),
    ],
)
def test_what_was_not_seen_to_work_is_not_sharded(sections, found):
    with pytest.raises(
        ConfigError, match=rf"^training\.shard: not known to work .* Found: true, with {found}\. Allowed"
    ):
        built(**merge(sections, {"training": {"shard": True}}))
    assert built(training={"shard": True}).training.shard


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        ({"kind": "finetun"}, "evaluations.0.kind: no such kind (found 'finetun'). Allowed: knn, "),
        (
            {"kind": "finetune", "layer_decya": 0.5},
            "evaluations.0.layer_decya: no such key. Did you mean evaluations.0.layer_decay?",
        ),
        ({"kind": "knn", "zzzzz": 1}, "evaluations.0.zzzzz: no such key. Valid here: kind, k, temperature."),
    ],
)
def test_a_mistake_in_an_item_of_a_list_is_one_and_names_what_is_meant(evaluation, said):
    with pytest.raises(ConfigError) as caught:
        parse(EvaluateConfig, {"name": "x", "model": "m", "data": {"path": "d"}, "evaluations": [evaluation]})
    assert str(caught.value).startswith(said)


def test_the_files_of_a_config_are_all_that_it_is_laid_over(write):
    write("one.yaml", {"seed": 1})
    write("two.yaml", {"seed": 2, "extends": "one.yaml"})
    top = write("in/top.yaml", {"extends": ["../two.yaml", "../one.yaml"]})
    assert sorted(path.name for path in files_of(top)) == ["one.yaml", "top.yaml", "two.yaml"]


def test_an_absolute_path_to_a_base_is_none_on_another_machine(write):
    base = write("base.yaml", {"seed": 1})
    with pytest.raises(ConfigError, match=r"extends: an absolute path .*base.yaml in .*top.yaml"):
        files_of(write("top.yaml", {"extends": str(base)}))
