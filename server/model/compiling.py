"""Compiles the routines of a server while its base is being read; what cannot be compiled is left to torch."""

from __future__ import annotations

import logging
import threading

import torch

from cpu_kernels.routine import available

logger = logging.getLogger("quickchange.model")


class Compiling:
    """A thread that compiles every routine but products, which are tried when a kernel is chosen."""

    def __init__(self, kv_dtype: torch.dtype) -> None:
        self._kv_dtype, self._succeeded = kv_dtype, False
        self._thread = threading.Thread(target=self._compile, name="compile")
        self._thread.start()

    def succeeded(self) -> bool:
        """Wait until it has ended; whether the routines are there. Why they are not is in the log."""
        self._thread.join()
        return self._succeeded

    def _compile(self) -> None:
        if not available():
            return
        try:
            from cpu_kernels.every import compile_every_routine

            compile_every_routine(self._kv_dtype)
        except Exception as error:
            logger.warning(
                "the routines for this CPU could not be compiled (%s: %s): attention, norms and deltas are torch's",
                type(error).__name__,
                str(error)[:300],
                exc_info=True,
            )
        else:
            self._succeeded = True
