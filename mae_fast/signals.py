"""The signals that save and leave, from the start of a run to its end."""

import os
import signal
import threading
import time
from typing import Any

# The terminal's, the scheduler's, a closed session's, SLURM's warnings.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Told(Exception):
    """Raised where this process waits for a batch, and was told to stop."""


class Signals:
    """While it is entered, a signal only sets `told`, the first that came; a second Ctrl-C ends
    the process. In another thread than the main one no signal can be set, and none is.
    """

    def __init__(self, alone: bool) -> None:
        self.alone = alone  # no other process has to hear of it
        self.told, self._pressed = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            # Under nohup a run is to outlive its session.
            nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            heard = [s for s in SIGNALS if not (nohup and s == signal.SIGHUP)]
            self._before = {s: signal.signal(s, self._on_signal) for s in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler or signal.SIG_DFL)

    def look_up(self) -> None:
        """Called while a batch is waited for."""
        if self.told:
            raise Told

    def _on_signal(self, signum: int, frame: Any) -> None:
        self.told = self.told or signum
        if signum != signal.SIGINT:
            return
        now = time.monotonic()
        # One press may come twice: from the terminal, and handed on by torchrun.
        if self._pressed and now - self._pressed > 0.5:
            if not self.alone:
                os._exit(130)  # whatever the group waits for
            raise KeyboardInterrupt
        self._pressed = self._pressed or now
