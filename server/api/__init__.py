"""Floor 6: HTTP. ``app`` has the routes, ``protocol`` validates bodies, ``completions`` has what generates.

Behind it ``generation`` puts sequences into the engine, ``active_request`` reads their outputs, and ``responses``
writes them, whole or streamed, in a format of ``response_formats``.
"""
