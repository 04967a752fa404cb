"""The floors of docs/architecture.md, and the sizes of CONTRIBUTING.md, held against the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from itertools import product
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

# What server and trainer share. It imports neither of them.
SHARED = ("adapter_format", "base_files", "cpu_kernels")
# The longest prefix of a module's name decides.
FLOORS = {
    **dict.fromkeys(SHARED, 0),
    "server": 0,  # the package itself: a docstring
    "server.settings": 0,
    "server.errors": 0,
    "server.integrity": 0,
    "server.logs": 0,
    "server.sequence": 0,
    "server.metrics": 0,
    "server.module_proxy": 0,
    "server.engine": 1,
    "server.adapters": 1,
    "server.text": 1,
    "server.quantization": 2,
    "server.lora": 2,
    "server.text.chat_prompt": 2,
    "server.text.prompt": 2,
    "server.text.template_process": 2,
    "server.text.template_variables": 2,
    "server.text.template_worker": 2,
    "server.model": 3,
    "server.engine.engine": 4,
    "server.engine.async_engine": 5,
    "server.api": 6,
    "server.cli": 7,
    "server.__main__": 7,
}
# Who may import what is not ours. A name that is not here is free for all.
ALLOWED = {
    "torch": (
        "base_files.deferred_weights",
        "base_files.stock_model",
        "cpu_kernels",
        "server.module_proxy",
        "server.quantization",
        "server.lora",
        "server.model",
        "server.engine.engine",
        "server.cli",
    ),
    "transformers": (
        "base_files.stock_model",
        "server.quantization.int8_modules",
        "server.lora.module_bypass",
        "server.text.chat_prompt",
        "server.text.prompt",
        "server.model",
        "server.cli",
    ),
    "fastapi": ("server.api", "server.cli.serve"),
    "starlette": ("server.api", "server.cli.serve"),
    "uvicorn": ("server.cli",),
    "peft": ("server.cli.convert.tuners", "server.cli.parity"),
    "numba": ("cpu_kernels",),
    "llvmlite": ("cpu_kernels",),
    "llguidance": ("server.text.grammar",),
}
# Who changes a model's modules, or what modules and tables of transformers hold, and why it is not patches.py.
CHANGES_MODELS = {
    "server/model/patches.py": "every change is recorded here with its inverse",
    "server/lora/module_bypass.py": "how patches and the LoRA bank replace a module, below the floor of patches",
    "server/model/attention/interface.py": "its own entry in transformers' table, which closing removes",
    "server/model/quantizer.py": "frees the weights of modules that its patch replaced, and converts buffers",
    "server/module_proxy.py": "parameters of a copy of a module",
    "server/model/admission.py": "fields of a copy of a config",
    "base_files/stock_model.py": "puts weights and buffers into the model that it makes",
    "server/cli/convert/tuners.py": "a layer that PEFT made for a conversion",
}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
# "path" or "path:function" -> why it may be longer.
LONGER: dict[str, str] = {}
# Stand for whatever nobody found a name for.
NAMELESS = re.compile(r"(^|_)(utils?|helpers?|common|managers?)$")


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever the import stands."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            yield from (submodule_or_module(node.module, alias.name) for alias in node.names)


def submodule_or_module(module: str, name: str) -> str:
    """``from server.engine import slots`` names a module, ``from server.errors import X`` doesn't."""
    below = ROOT.joinpath(*module.split("."), name)
    return f"{module}.{name}" if below.is_dir() or below.with_suffix(".py").is_file() else module


def lines_of_tables(path: Path) -> int:
    """Lines of a module's tables of constants: they are read as data, one entry a line, and make no file harder."""
    tables = [node for node in tree_of(path).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    tables = [node for node in tables if isinstance(node.value, ast.Tuple | ast.List | ast.Dict | ast.Set)]
    return sum((node.end_lineno or node.lineno) - node.lineno for node in tables)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def is_ours(module: str) -> bool:
    return module.split(".")[0] in ("server", *SHARED)


def package_of(module: str) -> list[str]:
    """``server.api`` of ``server.api.chat``, ``cpu_kernels`` of ``cpu_kernels.linear``."""
    parts = module.split(".")
    return parts[:1] if parts[0] in SHARED else parts[:2]


def is_ground_floor(module: str, imported: str) -> bool:
    """Whether a noun of the server imports another, or a shared package."""
    return module.split(".")[0] == "server" and floor_of(module) == floor_of(imported) == 0


def floor_of(module: str) -> int:
    return FLOORS[max((name for name in FLOORS if is_within(module, name)), key=len)]


def test_every_module_has_a_floor_of_its_own_or_its_packages() -> None:
    modules = [module_of(path) for path in sources("server", *SHARED)]
    homeless = [module for module in modules if module.startswith("server.") and floor_of(module) == 0]
    homeless = [module for module in homeless if module not in FLOORS]
    assert homeless == []
    assert [name for name in FLOORS if name not in modules] == []


def test_a_module_imports_from_lower_floors_or_its_own_package_on_its_own_floor() -> None:
    wrong = []
    for path in sources("server", *SHARED):
        module = module_of(path)
        for imported in filter(is_ours, imports_of(path)):
            same_package = (
                package_of(module) == package_of(imported)
                or module == "server.__main__"
                or is_ground_floor(module, imported)
            )
            if floor_of(imported) > floor_of(module) or (floor_of(imported) == floor_of(module) and not same_package):
                wrong.append(f"{module} (floor {floor_of(module)}) imports {imported} (floor {floor_of(imported)})")
    assert wrong == []


def test_torch_and_the_web_framework_stay_on_their_floors() -> None:
    wrong = []
    for path in sources("server", *SHARED):
        module = module_of(path)
        for imported in imports_of(path):
            homes = ALLOWED.get(imported.split(".")[0])
            if homes is not None and not any(is_within(module, home) for home in homes):
                wrong.append(f"{module} imports {imported}")
    assert wrong == []


_CONTENTS = {"__dict__", "_modules", "_parameters", "_buffers", "_global_mapping"}
_CHANGING_METHODS = {"add_module", "register_module", "register_buffer", "register_parameter", "set_submodule"}
_CHANGING_DICTS = {"update", "pop", "clear", "setdefault", "__setitem__", "__delitem__"}


def is_contents(node: ast.expr) -> bool:
    """Whether this is what another object holds: its ``__dict__``, children, parameters; or ``vars`` of it."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "vars"
    return isinstance(node, ast.Attribute) and node.attr in _CONTENTS and not is_self(node.value)


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def changes_a_model(node: ast.expr, imported: set[str]) -> bool:
    """Whether a target or call changes modules of a model, or a module of transformers, by what it looks like."""
    if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
        foreign = isinstance(node.value, ast.Name) and node.value.id in imported
        return foreign or (node.attr == "forward" and not is_self(node.value))
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        return is_contents(node.value)
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Name):
        return node.func.id in ("setattr", "delattr") and not is_self(node.args[0])
    if not isinstance(node.func, ast.Attribute) or is_self(node.func.value):
        return False
    if node.func.attr == "register":
        return isinstance(node.func.value, ast.Name) and node.func.value.id in imported
    return node.func.attr in _CHANGING_METHODS or (node.func.attr in _CHANGING_DICTS and is_contents(node.func.value))


def changing_lines(source: ast.Module) -> list[int]:
    imports = [node for node in ast.walk(source) if isinstance(node, ast.Import | ast.ImportFrom)]
    of_transformers = {
        (alias.asname or alias.name).split(".")[0]
        for node in imports
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] == "transformers"
    }
    expressions = [node for node in ast.walk(source) if isinstance(node, ast.expr)]
    return [node.lineno for node in expressions if changes_a_model(node, of_transformers)]


@pytest.mark.parametrize(
    "line",
    [
        "layer.forward = ours",
        "del layer.forward",
        "layer.__dict__['forward'] = ours",
        "vars(code)['apply_rotary_pos_emb'] = ours",
        "modeling_llama.apply_rotary_pos_emb = ours",
        "setattr(parent, name, ours)",
        "model._modules['head'] = ours",
        "parent.__dict__.pop(name)",
        "model.set_submodule('lm_head', ours)",
        "stock.add_module('down_proj', ours)",
        "AttentionInterface.register('ours', ours)",
    ],
)
def test_what_changes_a_model_is_recognized(line: str) -> None:
    imports = "from transformers import AttentionInterface\nfrom transformers.models.llama import modeling_llama\n"
    assert changing_lines(ast.parse(imports + line)) == [3]


def test_only_patches_change_a_model() -> None:
    """Whatever else does, nobody undoes, and an oracle in the same process may get it as well."""
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sources("server", *SHARED)
        if any(imported.split(".")[0] in ("torch", "transformers", "peft") for imported in imports_of(path))
        and (lines := changing_lines(tree_of(path)))
    }
    assert {path: lines for path, lines in found.items() if path not in CHANGES_MODELS} == {}
    assert [path for path in CHANGES_MODELS if path not in found] == []


def test_server_trainer_and_what_they_share_never_import_each_other() -> None:
    wrong = [
        f"{module_of(path)} imports {imported}"
        for package, other in (("server", "trainer"), ("trainer", "server"), *product(SHARED, ("server", "trainer")))
        for path in sources(package)
        for imported in imports_of(path)
        if is_within(imported, other) or is_within(imported, "tests")
    ]
    assert wrong == []


def test_the_lowest_floors_load_without_torch() -> None:
    modules = [module_of(path) for path in sources("server", *SHARED) if floor_of(module_of(path)) <= 1]
    modules = [module for module in modules if not any(is_within(module, home) for home in ALLOWED["torch"])]
    assert "server.engine.scheduler" in modules
    program = (
        f"import sys, {', '.join(modules)}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_start_is_checked_before_torch_is_imported() -> None:
    """A refused start took 4 s, and a SIGHUP in this time ended the process."""
    program = "import sys, server.cli.serve_command; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("False False", "")


def test_whatever_is_imported_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["plot"], *extras["otel"]]
    declared = {Requirement(line).name.lower() for line in requirements}
    pinned = {"pydantic_core", "llvmlite"}  # by pydantic and Numba, to the digit or nearly
    used = {name.split(".")[0] for path in sources("server", "trainer", *SHARED) for name in imports_of(path)}
    foreign = used - sys.stdlib_module_names - {"server", "trainer", "micro_base", *SHARED} - pinned
    homes = packages_distributions()
    undeclared = {
        name
        for name in foreign
        if not any(home.lower().replace("_", "-") in declared for home in homes.get(name, [name]))
    }
    assert undeclared == set()


@pytest.mark.parametrize("package", ["server", "trainer", "benchmarks", *SHARED])
def test_files_and_functions_stay_short(package: str) -> None:
    long = {}
    for path in sources(package):
        where = str(path.relative_to(ROOT))
        lines = len(path.read_text(encoding="utf-8").splitlines()) - lines_of_tables(path)
        if lines > LONGEST_FILE:
            long[where] = lines
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    long[f"{where}:{node.name}"] = length
    assert {name: lines for name, lines in long.items() if name not in LONGER} == {}
    assert [name for name in LONGER if name.startswith(f"{package}/") and name not in long] == []


def test_every_module_has_a_name_that_says_something() -> None:
    modules = [module_of(path) for path in sources("server", "trainer", "tests", "benchmarks", *SHARED)]
    assert [module for module in modules if NAMELESS.search(module.rpartition(".")[2])] == []


def test_a_class_name_stands_once_in_the_tree() -> None:
    """A name that means two things sends readers, and their searches, to the wrong one."""
    homes: dict[str, list[str]] = {}
    for path in sources("server", "trainer", "benchmarks", *SHARED):
        if is_within(module_of(path), "trainer.micro"):  # writes its own corpus and is in no wheel
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(module_of(path))
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}
