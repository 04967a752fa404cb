"""Trains LoRA adapters on a CPU and publishes them as folders.

Reading order: ``__main__`` (the commands), ``config`` (what a recipe may say), ``run`` (from a recipe to a folder),
``base`` (the model, found by ``base_files``), ``data`` with ``conversations``, ``passages``, ``books`` and ``masking``
(sources become token ids with a loss mask), ``train`` with ``batches``, ``loss`` and ``progress`` (the loop),
``publish`` with ``card`` and ``generate`` (the folder, checked after it was written, and its sample answers; its format
is ``adapter_format``). ``errors`` has the exit codes.
``micro`` made the embedded base and ``recipes`` its demo adapters; the wheel has neither, so nothing else here imports
them. Never imports ``server``.
"""
