"""How long OpenMP's threads spin: set for the commands of server and trainer before torch loads its library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpu_kernels.spinning import CHOSEN_BY, SETTINGS, limit_spinning

ROOT = Path(__file__).parents[2]
SERVER = """
import sys, server.__main__ as program
def load(_):
    print("torch" in sys.modules)
    import torch
    return 0
program.COMMANDS["chat"] = load
sys.exit(program.main(["chat"]))
"""
TRAINER = """
import dataclasses, sys, trainer.__main__ as program
def load(_):
    print("torch" in sys.modules)
    import torch
program.COMMANDS["train"] = dataclasses.replace(program.COMMANDS["train"], run=load)
sys.exit(program.main(["train", "recipe.yaml"]))
"""


def test_waiting_threads_sleep_soon_where_the_user_has_not_chosen() -> None:
    environment = {"PATH": "/bin"}
    limit_spinning(environment)
    assert environment == {"PATH": "/bin", **SETTINGS}


@pytest.mark.parametrize("name", CHOSEN_BY)
def test_the_users_choice_of_a_policy_or_a_time_stands(name: str) -> None:
    environment = {name: "active"}
    limit_spinning(environment)
    assert environment == {name: "active"}


@pytest.mark.parametrize("program", [SERVER, TRAINER], ids=["server", "trainer"])
def test_torchs_openmp_library_reads_the_setting_of_a_command(program: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env=environment | {"OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "False\n"
    assert f"GOMP_SPINCOUNT = '{SETTINGS['GOMP_SPINCOUNT']}'" in done.stderr
