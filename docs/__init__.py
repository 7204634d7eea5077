"""The documents, and what writes the one that is made from docstrings."""
