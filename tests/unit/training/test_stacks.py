"""A process that hangs says where, when it is asked: a real one, by a real signal."""

import subprocess
import sys
import time
from pathlib import Path

from maskray.training import stacks

# As Ray Train has it: the training is not in the main thread, and the signal finds all of them waiting.
HANGS = """
import threading
from maskray.training import stacks

def in_a_collective():
    print("waits", flush=True)
    go.wait()

go = threading.Event()
threading.Thread(target=in_a_collective).start()
stacks.write_on_signal()
input()
go.set()
print("went on", flush=True)
"""


def test_a_process_that_hangs_says_where_and_goes_on():
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout
    assert process.stdout.readline() == "waits\n"
    until = time.monotonic() + 30
    while not _is_caught(process.pid):  # before, the signal would end it
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(stacks.SIGNAL)
    said, trace = process.communicate("\n", timeout=30)
    assert (said, process.returncode) == ("went on\n", 0)
    assert "in in_a_collective" in trace
    assert "in <module>" in trace, "of each thread"


def _is_caught(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (stacks.SIGNAL - 1) & 1)
