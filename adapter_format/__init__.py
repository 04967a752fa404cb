"""The format of an adapter folder, as the server reads it and the trainer writes it. Imports neither side, nor torch.

Reading order: ``files`` (the names of a folder's files), ``sidecar`` (``quickchange.json``), ``messages``
(conversations as chat templates expect them, and the tokens that end a turn), ``publishing`` (a folder that appears
whole or not at all). docs/adapters.md describes the format.
"""
