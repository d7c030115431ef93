"""Signs of life from inside long work: a save, a load, a validation of many minutes.

Who does such work calls `alive` after each piece of it, which costs one look at the clock; the heartbeat tells the
launcher when that was last. Work of another thread counts only while the main thread waits for it: files that are
written in the background must not hide that the training step hangs.

Free of torch: the launcher reads heartbeats.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_last = 0.0
_main_waits = False


def alive() -> None:
    """A piece of work is done: a block of a file, a tensor, a batch."""
    global _last
    if _main_waits or threading.current_thread() is threading.main_thread():
        _last = time.time()


def last_alive() -> float:
    """When a piece of work was last done, in seconds since 1970; 0 where none was."""
    return _last


@contextmanager
def waiting_for_a_thread() -> Iterator[None]:
    """While the main thread waits here, the other threads' work is its progress."""
    global _main_waits
    _main_waits = True
    try:
        yield
    finally:
        _main_waits = False
