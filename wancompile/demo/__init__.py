"""The demonstration: a small, really trained Wan compiled before your eyes."""
