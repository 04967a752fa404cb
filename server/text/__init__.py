"""Floors 1 and 2: text in and out. ``prompt`` makes token ids of messages, ``detokenizer`` makes text of token ids."""
