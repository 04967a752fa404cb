"""How much memory and time loading a base as int8 takes.

    python -m benchmarks.int8_memory BASE [--json]

Prints what is in int8, by how much the process grew at its largest (the peak of resident memory less what was
resident before) and what stayed. The embedded base is loaded first, so that what torch and transformers take
when they are first used is not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from base_files.names import BASE_MODEL_HELP
from server.model.device import available_threads
from server.model.loader import Base, load_base

MEGABYTE = 1e6
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Growth:
    """Megabytes: of integers, of what is left in floats, at the peak of loading, and afterwards."""

    int8: float
    floats: float
    peak: float
    after: float
    seconds: float


def measure(base: str) -> Growth:
    """Load a base; the peak is right where this process was never larger before."""
    _load("micro")
    before, since = _resident(), time.perf_counter()
    loaded = _load(base)
    seconds = time.perf_counter() - since
    assert loaded.quantized is not None
    return Growth(
        int8=loaded.quantized.num_bytes / MEGABYTE,
        floats=sum(loaded.quantized.unquantized.values()) / MEGABYTE,
        peak=_largest() - before,
        after=_resident() - before,
        seconds=seconds,
    )


def _load(base: str) -> Base:
    return load_base(base, name="base", device="cpu", dtype="auto", max_model_len=None, quantization="int8")


def _resident() -> float:
    return _status("VmRSS") or _largest()


def _largest() -> float:
    """Megabytes at the largest so far. ``ru_maxrss`` would do, but on Linux a new program begins with its parent's."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT / MEGABYTE


def _status(field: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 / MEGABYTE for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help=BASE_MODEL_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(available_threads())
    found = measure(options.base)
    if options.json:
        print(json.dumps(asdict(found)))
        return
    print(f"int8 weights {found.int8:.0f} MB, float weights {found.floats:.0f} MB, loaded in {found.seconds:.1f} s")
    print(f"peak memory +{found.peak:.0f} MB ({found.peak / found.int8:.2f} x the int8 weights)")
    print(f"memory afterwards +{found.after:.0f} MB")


if __name__ == "__main__":
    main()
