"""Small models with what sensitivities are measured from, made once for all tests."""

from __future__ import annotations

from functools import cache

import torch
import zoo

import wancompile
from wancompile import passes, pipeline
from wancompile.pipeline import relative_error
from wancompile.program import Program
from wancompile.recipe import ATTENTIONS, AttentionRule, QSpec, Recipe, Rule
from wancompile.sensitivity import sensitivity


class Subject:
    """A small model, its program, statistics, and calls that it was not calibrated on."""

    def __init__(self, variant: str) -> None:
        self.model, self.first = zoo.make(variant)
        seen = [self.first, zoo.example(variant)]
        self.program = wancompile.trace(self.model, self.first)
        self.stats = wancompile.calibrate(self.model, seen)
        self.calls = [zoo.example(variant, seed=5), zoo.example(variant, seed=6, batch=1)]
        self.found = sensitivity(self.program, self.calls, self.stats)

    def really(self, recipe: Recipe) -> float:
        """The error of a program that was rewritten for the recipe."""
        steps = passes.smoothing(recipe, self.stats)
        steps += passes.quantization(recipe, self.stats)
        return self.error(pipeline.run(self.program, steps))

    def error(self, program: Program) -> float:
        pairs = [(program(**call)[0], self.program(**call)[0]) for call in self.calls]
        actual, expected = zip(*pairs, strict=True)
        return relative_error(*(torch.cat([x.flatten() for x in y]) for y in (actual, expected)))


made = cache(Subject)


def only(group_or_attention: str, dtype: str) -> Recipe:
    if group_or_attention.endswith(":attention"):
        rules = (AttentionRule(group_or_attention, ATTENTIONS[dtype]),)
        return Recipe("one", None, attention_rules=rules)
    return Recipe("one", None, (Rule(group_or_attention, QSpec(dtype)),))
