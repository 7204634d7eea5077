"""How the small Wan transformers that ship with the package were trained."""
