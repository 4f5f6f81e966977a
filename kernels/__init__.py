"""Every operator on stored weights."""
