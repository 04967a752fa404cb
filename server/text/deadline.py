"""An end to work that might not end by itself: an exception raised in the thread that does it."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator


class DeadlineExceeded(BaseException):
    """The work took too long, and was broken off.

    No ``Exception``: jinja2 takes those that come while it folds constants for a sign that they are none, and goes on.
    """


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Break off Python code of this thread after ``seconds``; a single call into C is not interrupted.

    Raises ``DeadlineExceeded``. Source: ``PyThreadState_SetAsyncExc`` in Python's C API.
    """
    thread, lock, over = threading.get_ident(), threading.Lock(), False

    def break_off() -> None:
        with lock:
            if not over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(DeadlineExceeded))

    timer = threading.Timer(seconds, break_off)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            over = True
        timer.cancel()
