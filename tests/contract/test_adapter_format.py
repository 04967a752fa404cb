"""The sidecar's vectors: what its JSON schema accepts, ``adapter_format`` accepts, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from adapter_format.sidecar import parse_sidecar

HERE = Path(__file__).parent
VALID = sorted(HERE.glob("sidecar_valid_*.json"))
INVALID = sorted(HERE.glob("sidecar_invalid_*.json"))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


SCHEMA = _read(HERE / "sidecar.schema.json")


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_a_valid_sidecar_is_read_and_written_again_says_the_same(path: Path) -> None:
    jsonschema.validate(_read(path), SCHEMA)
    assert json.loads(parse_sidecar(_read(path)).to_json()) == _read(path)


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_an_invalid_sidecar_is_refused_with_the_field(path: Path) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(_read(path), SCHEMA)
    with pytest.raises(ValueError, match=r"quickchange\.json: "):
        parse_sidecar(_read(path))
