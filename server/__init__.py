"""Serves one base model and any number of LoRA adapters over an OpenAI-compatible API.

Floors, from the bottom; a module imports from lower floors or from its own package, and a test enforces it:
0 ``settings errors sequence metrics`` · 1 ``engine.scheduler engine.slots adapters text.detokenizer`` (no torch) ·
2 ``lora text.prompt`` · 3 ``model`` · 4 ``engine.engine`` · 5 ``engine.async_engine`` · 6 ``api`` · 7 ``cli __main__``.
One request, in a straight line: docs/architecture.md.
"""
