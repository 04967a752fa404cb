"""Floors 1 and 2: ``prompt`` renders messages to token ids, ``detokenizer`` turns token ids into text.

``token_texts`` has the text and bytes of single tokens, ``deadline`` limits the time of a chat template.
``answer`` has the parts of an answer. A parser that finds them (``stepped_parser``) is a generator over a
``text_reader``; ``reasoning`` and the formats of ``tools/`` are such generators, and ``answer_format`` says what an
answer is parsed for, and which grammar it follows.
"""
