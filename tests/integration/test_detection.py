"""A detector on a pretrained encoder finds what it should, and the same from scratch is shown beside it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "detection.py"


def test_average_precision_on_pasted_cut_outs_is_at_least_a_half(tmp_path):
    lines = tmp_path / "lines.jsonl"
    subprocess.run([sys.executable, SCRIPT, "--json", lines, "--out", tmp_path], check=True, timeout=1500)
    found = {line["figure"]: line["median"] for line in map(json.loads, lines.read_text().splitlines())}
    assert found["model: AP"] >= 0.5
    assert found["untrained: AP"] > 0.3
    assert (tmp_path / "detection_model_0.png").exists()
