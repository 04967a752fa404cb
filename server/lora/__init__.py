"""Floor 2: adapters as tensors.

``delta`` is what one adapter does to one module, ``weights`` to all, made by ``prepare`` from the file's bytes.
``bank`` holds all adapters and puts the modules of ``layer`` in the places of the base's. A ``backend`` adds low-rank
deltas to the rows of each adapter: ``batched`` (with ``slots``) by torch's operations, ``native`` by kernels.
"""
