"""Measurements: `python -m bench.NAME` prints them and asserts nothing."""
