"""Libraries that draw from the process's own generators, made to draw by key."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def drawn_by(word: int, device: torch.device | None = None) -> Iterator[None]:
    """What is drawn inside follows from `word` alone; outside it is as if nothing had been drawn.

    For one thread: others that draw in the meantime draw from the same generators.

    Args:
        word: 64 bits, as `draws.word` gives them.
        device: whose generator is used too, beside that of the CPU.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one is what is meant
    with torch.random.fork_rng(devices):
        # Not `torch.manual_seed`: without a GPU it notes the call, with its traceback, for one that may yet come.
        torch.default_generator.manual_seed(word)
        if devices:
            torch.cuda.manual_seed(word)
        random.seed(word)
        np.random.seed(word & 0xFFFFFFFF)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002
