"""Floor 6: HTTP. ``app`` has the routes, ``protocol`` validates bodies, ``completions`` has the generating endpoints.

An endpoint submits sequences with ``generation``, ``active_request`` receives their outputs, and ``responses`` writes
them, streamed or whole, in a format of ``response_formats``. ``middleware`` and ``errors`` serve all endpoints.
"""
