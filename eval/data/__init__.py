"""The records of data files, for evaluation and for training."""
