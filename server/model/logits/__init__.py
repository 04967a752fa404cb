"""Floor 3: logits processors; read ``processor``, ``registry``, then any other file.

A new processor is a file here, a line in ``registry``, and its field, marked ``Processed``, in
``api/protocol/generation.py``.
"""
