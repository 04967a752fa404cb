"""The files of a base model: where they are, what identifies them, and their tensors. Imports neither side.

Reading order: ``locate`` (from ``micro``, a folder or a hub id to a folder with its weight files), ``packaged`` (bases
that a Python package carries),
``safetensors_header`` (the tensors of a weight file), ``fingerprint`` (what ties an adapter to its base), ``gguf`` (the
other container of tensors), ``gguf_blocks`` (its block types as floats), ``gguf_fingerprint``, ``mxfp4``,
``errors``. None
of them imports torch.
"""
