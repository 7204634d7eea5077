"""Folding the reciprocal of a smooth scale into what comes before a group of linears.

One file for each place it can go. Each has `read`, which proves the place from the graph without
changing it, `find`, which adds that the group is its only reader or says why not, and `apply`.
"""
