"""Hatchling's build hook: compiles the library of C kernels into the wheel or, for an editable one, into the checkout.

``QUICKCHANGE_WHEEL_TARGET`` (``aarch64-linux``) names the machine that a wheel is for, where it is another one or has
to run on older systems: ziglang's compiler then builds it. ``make wheels`` sets it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

if TYPE_CHECKING:
    from cpu_kernels.build import Platform

VARIABLE = "QUICKCHANGE_WHEEL_TARGET"
TAGS = {
    "x86_64-linux": "manylinux_2_17_x86_64.manylinux2014_x86_64",
    "aarch64-linux": "manylinux_2_17_aarch64.manylinux2014_aarch64",
    "aarch64-macos": "macosx_11_0_arm64",
}


class KernelsBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles the kernels of a wheel; a machine for which there are none gets a wheel without."""

    def dependencies(self) -> list[str]:
        """Ziglang, where the system has no compiler for every instruction set."""
        build = self._build_module()
        target = self._target(build)
        if target is None:
            return []
        compilers = [] if os.environ.get(VARIABLE) else build.system_compilers(target)
        return [] if any(build.probe(command, target) is None for command in compilers) else [build.ZIGLANG]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the library. Raises ``BuildFailed``, where there are kernels for the machine."""
        build = self._build_module()
        target = self._target(build)
        if target is None:
            self.app.display_warning("there are no C kernels for this machine: PyTorch's operations will be used")
        elif version == "editable":
            _ = build.built_library() or build.build()
        else:
            wanted = os.environ.get(VARIABLE)
            self._folder = tempfile.mkdtemp(prefix="kernels-")
            compiler = build.zig_command(target) if wanted else None
            path = None if wanted else build.built_library()
            path = path or build.build(Path(self._folder), target=target, compiler=compiler)
            build_data["force_include"][str(path)] = f"cpu_kernels/lib/{path.name}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{TAGS[target.name] if wanted else self._own_tag(target)}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the library: it is in the wheel."""
        if folder := getattr(self, "_folder", None):
            shutil.rmtree(folder)

    def _target(self, build: ModuleType) -> Platform | None:
        wanted = os.environ.get(VARIABLE)
        if not wanted:
            return build.this_machine()  # type: ignore[no-any-return]
        if wanted not in TAGS:
            raise ValueError(f"{VARIABLE} is {wanted!r}: it is one of {', '.join(TAGS)}")
        return build.Platform(*wanted.split("-"))  # type: ignore[no-any-return]

    def _own_tag(self, target: Platform) -> str:
        return TAGS[target.name] if target.name in TAGS and target.system == "macos" else f"linux_{target.machine}"

    def _build_module(self) -> ModuleType:
        """``cpu_kernels/build.py`` of this checkout, whatever is installed."""
        name = "cpu_kernels_build"
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, Path(self.root, "cpu_kernels", "build.py"))
            assert spec is not None and spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]
