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
layers = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()) for _ in range(4)))
images = torch.randn(131072, 64)  # 32 MiB, which glibc never keeps by default
def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layers(images).square().mean().backward()
    layers.zero_grad()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(faults_of_a_step() for _ in range(12)))
"""

# Megabytes in use: at first, after eight threads have used 40 each, and when all is given back.
THREADS = """
import threading, psutil
from maskray.training.memory import give_back_freed_memory, keep_freed_memory
keep_freed_memory()
in_use = lambda: psutil.Process().memory_info().rss / 2**20
together = threading.Barrier(9)
def use():
    blocks = [bytearray(100_000) for _ in range(400)]
    together.wait()  # all at once, so that each has an arena
    del blocks[1:-1]  # something stays, between which there is room
    together.wait()
    together.wait()
print(in_use())
for _ in range(8):
    threading.Thread(target=use).start()
together.wait()
together.wait()
print(in_use())
give_back_freed_memory()
print(in_use())
together.wait()
"""


def run(program: str, *arguments: str) -> list[float]:
    package = str(Path(__file__).parents[3] / "platform")
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env={"PYTHONPATH": package}, capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


def test_what_every_arena_kept_is_given_back():
    first, kept, at_the_end = run(THREADS)
    assert kept > first + 8 * 30
    assert at_the_end < first + 30


@pytest.mark.parametrize("memory", ["kept", "given back"])
def test_a_step_finds_the_memory_of_the_one_before(memory):
    first, *_, third_last, second_last, last = run(PROGRAM, memory)
    at_the_end = min(third_last, second_last, last)
    assert at_the_end < first / 100 if memory == "kept" else at_the_end > first / 2
