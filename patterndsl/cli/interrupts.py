"""What does Ctrl-C do while PyTorch is imported? It ends the process, which an exception would not do: the import
swallows it, and goes on for seconds or leaves modules half made."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of what imports PyTorch, before anything is written: an interrupt kills, as where Python is not.

    A caller's own handler stays, and so does the signal of a process in the background, which is ignored.
    """
    if (
        threading.current_thread() is not threading.main_thread()  # no other may say what signals do
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
