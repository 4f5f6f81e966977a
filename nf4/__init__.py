"""What a stored weight means: codebooks, blocks, double quantization, storage, error."""
