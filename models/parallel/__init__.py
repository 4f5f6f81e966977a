"""One model on several processes: which they are, what each of them keeps, and how they start, speak and fail."""
