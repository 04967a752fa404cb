"""Floors 1, 4, 5. Read ``async_engine``, ``engine``, ``scheduler``, ``fair_queue``, ``slots``, ``speculation``."""
