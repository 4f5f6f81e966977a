"""A memory planner: where every byte of a training step would be, counted before anything is allocated."""
