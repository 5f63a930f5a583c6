"""The house stands as it was drawn: names, configs and their headers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from maskray.config.embedding import EmbedConfig
from maskray.config.evaluation import EvaluateConfig
from maskray.config.load import json_schema, load_as, merge, parse
from maskray.config.promotion import PromotionConfig
from maskray.config.schema import RunConfig
from maskray.config.section import Section
from maskray.config.sweep import SweepConfig, load_sweep

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
KINDS: dict[str, type[Section]] = {
    "pretrain": RunConfig,
    "embed": EmbedConfig,
    "evaluate": EvaluateConfig,
    "promote": PromotionConfig,
    "sweep": SweepConfig,
}
"""By the folder of the config."""
HEADER = ("command", "hardware", "time", "result")
DRAWERS = {"utils", "util", "misc", "common", "helpers"}


def test_platform_is_a_source_root_and_no_package():
    assert not (ROOT / "platform" / "__init__.py").exists()
    result = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.strip() == "Linux", result.stderr


@pytest.mark.parametrize("folder", ["platform", "jobs"])
def test_nothing_on_the_path_shadows_the_standard_library(folder: str):
    names = {p.stem for p in (ROOT / folder).iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert names & set(sys.stdlib_module_names) == set()


def test_there_is_no_drawer():
    assert {p.stem for p in (ROOT / "platform").rglob("*.py")} & DRAWERS == set()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_config_loads(path: Path):
    if path.parent.name == "sweep":
        sweep = load_sweep(path)  # its points are tried against a dataset: unit/sweeps/test_space
        assert parse(RunConfig, merge(sweep.base, {"name": sweep.name}))
    else:
        assert load_as(KINDS[path.parent.name], path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_config_says_what_it_costs_and_reaches(path: Path):
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    missing = [word for word in HEADER if not re.search(rf"^# {word}: +\S", header, re.MULTILINE)]
    assert missing == []


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("folder", KINDS)
def test_the_schema_for_editors_is_that_of_the_code(folder: str):
    place = "schema.json" if folder == "pretrain" else f"{folder}/schema.json"
    assert (ROOT / "configs" / place).read_text() == json_schema(KINDS[folder]), "run `make schema`"
