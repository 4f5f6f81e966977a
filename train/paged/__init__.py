"""Optimizers whose states are in managed memory, and what they stand on: a shim over the CUDA runtime, an arena."""
