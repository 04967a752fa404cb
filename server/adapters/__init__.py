"""Floor 1: adapters from folder to lease, without torch.

``content`` reads and validates one folder, ``reader`` does so in a thread. ``watcher`` notices changes, ``sync`` moves
names to versions in the ``registry``, ``versions`` keeps versions on disk. ``adapter_library`` resolves a request's
model (``names``, ``aliases``), ``adapter_cache`` leases it and decides which weights are in memory. ``operator`` loads,
unloads, deletes and pins on request.
"""
