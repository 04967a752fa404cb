"""Floor 1: adapter folders, without torch.

``manifest`` reads and judges one, ``registry`` knows names and leases, ``watcher`` keeps it like the folders.
"""
