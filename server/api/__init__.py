"""Floor 6: HTTP. Reading order: ``app`` wires, ``protocol`` is what clients may say, ``chat`` and ``completions`` answer.

Both answer by ``answer``, which starts a ``generation``, and streams it (``sse``) or collects it, in a shape of ``shapes``.
"""
