"""A graph-rewriting 8-bit quantization compiler for the Wan video diffusion transformers."""

from wancompile.api import calibrate, compile, trace
from wancompile.compiled import CompiledModel
from wancompile.errors import ArtifactError, GateError, LoraError, PipelineError, WancompileError
from wancompile.experts.compiled import CompiledPipeline
from wancompile.experts.load import load
from wancompile.gate.check import Check
from wancompile.gate.limits import Limits
from wancompile.ir.levels import Level
from wancompile.ir.site import Attention, Group, Role, Site
from wancompile.program import Program
from wancompile.quant.stats import Stats
from wancompile.recipe import AttentionRule, AttentionSpec, Auto, QSpec, Recipe, Rule
from wancompile.report import Report
from wancompile.samples import Sample
from wancompile.sensitivity import Sensitivity, sensitivity

__all__ = [
    "ArtifactError",
    "Attention",
    "AttentionRule",
    "AttentionSpec",
    "Auto",
    "Check",
    "CompiledModel",
    "CompiledPipeline",
    "GateError",
    "Group",
    "Level",
    "Limits",
    "LoraError",
    "PipelineError",
    "Program",
    "QSpec",
    "Recipe",
    "Report",
    "Role",
    "Rule",
    "Sample",
    "Sensitivity",
    "Site",
    "Stats",
    "WancompileError",
    "calibrate",
    "compile",
    "load",
    "sensitivity",
    "trace",
]
__version__ = "0.1.0"
