"""SIGTERM and SIGINT become a flag that the loop reads between two updates."""

import signal
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While the context is open, SIGTERM and SIGINT are noted in `.signum` instead of ending the process.

    Further signals change nothing: a launcher that hands Ctrl-C on and then dies sends two or three for one
    wish, and a save must not be cut short by them. SIGKILL remains, and leaves the previous checkpoint.
    Open it in the main thread, where Python delivers signals.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {wanted: signal.signal(wanted, self._note) for wanted in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for wanted, previous in self._previous.items():
            signal.signal(wanted, previous)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum


def exit_code(signum: int) -> int:
    """128 + the signal's number, as shells report it: 143 after SIGTERM, 130 after SIGINT (Ctrl-C)."""
    return 128 + signum


def shield_worker(worker_id: int) -> None:
    """`worker_init_fn` of training loaders: their workers ignore both signals.

    A signal to the process group reaches them too, and a dead worker would fail the update that is to be
    finished. They leave when the loop closes them, or within seconds when the training process is gone.
    """
    for wanted in _SIGNALS:
        signal.signal(wanted, signal.SIG_IGN)
