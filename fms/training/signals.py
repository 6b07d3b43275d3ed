"""SIGTERM and Ctrl-C: the step is finished and saved; the second one ends at once."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

SAME = 1.0  # seconds within which signals are one: what is sent to all processes comes again through torchrun


class Stop:
    """As a context: `code` becomes 143 or 130 when a signal has come, and stays 0 without."""

    code = 0
    at = 0.0

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {s: signal.signal(s, self._heard) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.code and time.monotonic() - self.at > SAME:
            os._exit(128 + number)
        if not self.code:
            self.code, self.at = 128 + number, time.monotonic()
