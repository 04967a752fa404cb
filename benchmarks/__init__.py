"""Measurements, never part of the tests: see README.md."""
