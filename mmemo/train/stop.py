"""SIGTERM and Ctrl-C: finish the step, save, and end with the code that says why."""

from __future__ import annotations

import signal
from types import FrameType

from mmemo.train.distributed import handling


class StopRequest:
    """Remembers a signal so that the loop can end between two steps.

    Used as a context. Until :meth:`hold` is called nothing is worth saving and SIGTERM ends the
    process at once; a second Ctrl-C always does.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._holding = False

    def __enter__(self) -> StopRequest:
        self._handling = handling({signal.SIGTERM: self._on_term, signal.SIGINT: self._on_int})
        self._handling.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._handling.__exit__(None, None, None)

    def hold(self, holding: bool = True) -> None:
        """From here on signals wait for the loop; with False they no longer do."""
        self._holding = holding

    @property
    def code(self) -> int:
        """The exit code: 143 after SIGTERM, 130 after Ctrl-C, 0 without a signal."""
        return 128 + self.signal if self.signal else 0

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if not self._holding:
            raise SystemExit(self.code)

    def _on_int(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.signal == number, number
        if again or not self._holding:
            raise KeyboardInterrupt
