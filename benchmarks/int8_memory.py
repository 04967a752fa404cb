"""How much memory and time loading a base takes, as int8 or in floats.

    python -m benchmarks.int8_memory BASE [--weights int8 bfloat16 float32] [--json]

Prints what the weights take that are served, by how much the process grew at its largest (the peak of resident
memory less what was resident before) and what stayed. The embedded base is loaded first, so that what torch and
transformers take when they are first used is not counted. Each number format is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from base_files.names import BASE_MODEL_HELP
from benchmarks.parts.bases import base_argument
from cpu_kernels.cores import default_threads
from server.model.loader import Base, load_base

MEGABYTE = 1e6
FORMATS = ("int8", "bfloat16", "float32")
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Growth:
    """Megabytes: of integers, of what is left in floats, at the peak of loading, and afterwards."""

    int8: float
    floats: float
    peak: float
    after: float
    seconds: float

    @property
    def served(self) -> float:
        return self.int8 + self.floats


def measure(base: str, weights: str = "int8") -> Growth:
    """Load a base; the peak is right where this process was never larger before."""
    _load("micro", weights)
    before, since = _resident(), time.perf_counter()
    loaded = _load(base, weights)
    seconds = time.perf_counter() - since
    quantized = loaded.quantized
    floats = [parameter.nbytes for parameter in loaded.model.parameters()]
    if quantized is not None:
        floats = list(quantized.unquantized.values())
    return Growth(
        int8=0.0 if quantized is None else quantized.num_bytes / MEGABYTE,
        floats=sum(floats) / MEGABYTE,
        peak=_largest() - before,
        after=_resident() - before,
        seconds=seconds,
    )


def _load(base: str, weights: str) -> Base:
    dtype, quantization = ("auto", "int8") if weights == "int8" else (weights, "none")
    return load_base(base, name="base", device="cpu", dtype=dtype, max_model_len=None, quantization=quantization)


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
    return next((int(line.split()[1]) * 1024 / MEGABYTE for line in lines if line.startswith(f"{field}:")), None)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=base_argument, help=BASE_MODEL_HELP)
    parser.add_argument("--weights", nargs="+", default=["int8"], choices=FORMATS, help="number formats to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each format")
    return parser.parse_args()


def _print(weights: str, found: Growth) -> None:
    print(f"{weights:9} weights {found.served:.0f} MB", end="")
    print(f" ({found.int8:.0f} in int8)" if found.int8 else "", end="")
    print(f", loaded in {found.seconds:.1f} s")
    print(f"{'':9} peak memory +{found.peak:.0f} MB ({found.peak / found.served:.2f} x the weights)", end="")
    print(f", afterwards +{found.after:.0f} MB")


def main() -> None:
    options = _parse()
    if len(options.weights) > 1:
        for weights in options.weights:
            flags = ["--weights", weights, *(["--json"] if options.json else [])]
            subprocess.run([sys.executable, "-m", "benchmarks.int8_memory", options.base, *flags], check=True)
        return
    torch.set_num_threads(default_threads())
    found = measure(options.base, options.weights[0])
    if options.json:
        print(json.dumps(asdict(found)))
    else:
        _print(options.weights[0], found)


if __name__ == "__main__":
    main()
