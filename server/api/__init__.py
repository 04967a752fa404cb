"""Floor 6: HTTP. ``app`` has the routes, ``protocol`` validates bodies, ``chat`` and ``completions`` generate.

An endpoint submits sequences with ``generation``, ``active_request`` receives their outputs, and ``responses`` writes
them, streamed or whole, in one of ``formats``. ``middleware`` and ``errors`` serve all endpoints.
"""
