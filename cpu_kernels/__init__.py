"""Kernels compiled for the CPU they run on, on threads that torch has already (``routine``). Imports neither side."""
