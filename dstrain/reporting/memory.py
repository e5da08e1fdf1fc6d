"""Memory of the stages of a run, under the names that transformers documents for its metrics."""

from __future__ import annotations

import gc
import threading
from typing import Any

import torch

_SAMPLE_SECONDS = 0.002


class MemoryMetrics:
    """Measures a stage at a time; one that begins inside another is not measured.

    What the stage has changed is ``<stage>_mem_cpu_alloc_delta``; by how much its peak was above
    its end is ``<stage>_mem_cpu_peaked_delta``; both in bytes, and for ``gpu`` too where there is
    one. The figures of the first stage, ``init``, come with those of the next.
    """

    def __init__(self, *, enabled: bool) -> None:
        """Begin with no stage.

        Args:
            enabled: whether to measure at all.
        """
        self._enabled = enabled
        self._stage: str | None = None
        self._kept: dict[str, int] = {}

    def start(self, stage: str) -> None:
        """Begin a stage: "init", "train", "eval" or "test"."""
        if not self._enabled or (self._stage == "train" and stage != "train"):
            return
        if self._stage is not None:  # it has failed
            self.stop(self._stage)
        self._stage = stage
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._gpu_before = torch.cuda.memory_allocated()
        self._sampler = _PeakSampler()
        self._cpu_before = self._sampler.used()
        self._sampler.start()

    def stop(self, stage: str) -> dict[str, int]:
        """End a stage and return its figures; none where another stage is being measured."""
        if not self._enabled or self._stage != stage:
            return {}
        self._stage = None
        peak = self._sampler.stop()
        gc.collect()
        figures = {}
        if stage == "init":
            figures["before_init_mem_cpu"] = self._cpu_before
        figures |= _deltas(f"{stage}_mem_cpu", self._cpu_before, self._sampler.used(), peak)
        if torch.cuda.is_available():
            if stage == "init":
                figures["before_init_mem_gpu"] = self._gpu_before
            now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
            figures |= _deltas(f"{stage}_mem_gpu", self._gpu_before, now, peak)
        if stage == "init":
            self._kept = figures
            return {}
        figures, self._kept = {**self._kept, **figures}, {}
        return figures


def _deltas(name: str, before: int, now: int, peak: int) -> dict[str, int]:
    return {f"{name}_alloc_delta": now - before, f"{name}_peaked_delta": max(0, peak - now)}


class _PeakSampler:
    """Samples this process's resident memory in a thread, and keeps the peak."""

    def __init__(self) -> None:
        import psutil

        self._process: Any = psutil.Process()
        self._peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dstrain-memory", daemon=True)

    def used(self) -> int:
        return int(self._process.memory_info().rss)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self._peak

    def _run(self) -> None:
        while True:
            self._peak = max(self._peak, self.used())
            if self._ended.wait(_SAMPLE_SECONDS):
                return
