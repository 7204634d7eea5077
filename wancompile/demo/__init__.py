"""The demonstration: a small, really trained Wan compiled before your eyes."""

from wancompile.demo.show import Result, run

__all__ = ["Result", "run"]
