"""Floor 1: adapters from folder to lease, without torch.

``content`` reads and validates one folder. ``watcher`` notices changes, ``sync`` moves names to versions in the
``registry``, ``versions`` keeps versions on disk, ``library`` looks up what a request names, ``adapter_cache`` leases
it and decides which weights are in memory.
"""
