"""Super-NaturalInstructions: prompts, metrics and splits of Tk-Instruct."""
