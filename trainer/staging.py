"""Bytes of a mapped file onto a CUDA device, through page-locked memory and several threads.

    with Staging("cuda") as staging:
        there = staging.upload(reader.flat(name))     # uint8 [bytes] on the device

The driver's own path for ordinary memory copies with one thread and stops at every page that is not mapped yet.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

_CHUNK = 8 << 20
_THREADS = 8


class Staging:
    """One page-locked buffer a thread; a chunk is copied into it and sent while other threads copy theirs."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._pool = ThreadPoolExecutor(_THREADS)
        self._own = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)

    def upload(self, here: Tensor) -> Tensor:
        """uint8 [bytes] on the device, of such a tensor here; they are there for whatever is enqueued from now on."""
        there = torch.empty(len(here), dtype=torch.uint8, device=self.device)
        free = torch.cuda.current_stream(self.device).record_event()  # the allocator may hand out memory still in use
        for done in [
            self._pool.submit(self._send, here[start : start + _CHUNK], there[start : start + _CHUNK], free)
            for start in range(0, len(here), _CHUNK)
        ]:
            done.result()
        return there

    def _send(self, here: Tensor, there: Tensor, free: torch.cuda.Event) -> None:
        own = self._own
        if not hasattr(own, "buffer"):
            own.buffer = torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True)
            own.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        part = own.buffer[: len(here)]
        part.copy_(here)
        own.stream.wait_event(free)
        with torch.cuda.stream(own.stream):
            there.copy_(part, non_blocking=True)
        own.stream.synchronize()
