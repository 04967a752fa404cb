"""Floors 1 and 2: ``prompt`` renders messages to token ids, ``detokenizer`` turns token ids into text."""
