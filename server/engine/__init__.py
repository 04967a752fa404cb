"""Floors 1, 4 and 5: ``slots`` and ``scheduler`` decide, ``engine`` steps, ``async_engine`` meets the event loop."""
