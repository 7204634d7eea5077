"""Measurements behind the figures of the README: `python -m benchmarks.X` from the repo's root.

Each writes its raw results as JSON under `benchmarks/results/` and prints a short table.
"""
