"""Floors 1, 4 and 5. Reading order: ``async_engine``, ``engine``, ``scheduler``, ``slots``, ``speculation``."""
