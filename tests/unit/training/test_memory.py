"""Freed memory stays with the process, and no step pays for it again."""

import subprocess
import sys
from pathlib import Path

import pytest

# Page faults of each of twelve steps. The first ones find no room of the right size beside what others hold.
PROGRAM = """
import resource, sys, torch
from maskray.training.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
torch.set_num_threads(1)
layers = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU()) for _ in range(4)))
images = torch.randn(32768, 256)
def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layers(images).square().mean().backward()
    layers.zero_grad()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(faults_of_a_step() for _ in range(12)))
"""


@pytest.mark.parametrize("memory", ["kept", "given back"])
def test_a_step_finds_the_memory_of_the_one_before(memory):
    package = str(Path(__file__).parents[3] / "platform")
    command = [sys.executable, "-c", PROGRAM, memory]
    done = subprocess.run(command, env={"PYTHONPATH": package}, capture_output=True, text=True, check=True)
    first, *_, third_last, second_last, last = map(int, done.stdout.split())
    at_the_end = min(third_last, second_last, last)
    assert at_the_end < first / 100 if memory == "kept" else at_the_end > first / 2
