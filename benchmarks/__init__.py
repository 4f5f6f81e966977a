"""Measurements, each with its device and commit in RESULTS.md."""
