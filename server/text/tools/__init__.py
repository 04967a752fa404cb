"""Floor 1: tool calls in the text of an answer, and the grammar and the prompt that make a model write them.

``tool`` has what a format of calls does; ``json_calls``, ``keyed_calls``, ``named_calls``, ``xml_calls``,
``python_calls`` and ``harmony`` are the formats, and ``families`` finds that of a chat template. ``composition`` writes
the grammar of an answer, ``prompt`` shows tools to the model, and ``history`` earlier calls and their results.
"""
