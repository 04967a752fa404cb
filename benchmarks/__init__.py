"""Measurements, never part of the tests: see README.md."""

from server.cli.allocation import keep_freed_memory

keep_freed_memory()  # before torch is imported, as the server does; both sides of a comparison have it
