"""Data only: ``micro``, the embedded base, as transformers reads it. Made by ``trainer/micro``; card in README.md."""
