"""Sweeps: a grid of runs from one file, worked off by any number of processes, and what came out of it."""
