"""SIGTERM and Ctrl-C: the step is finished and saved; the second one ends at once."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self


class Stop:
    """As a context: `code` becomes 143 or 130 when a signal has come, and stays 0 without."""

    code = 0

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {s: signal.signal(s, self._heard) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.code:
            os._exit(128 + number)
        self.code = 128 + number
