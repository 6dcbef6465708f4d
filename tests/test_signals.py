"""Which signal is heard, how often, and what it does by itself: it only sets `told`."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mae_fast.signals import Signals, Told

ALL = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"]


def _unheard(signum, frame):
    """Whose a signal is that is not heard; SIG_DFL would end the tests."""


@pytest.fixture(autouse=True)
def handlers():
    """The tests may run under nohup, and leave every handler as it was."""
    before = {name: signal.signal(getattr(signal, name), _unheard) for name in ALL}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


def _send(name: str, after: float = 0.0) -> None:
    time.sleep(after)
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", ALL)
def test_a_signal_is_told_and_raises_only_where_a_batch_is_waited_for(name):
    with Signals(alone=True) as heard:
        heard.look_up()
        _send(name)
        assert heard.told == getattr(signal, name)
        with pytest.raises(Told):
            heard.look_up()
    assert signal.getsignal(getattr(signal, name)) is _unheard


def test_what_came_first_is_what_is_told():
    """A scheduler warns by SIGUSR1, and sends SIGTERM when its patience ends."""
    with Signals(alone=True) as heard:
        for name in ("SIGUSR1", "SIGTERM", "SIGINT"):
            _send(name)
        assert heard.told == signal.SIGUSR1


def test_no_other_signal_than_ctrl_c_leaves_by_coming_again():
    with Signals(alone=True) as heard:
        for name in (*ALL, *ALL[1:]):
            _send(name, after=0.1)
        assert heard.told == signal.SIGINT


def test_a_second_ctrl_c_is_one_half_a_second_later():
    """torchrun hands on what the terminal sent already."""
    with Signals(alone=True):
        for after in (0.0, 0.1, 0.1):
            _send("SIGINT", after)
        with pytest.raises(KeyboardInterrupt):
            _send("SIGINT", after=0.6)


def test_a_second_ctrl_c_ends_a_rank_at_once_whatever_it_waits_for():
    """No exception: in the middle of a collective nothing would be raised."""
    code = """if True:
        import os, signal, time
        from mae_fast.signals import Signals
        with Signals(alone=False):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.6)
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5.0)
            finally:
                os._exit(1)
    """
    assert subprocess.run([sys.executable, "-c", code]).returncode == 130


def test_sighup_is_left_alone_under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals(alone=True) as heard:
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        _send("SIGUSR2")
        assert heard.told == signal.SIGUSR2
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_in_another_thread_no_handler_is_set():
    got = []

    def enter():
        with contextlib.suppress(ValueError), Signals(alone=True):
            got.append([signal.getsignal(getattr(signal, name)) for name in ALL])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert got == [[_unheard] * len(ALL)]
