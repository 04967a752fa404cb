"""Attention over a flat batch, on floor 3. Read ``interface`` first, then a backend: ``cpu`` or ``batched``."""
