"""GGUF files made byte by byte, so that every byte can be a wrong one."""

from __future__ import annotations

import struct


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(
    name: bytes = b"blk.0.attn_q.weight.lora_a", shape: tuple[int, ...] = (4, 2), kind: int = 0, offset: int = 0
) -> bytes:
    dimensions = struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", size) for size in shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def container(*parts: bytes, num_tensors: int = 0, num_keys: int = 0, version: int = 3, data: bytes = b"") -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + b"".join(parts)
    return head + b"\0" * (-len(head) % 32) + data
