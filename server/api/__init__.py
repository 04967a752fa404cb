"""Floor 6: HTTP. ``app`` wires, ``protocol`` is what clients may say, ``chat`` and ``completions`` answer.

Both answer by ``answer``: it starts a ``generation``, and streams (``sse``) or collects it, in a shape of ``shapes``.
"""
