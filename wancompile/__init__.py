"""A graph-rewriting 8-bit quantization compiler for the Wan video diffusion transformers."""

from wancompile.api import calibrate, compile, trace
from wancompile.compiled import CompiledModel
from wancompile.errors import WancompileError
from wancompile.ir.levels import Level
from wancompile.ir.site import Attention, Group, Role, Site
from wancompile.program import Program
from wancompile.quant.stats import Stats
from wancompile.recipe import QSpec, Recipe, Rule
from wancompile.report import Report

__all__ = [
    "Attention",
    "CompiledModel",
    "Group",
    "Level",
    "Program",
    "QSpec",
    "Recipe",
    "Report",
    "Role",
    "Rule",
    "Site",
    "Stats",
    "WancompileError",
    "calibrate",
    "compile",
    "trace",
]
__version__ = "0.1.0"
