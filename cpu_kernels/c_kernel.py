"""A kernel of the C library: its record of arguments, checked field by field, and its code for one tier."""

from __future__ import annotations

import struct

from cpu_kernels.library import KernelEntry, library
from cpu_kernels.tiers import available_tiers


class CKernel:
    """A kernel by its name in the library.

    ``fields`` names the integer and address fields of its record in order, ``floats`` the float64 fields behind them.
    ``tier`` is the instruction set, None for the launcher's, or the highest of this CPU.
    """

    def __init__(self, name: str, fields: str, floats: str = "", *, tier: str | None = None) -> None:
        self.name, self._fields, self._floats, self.tier = name, fields, floats, tier
        self._kinds = [(field, False) for field in fields.split()] + [(field, True) for field in floats.split()]
        self.num_fields = len(self._kinds)
        self.record = struct.Struct("".join("d" if is_float else "q" for _, is_float in self._kinds)).pack
        """``f(*values)``: the bytes of a record. Raises ``struct.error`` for another number of values."""

    def for_tier(self, tier: str) -> CKernel:
        """The same kernel for another instruction set."""
        return CKernel(self.name, self._fields, self._floats, tier=tier)

    def compile(self) -> None:
        """Check that the library has it, as ``code``."""
        self.code()

    def code(self, tier: str | None = None) -> int:
        """The address of its code for a tier, None for the highest of this CPU; its own tier goes before.

        Raises ``RuntimeError`` where there is no library, or its record there is another one.
        """
        entry = _entry(self.name)
        for number, (kind, name) in enumerate(entry.fields):
            ours = self._kinds[number] if number < self.num_fields else None
            if ours != (name, kind == "double"):
                raise RuntimeError(f"field {number} of '{self.name}' is {kind} {name} in the library, and {ours} here")
        if len(entry.fields) != self.num_fields:
            raise RuntimeError(f"'{self.name}' has {len(entry.fields)} fields in the library, {self.num_fields} here")
        code = entry.code_for(self.tier or tier or available_tiers()[0])
        if code is None:
            raise RuntimeError(f"the library of C kernels has no code of '{self.name}' for this CPU")
        return code[1]


def _entry(name: str) -> KernelEntry:
    found = library()
    if found is None:
        raise RuntimeError("there is no library of C kernels")
    entry = found.kernels.get(name)
    if entry is None:
        raise RuntimeError(f"the library of C kernels has no '{name}'")
    return entry
