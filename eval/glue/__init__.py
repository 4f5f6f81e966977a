"""GLUE, for models that label texts and for models that write."""
