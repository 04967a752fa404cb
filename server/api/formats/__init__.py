"""Response formats: how an answer is written, whole or as a stream.

``interface`` is what all of them have in common, and ``wire`` the JSON and server-sent events that they are written
in; then one module for each API.
"""
