"""Serves one base model and any number of LoRA adapters over an OpenAI-compatible API.

docs/architecture.md has the floors, which module may import which, and the path of one request.
"""
