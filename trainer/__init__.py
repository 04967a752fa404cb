"""Trains LoRA adapters on a CPU and publishes them as folders.

Reading order: ``__main__`` (the commands), ``config`` (what a recipe may say), ``run`` (from a recipe to a folder),
``base`` (the model, found by ``base_files``), ``data`` with ``conversations``, ``passages`` and
``masking`` (sources become token ids with a loss mask), ``train`` with ``batches`` and ``loss`` (the loop), ``publish``
with ``sidecar`` and ``card`` (the folder, checked after it was written).
``micro`` is the code that made the embedded base. Never imports ``server``.
"""
