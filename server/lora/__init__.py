"""Floor 2: adapters as tensors.

``delta`` is one adapter's change of one module; ``weights`` has those of all modules, from the bytes of the file.
``bank`` holds all adapters and replaces the base's modules by those of ``layer``. A ``backend`` adds low-rank deltas to
the rows of each adapter: ``batched`` (with ``slots``) by torch operations, ``native`` by kernels.
"""
