"""The base that a benchmark's command line names."""

from __future__ import annotations

from argparse import ArgumentTypeError

from base_files.errors import BaseFilesError
from base_files.locate import base_on_disk

HELPDESKS = {"micro": "helpdesk", "smollm2": "smollm2-helpdesk"}
"""The repository's adapter of each base that comes with one, which a benchmark takes where none is named."""


def base_argument(value: str) -> str:
    """The type of ``--base``: a base that is not there, or whose config cannot be read, is argparse's error."""
    try:
        source = base_on_disk(value)
        if source is not None:
            _ = source.config
    except BaseFilesError as error:
        raise ArgumentTypeError(str(error)) from None
    return value
