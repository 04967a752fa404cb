"""A time limit on Python code: an exception raised in the thread that runs it."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator


class DeadlineExceeded(BaseException):
    """The time limit was exceeded.

    Not an ``Exception``, because jinja2 catches those while it folds constants, and continues.
    """


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Interrupt Python code of this thread after ``seconds``; a single call into C is not interrupted.

    Raises ``DeadlineExceeded``. Source: ``PyThreadState_SetAsyncExc`` in Python's C API.
    """
    thread = threading.get_ident()
    lock = threading.Lock()
    over = False

    def interrupt() -> None:
        with lock:
            if not over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(DeadlineExceeded))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            over = True
        timer.cancel()
