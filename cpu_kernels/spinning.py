"""How long threads of the OpenMP library spin before they sleep, set before torch loads that library.

The threads of a team wait for each other at the end of every operation, and between two operations for the next. A
thread that spins occupies a core. Where another process is busy, that is the core which a thread with work waits for.
GNU's library spins 300,000 times without a setting, 4 to 14 ms by the CPU; LLVM's 200 ms. Sleeping costs a wake-up,
tens of microseconds, so a thread spins as long as the pauses within a step last.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SETTINGS = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""For GNU's library (Linux), in looks at a variable, 15 to 45 ns each; for LLVM's (macOS), in milliseconds."""
CHOSEN_BY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""A user who sets one of these has chosen."""


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads of this process, and of those that it starts, sleep soon, unless the user has chosen."""
    if not any(name in environment for name in CHOSEN_BY):
        environment.update(SETTINGS)
