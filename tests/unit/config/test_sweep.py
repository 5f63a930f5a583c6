"""What a sweep is asked for: what is refused, and in which words."""

from pathlib import Path

import pytest
import yaml

from maskray.config.load import dump, parse
from maskray.config.sweep import (
    Asha,
    GridSearch,
    Median,
    NoStopping,
    OptunaSearch,
    RandomSearch,
    SweepConfig,
    load_sweep,
)
from maskray.errors import ConfigError

BASE = {"name": "s", "base": {"name": "run"}, "space": {"mask.ratio": [0.5, 0.75]}}
DRAWN = {"mask.ratio": {"kind": "uniform", "low": 0.5, "high": 0.9}}


def sweep(**sections):
    return parse(SweepConfig, {**BASE, **sections}, origin="sweep.yaml")


# ---------------------------------------------------------------------------------------------------- search, stopping


def test_what_is_not_said():
    config = sweep()
    assert (config.search, config.stopping, config.budget, config.seeds) == (
        GridSearch(),
        NoStopping(),
        None,
        (0, 1, 2),
    )
    assert (config.objective.metric, config.objective.direction) == ("probe/knn", "max")


def test_kinds_of_search_and_stopping():
    assert sweep(space=DRAWN, search={"kind": "random", "points": 4}).search == RandomSearch(points=4)
    assert sweep(space=DRAWN, search={"kind": "optuna", "points": 4}).search == OptunaSearch(points=4, startup=10)
    assert sweep(stopping={"kind": "asha", "first": 1e9}).stopping == Asha(first=1e9, unit="flops", reduction=3)
    assert sweep(stopping={"kind": "median", "first": 10, "unit": "steps"}).stopping == Median(first=10, unit="steps")


def test_a_random_search_may_go_through_a_grid():
    assert sweep(space={**BASE["space"], "optim.base_lr": DRAWN["mask.ratio"]}, search={"kind": "random", "points": 2})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"space": DRAWN}, r"^space\.mask\.ratio: a grid has no end here\. Found: uniform\. .*or take search\.kind"),
        ({"search": {"kind": "optuna", "points": 4}}, r"^space\.mask\.ratio: Optuna draws.*Found: grid\..*: choice"),
        ({"search": {"kind": "bayes"}}, r"^search\.kind: no such kind \(found 'bayes'\)\. Allowed: grid, random, o"),
        ({"search": {"kind": "random"}}, r"^search\.points: this key is required"),
        ({"search": {"kind": "random", "points": 0}}, r"^search\.points: .*Allowed: greater than or equal to 1"),
        ({"stopping": {"kind": "pbt"}}, r"^stopping\.kind: not on the path.*weights.*Found: pbt\. Allowed: none, asha"),
        ({"stopping": {"kind": "PB2"}}, r"^stopping\.kind: not on the path that a sweep takes: it copies.*Found: PB2"),
        ({"stopping": {"kind": "hyperband"}}, r"^stopping\.kind: .*it pauses trials.*Found: hyperband"),
        ({"stopping": {"kind": "never"}}, r"^stopping\.kind: no such kind \(found 'never'\)\. Allowed: none, asha"),
        ({"stopping": {"kind": "asha"}}, r"^stopping\.first: this key is required"),
        ({"stopping": {"kind": "asha", "first": 0}}, r"^stopping\.first: .*Allowed: greater than 0"),
        ({"stopping": {"kind": "asha", "first": 1, "reduction": 1}}, r"^stopping\.reduction: .*greater than 1"),
        ({"stopping": {"kind": "median", "first": 1, "min_trials": 0}}, r"^stopping\.min_trials: "),
        ({"seeds": []}, r"^seeds: "),
        ({"seeds": [0, 1, 0]}, r"^seeds: a seed stands twice\. Found: \[0, 1, 0\]"),
        ({"seeds": [-1]}, r"^seeds\.0: .*Allowed: greater than or equal to 0"),
        ({"name": "a/b"}, r"^name: "),
        ({"confidence": 1}, r"^confidence: "),
        ({"trials": {"concurrency": 0}}, r"^trials\.concurrency: "),
        ({"trials": {"limit_seconds": 0}}, r"^trials\.limit_seconds: "),
        ({"trials": {"fail_if": "never"}}, r"^trials\.fail_if: "),
        ({"register_best": {"name": "a:b"}}, r"^register_best\.name: "),
        *(
            (
                {"register_best": {"name": "a", "promotion": {"gate": {}, key: value}}},
                rf"^register_best\.promotion\.{key}: the sweep says it.*Found: .*What to do: leave it out: .*{what}",
            )
            for key, value, what in [
                ("model", "other", "register_best.name"),
                ("challenger", 3, "the version that"),
                ("storage", {"path": "elsewhere"}, "base's storage"),
                ("tracking", {"uri": None}, "base's tracking"),
            ]
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        sweep(**sections)


# -------------------------------------------------------------------------------------------------- objective, budget


def test_the_loss_is_refused_with_the_reason_unless_it_is_forced():
    with pytest.raises(
        ConfigError, match=r"^objective\.metric: the loss says nothing of.*easier task.*Found: pretrain/loss"
    ):
        sweep(objective={"metric": "pretrain/loss", "direction": "min"})
    forced = sweep(objective={"metric": "pretrain/loss", "direction": "min", "forced": True})
    assert forced.objective.metric == "pretrain/loss"


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"metric": "probe/knm"}, r"^objective\.metric: no probe finds this\. Found: probe/knm\. Allowed: probe"),
        ({"direction": "min"}, r"^objective\.direction: of probe/knn more is better\. Found: min\. Allowed: max"),
        (
            {"metric": "pretrain/loss", "forced": True},
            r"^objective\.direction: of pretrain/loss less is better\. Found: max\. Allowed: min",
        ),
        ({"direction": "up"}, r"^objective\.direction: .*Allowed: 'max' or 'min'"),
    ],
)  # fmt: skip
def test_an_objective_that_is_none_is_refused(objective, message):
    with pytest.raises(ConfigError, match=message):
        sweep(objective=objective)


@pytest.mark.parametrize("budget", [{"steps": 10}, {"flops": 1e12}, {"accelerator_seconds": 60}])
def test_a_budget_is_one_of_three(budget):
    assert sweep(budget=budget).budget.model_dump(exclude_none=True) == budget


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"budget": {}}, r"^budget: give exactly one of steps, flops and accelerator_seconds"),
        ({"budget": {"steps": 1, "flops": 1}}, r"^budget: give exactly one of"),
        ({"budget": {"flops": 0}}, r"^budget\.flops: "),
        (
            {"budget": {"steps": 10}, "space": {"optim.epochs": [1, 2]}},
            r"^space\.optim\.epochs: the budget says how long.*What to do: leave it out, or set budget: null",
        ),
        (
            {"budget": {"steps": 10}, "space": {**BASE["space"], "optim.warmup_steps": [1, 2]}},
            r"^space\.optim\.warmup_steps: the budget says how long",
        ),
        (
            {"budget": {"accelerator_seconds": 10}, "space": DRAWN, "search": {"kind": "optuna", "points": 2}},
            r"^budget\.accelerator_seconds: what a point costs is measured before.*Allowed: budget\.flops or",
        ),
    ],
)  # fmt: skip
def test_a_budget_that_does_not_go_with_the_rest_is_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        sweep(**sections)


def test_lengths_may_be_axes_without_a_budget():
    assert sweep(space={"optim.epochs": [1, 2]}).budget is None


# --------------------------------------------------------------------------------------------------------------- files


def test_a_base_is_a_file_beside_the_sweeps(tmp_path: Path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "small.yaml").write_text("name: small\nseed: 3\n")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(BASE | {"base": "runs/small.yaml"}))
    assert load_sweep(tmp_path / "sweep.yaml").base == {"name": "small", "seed": 3}
    assert load_sweep(tmp_path / "sweep.yaml", ["seeds=[5]"]).seeds == (5,)
    assert load_sweep(tmp_path / "sweep.yaml", ["base.seed=4"]).base == {"name": "small", "seed": 4}
    over = load_sweep(tmp_path / "sweep.yaml", ["overrides.optim.steps=3", "overrides.optim.steps=4"]).overrides
    assert over == {"optim.steps": 4}
    assert load_sweep(tmp_path / "sweep.yaml", ["space.mask.ratio=[0.3]"]).space["mask.ratio"].values == (0.3,)
    with pytest.raises(ConfigError, match=r"^the config file cannot be read\. Found: .*gone\.yaml"):
        load_sweep(tmp_path / "sweep.yaml", ["base=gone.yaml"])
    with pytest.raises(ConfigError, match=r"^base: .*Allowed: a section"):
        load_sweep(tmp_path / "sweep.yaml", ["base=3"])


def test_a_base_is_beside_the_file_that_says_it_and_not_beside_those_that_extend_it(tmp_path: Path):
    def write(place: str, **keys: object) -> Path:
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(keys))
        return path

    write("a/runs/one.yaml", name="one", seed=1)
    write("two.yaml", name="two", seed=2)
    write("a/sweep.yaml", **BASE | {"base": "runs/one.yaml"})
    child = write("b/c/child.yaml", extends="../../a/sweep.yaml", name="child")
    assert load_sweep(child).base == {"name": "one", "seed": 1}
    grandchild = write("grandchild.yaml", extends="b/c/child.yaml", name="grandchild")
    assert load_sweep(grandchild).base == {"name": "one", "seed": 1}
    assert load_sweep(grandchild, ["base.seed=5"]).base == {"name": "one", "seed": 5}
    assert load_sweep(grandchild, ["base=two.yaml"]).base == {"name": "two", "seed": 2}
    other = write("other.yaml", extends="b/c/child.yaml", base="two.yaml")
    assert load_sweep(other).base == {"name": "two", "seed": 2}


def test_a_sweep_is_what_its_dump_says():
    space = {"a": [1, [2], {"b": 3}], "c": {"kind": "grid", "values": ["x"], "when": {"a": 1}}}
    config = sweep(space=space, stopping={"kind": "asha", "first": 1e9}, budget={"flops": 1e12})
    assert parse(SweepConfig, yaml.safe_load(dump(config))) == config
    assert parse(SweepConfig, config.model_dump()) == config


def test_what_the_command_line_says_of_base_is_laid_over_its_file(tmp_path):
    (tmp_path / "run.yaml").write_text("name: run\noptim: {steps: 5, base_lr: 0.5}\n")
    (tmp_path / "other.yaml").write_text("name: other\n")
    path = tmp_path / "sweep.yaml"
    path.write_text("name: s\nbase: run.yaml\nspace: {mask.ratio: [0.5]}\n")
    assert load_sweep(path, ["base.optim.steps=9"]).base == {"name": "run", "optim": {"steps": 9, "base_lr": 0.5}}
    assert load_sweep(path, ["base=other.yaml"]).base == {"name": "other"}
