"""Floors 1 and 2: ``prompt`` renders messages to token ids, ``detokenizer`` turns token ids into text.

``token_texts`` has the text and bytes of single tokens, ``deadline`` limits the time of a chat template.
"""
