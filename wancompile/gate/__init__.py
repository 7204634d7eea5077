"""The gate: a compiled model is let through if it is near enough to the original."""
