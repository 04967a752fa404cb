"""Floor 1: adapters from folder to lease, without torch.

``content`` reads and judges one folder. ``watcher`` notices, ``intake`` moves names to versions in the ``registry``,
``versions`` are kept on disk, ``leasing`` leases what a request names, ``adapter_cache`` keeps the books of memory.
"""
