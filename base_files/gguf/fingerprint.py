"""The fingerprint of a base in GGUF: of what its answers depend on, wherever the bytes stand.

It is another one than those of the folder that the file was converted from, since the weights are rounded: what ties
those two is ``weights_sample``. ``tests/contract/fingerprint.json`` has vectors.
"""

from __future__ import annotations

import hashlib

import numpy as np

from base_files.fingerprint import canonical_json, windows
from base_files.gguf.file import GGUFFile
from base_files.gguf.header import Value


def gguf_fingerprint(file: GGUFFile) -> str:
    """SHA-256 over these bytes, in this order:

    1. ``quickchange-gguf-v1`` and a line feed.
    2. Canonical JSON (see ``fingerprint``) of an object: ``general.architecture`` and every key of the metadata that
       begins with that architecture and a dot. Arrays are lists; a float32 is written as the double of its value.
    3. For every tensor, sorted by name as a Python string: canonical JSON of ``[name, shape, type]``, the shape with
       the outermost dimension first and the type by its name (``"Q4_K"``), then the tensor's windows, which are those
       of version 2 of a folder's fingerprint.

    Neither the order of keys and tensors, nor padding, nor the division into files, nor other keys (names, licences,
    the tokenizer) matter. Raises ``ValueError`` or ``OSError``.
    """
    architecture = file.metadata.get("general.architecture")
    digest = hashlib.sha256(b"quickchange-gguf-v1\n")
    described: dict[str, object] = {"general.architecture": architecture}
    described |= {key: _plain(value) for key, value in file.metadata.items() if key.startswith(f"{architecture}.")}
    digest.update(canonical_json(described))
    for _, tensor in sorted(file.tensors.items()):
        digest.update(canonical_json([tensor.name, tensor.shape, tensor.block_type.name]))
        for window in windows(tensor.path, tensor):
            digest.update(window)
    return f"sha256:{digest.hexdigest()}"


def _plain(value: Value) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else value
