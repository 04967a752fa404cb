"""Floor 6: HTTP. ``app`` has the routes, ``protocol`` validates bodies, ``completions`` has the generating endpoints.

They call ``responses``: ``generation`` submits the sequences, ``active_request`` receives their outputs, which become
a whole or streamed answer in a format of ``response_formats``.
"""
