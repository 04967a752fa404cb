"""Floor 1: adapters from folder to lease, without torch.

``content`` reads and validates one folder. ``watcher`` notices changes, ``sync`` moves names to versions in the
``registry``, ``versions`` keeps versions on disk. ``adapter_library`` looks up the model of a request, ``adapter_cache``
leases it and decides which weights are in memory.
"""
