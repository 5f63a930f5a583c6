"""How fast the run is, and why it is not faster: images/s, time waiting for data, MFU."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch

from maskray.data.retry import RETRIES

IMAGES_PER_SECOND = "throughput/images_per_second"
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
_MATMUL_SECONDS = 0.25


def matmul_rate(device: torch.device, precision: Literal["fp32", "bf16"]) -> float:
    """FLOP/s that this process reaches in a large square product: what MFU is a share of.

    Measured, not looked up: a data sheet knows neither the threads of a worker nor the clocks of a shared card.
    """
    size = _MATMUL_SIZE.get(device.type, 1024)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.ones(size, size, dtype=dtype, device=device)
    best, spent = float("inf"), 0.0
    a @ a  # the first call sets up kernels and threads
    while spent < _MATMUL_SECONDS:
        _wait_for(device)
        start = time.perf_counter()
        a @ a
        _wait_for(device)
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds), spent + seconds
    return 2.0 * size**3 / best


@cache
def rate_of_process(device: torch.device, precision: Literal["fp32", "bf16"], threads: int) -> float:  # noqa: ARG001
    """As `matmul_rate`, measured once in a process for as many threads as it has: the trials of a sweep share it."""
    return matmul_rate(device, precision)


def hardware(device: torch.device, threads: int) -> str:
    """What a rate was measured on, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, threads {threads}"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Meter:
    """Counts from log step to log step; `read` gives the rates of the interval and starts the next."""

    global_batch: int
    world_size: int
    train_flops_per_image: float
    device_flops: float
    data_wait_seconds: float = 0.0
    checkpoint_wait_seconds: float = 0.0
    steps: int = 0
    _start: float = field(default_factory=time.perf_counter)
    _retries: int = field(default_factory=lambda: RETRIES.count)

    def read(self) -> dict[str, float]:
        """Metrics of the interval, under the names that the tracker shows; no rates where no step was trained."""
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        images_per_second = self.steps * self.global_batch / seconds
        done = images_per_second / self.world_size * self.train_flops_per_image
        rates = {IMAGES_PER_SECOND: images_per_second, "throughput/mfu": done / self.device_flops}
        out = {
            **(rates if self.steps else {}),
            "throughput/data_wait_seconds": self.data_wait_seconds,
            "throughput/data_wait_fraction": self.data_wait_seconds / seconds,
            "throughput/checkpoint_wait_seconds": self.checkpoint_wait_seconds,
            "throughput/storage_retries": RETRIES.count - self._retries,
        }
        self.data_wait_seconds = self.checkpoint_wait_seconds = 0.0
        self.steps, self._start, self._retries = 0, now, RETRIES.count
        return out
