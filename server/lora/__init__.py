"""Floor 2: adapters as tensors.

``delta`` is what one adapter does to one module, ``weights`` to all, made by ``prepare`` (and ``dora``) from the file's
bytes; ``layer`` stands in a module's place and applies it to the ``rows`` of each adapter, with one product for modules
of a ``shared`` input and several adapters at once from a ``stack``; ``bank`` holds all.
"""
