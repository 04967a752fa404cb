"""What bases are called. Imports nothing heavy: the settings of every command need it."""

from __future__ import annotations

import os
import re

from base_files.packaged import PACKAGED_BASES

EMBEDDED_BASE = "micro"
BASE_MODEL_HELP = (
    f"'{EMBEDDED_BASE}' (embedded), {', '.join(map(repr, PACKAGED_BASES))} (after `quickchange base get`), "
    "a GGUF file, a folder, or a hub id"
)
"""What a base setting may be, wherever one is described."""

_GGUF_ENDING = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$", re.IGNORECASE)


def base_name(base_model: str) -> str:
    """What the base is called: the setting as it is, or the name of its file or folder without the path. Never raises.

    Of a GGUF file, also without the ending and the number of a split file.
    """
    if base_model in (EMBEDDED_BASE, *PACKAGED_BASES):
        return base_model
    path = os.path.expanduser(base_model)
    if os.path.isdir(path):
        return os.path.basename(os.path.realpath(path))
    if os.path.isfile(path) or path.lower().endswith(".gguf"):
        return _GGUF_ENDING.sub("", os.path.basename(path))
    return base_model
