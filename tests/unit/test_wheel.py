"""The wheel and the source distribution: what is in them, and that every module of the wheel imports from it alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cpu_kernels.build import SOURCES, sources_digest, this_machine

ROOT = Path(__file__).parents[2]
MAX_BYTES = 40_000_000
PACKAGES = {"server", "trainer", "adapter_format", "base_files", "cpu_kernels", "micro_base"}
OPTIONAL = ("gguf", "llvmlite", "matplotlib", "numba")
"""What an installation may lack: extras, and what only one platform gets."""
LOADED_WHERE_NUMBA_IS = ("cpu_kernels.", "server.lora.", "server.model.")
"""Packages with modules that need Numba, and that the commands therefore load only where it is."""

LIST_SOURCES = """\
import json
from hatchling.builders.sdist import SdistBuilder
print(json.dumps([file.distribution_path for file in SdistBuilder(".").recurse_included_files()]))
"""
IMPORT = """\
import importlib, json, sys
modules, hidden = json.loads(sys.stdin.read())
sys.modules.update(dict.fromkeys(hidden))

def failures(names):
    failed = {}
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            failed[name] = str(error)
    return failed

without = failures(modules)
for name in hidden:
    del sys.modules[name]
print(json.dumps([without, failures(without), {name: sys.modules[name].__file__ for name in modules}]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_has_the_kernels_for_this_machine_and_their_sources(wheel: Path) -> None:
    names, target = names_in(wheel), this_machine()
    assert target is not None
    (library,) = [name for name in names if name.startswith("cpu_kernels/lib/")]
    assert library.startswith(f"cpu_kernels/lib/kernels-{target.name}-{sources_digest()}-")
    assert {Path(name).name for name in names if name.endswith((".c", ".h"))} == {
        path.name for path in SOURCES.iterdir() if path.suffix in (".c", ".h")
    }
    assert wheel.name.startswith("quickchange-") and "-py3-none-" in wheel.name and "-any" not in wheel.name


def test_the_library_of_a_wheel_is_found_where_it_was_installed(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.startswith("cpu_kernels/")])
    program = "from cpu_kernels.library import library; found = library(); print(found.path, *found.kernels)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith(str(tmp_path / "cpu_kernels" / "lib")), done.stderr
    assert "rms_norm" in done.stdout.split()


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_has_the_packages_the_base_and_its_adapters_and_nothing_else(wheel: Path) -> None:
    names = names_in(wheel)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == PACKAGES
    sources = {name for name in names if name.endswith(".py")}
    unshipped = (ROOT / "trainer" / "micro", ROOT / "trainer" / "recipes")
    in_checkout = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if not any(path.is_relative_to(folder) for folder in unshipped)
    }
    assert sources == in_checkout
    demos = {
        f"micro_base/adapters/{path.parent.name}"
        for path in (ROOT / "adapters").glob("*/quickchange.json")
        if json.loads(path.read_text(encoding="utf-8"))["base"]["name"] == "micro"
    }
    assert len(demos) == 5
    assert {name.rpartition("/")[0] for name in names if name.endswith("adapter_model.safetensors")} == demos
    assert "micro_base/model.safetensors" in names


def test_the_wheel_stays_small(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_BYTES


def test_every_module_of_the_wheel_imports_from_it_and_the_commands_need_no_optional_package(
    wheel: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.endswith(".py")])
    paths = [path.relative_to(tmp_path).with_suffix("") for path in tmp_path.rglob("*.py")]
    modules = sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        input=json.dumps([modules, OPTIONAL]),
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    without, still_failing, files = json.loads(done.stdout)
    assert {name: error for name, error in without.items() if not name.startswith(LOADED_WHERE_NUMBA_IS)} == {}
    assert still_failing == {}
    assert [name for name, file in files.items() if not file.startswith(str(tmp_path))] == []


def test_the_source_distribution_has_what_a_checkout_needs_to_build_and_to_test() -> None:
    done = subprocess.run([sys.executable, "-c", LIST_SOURCES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = json.loads(done.stdout)
    needed = PACKAGES | {"adapters", "benchmarks", "tests", "docs", "deploy"}
    assert {name.split("/")[0] for name in names if "/" in name} - {".ci"} == needed
    assert {"Makefile", "constraints.txt", "pyproject.toml", "trainer/micro/pretrain.py"} <= set(names)
    assert {"hatch_build.py", "cpu_kernels/csrc/kernels.c", "deploy/wheels.py"} <= set(names)
    assert [name for name in names if name.startswith("cpu_kernels/lib/")] == []
    assert [name for name in names if "__pycache__" in name or name.endswith(".pyc")] == []
