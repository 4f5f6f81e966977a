"""Fine-tuning: data, optimizer, loop, the directory that a run leaves, and the demo."""
