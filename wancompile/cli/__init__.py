"""The command line: one file for each subcommand, and what they share."""

from wancompile.cli.entry import main

__all__ = ["main"]
