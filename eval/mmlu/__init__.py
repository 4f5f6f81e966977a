"""MMLU: 57 subjects of multiple choice, by three protocols."""
