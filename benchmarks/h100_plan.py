"""What is measured on the H100: models at their sizes (rows) and ways to run them (columns)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from wancompile import presets
from wancompile.presets import Latent, Preset
from wancompile.recipe import Recipe

DEEP, SHALLOW = 3, 1
"""Layers of the two models whose difference in time is that of `DEEP - SHALLOW` layers."""

_TINY: Latent = (2, 8, 8)
_CARD_GIB = 74.0
_CONTEXT_GIB = 1.5

Kind = Literal["reference", "eager", "compiled", "ours", "whole"]
Attention = Literal["diffusers", "cudnn", "fa3", "sage"]


@dataclass(frozen=True)
class Row:
    """One published model, called with latents of one size (frames, height, width)."""

    name: str
    preset: str
    latent: Latent
    title: str

    def preset_of(self, layers: int | None, tiny: bool) -> Preset:
        """Return the preset with `layers` blocks, or all; narrow and short where `tiny`."""
        full = presets.find(self.preset)
        preset = presets.tiny(full) if tiny else full
        return preset if layers is None else presets.truncated(preset, layers)

    def size(self, tiny: bool) -> Latent:
        """Return the latents of one call."""
        return _TINY if tiny else self.latent

    @property
    def layers(self) -> int:
        """Blocks of the whole model."""
        return int(presets.find(self.preset).config["num_layers"])

    @property
    def tokens(self) -> int:
        """Video tokens of one call; patches are 1 x 2 x 2."""
        return math.prod(self.latent) // 4


@dataclass(frozen=True)
class Column:
    """One way to run a model.

    `scope` says what torch.compile sees at once: the model, or each of its blocks. Columns of one
    `family` share a cache of compiled kernels. Those of `rank` 0 are measured first.
    """

    name: str
    title: str
    kind: Kind
    attention: Attention = "diffusers"
    torchao: bool = False
    recipe: str | Recipe = ""
    scope: Literal["model", "blocks"] = "model"
    rank: int = 0

    @property
    def family(self) -> str:
        """Return the name of its cache of compiled kernels."""
        if self.kind == "compiled":
            return "torchao" if self.torchao else "compile"
        return self.name


ROWS = {
    row.name: row
    for row in (
        Row("t2v-14b-480p", "t2v-14b", (21, 60, 104), "T2V-14B, 81 frames of 480 x 832"),
        Row("t2v-14b-720p", "t2v-14b", (21, 90, 160), "T2V-14B, 81 frames of 720 x 1280"),
        Row("t2v-1.3b-480p", "t2v-1.3b", (21, 60, 104), "T2V-1.3B, 81 frames of 480 x 832"),
        Row("ti2v-5b-704p", "ti2v-5b", (31, 44, 80), "TI2V-5B, 121 frames of 704 x 1280"),
    )
}
# Those that take minutes to compile come first, so that others are measured meanwhile.
COLUMNS = {
    column.name: column
    for column in (
        Column("whole", "all layers, ours fp8, 8-bit attention", "whole",
               recipe="fp8-attention"),
        Column("torchao-fa3", "torchao fp8 + torch.compile, FA3 bf16", "compiled", "fa3", True,
               scope="blocks"),
        Column("compile-sdpa", "torch.compile bf16, cuDNN attention", "compiled", "cudnn"),
        Column("compile-fa3", "torch.compile bf16, FA3 bf16", "compiled", "fa3"),
        Column("reference", "fp32", "reference"),
        Column("fp8-attention", "ours fp8, 8-bit attention", "ours", recipe="fp8-attention"),
        Column("int8-attention", "ours int8, 8-bit attention, v in bf16", "ours",
               recipe="int8-attention"),
        Column("int8-attention-fast", "ours int8, 8-bit attention, v in fp8", "ours",
               recipe="int8-attention-fast"),
        Column("eager", "diffusers eager bf16", "eager"),
        Column("float", "ours, nothing in 8 bits", "ours", recipe=Recipe("float", None), rank=1),
        Column("torchao-sdpa", "torchao fp8 + torch.compile, cuDNN attention", "compiled", "cudnn",
               True, scope="blocks", rank=1),
        Column("compile-sage", "torch.compile bf16, SageAttention 1", "compiled", "sage", rank=1),
        Column("fp8", "ours fp8, bf16 attention", "ours", recipe="fp8", rank=1),
        Column("int8", "ours int8, bf16 attention", "ours", recipe="int8", rank=1),
    )
}  # fmt: skip
WHOLE_ROW = "t2v-14b-480p"
"""The row whose model is also run with all its layers."""


@dataclass(frozen=True)
class Job:
    """One cell of the table, to be measured in a process of its own."""

    row: Row
    column: Column
    tiny: bool = False

    @property
    def name(self) -> str:
        """Row and column."""
        return f"{self.row.name} {self.column.name}"

    @property
    def limit_s(self) -> float:
        """Seconds that it may be at work, pauses not counted."""
        if self.column.torchao:
            return 330.0
        return 260.0 if self.column.kind == "whole" else 200.0

    @property
    def gib(self) -> float:
        """An upper estimate of the GPU memory that it needs."""
        if self.tiny:
            return 0.0
        config = self.row.preset_of(None, False).config
        dim: int = config["num_attention_heads"] * config["attention_head_dim"]
        ffn: int = config["ffn_dim"]
        block = 8 * dim * dim + 2 * dim * ffn
        width = 2 * ffn + 10 * dim
        if self.column.kind == "whole":
            # fp32 while it is built, then bf16 twice while scales are folded into weights.
            return _CONTEXT_GIB + 4.1 * block * self.row.layers / 2**30
        if self.row.preset_of(None, False).per_token_timestep:
            width += 2 * 3 * 6 * dim
        held = 2 * block * (DEEP + SHALLOW + 2) + 2 * width * self.row.tokens
        factor = {"reference": 2.2, "eager": 1.7}.get(self.column.kind, 1.0)
        return _CONTEXT_GIB + factor * held / 2**30


def card_gib() -> float:
    """GPU memory that the estimates of jobs at work together may add up to."""
    return _CARD_GIB


def jobs(rows: Sequence[str], columns: Sequence[str], tiny: bool = False) -> list[Job]:
    """Return the cells in the order in which they are to start."""
    found = [
        Job(ROWS[row], COLUMNS[column], tiny)
        for row in rows
        for column in columns
        if column != "whole" or row == WHOLE_ROW
    ]
    order = list(ROWS), list(COLUMNS)
    return sorted(
        found,
        key=lambda job: (
            job.column.kind != "whole",
            job.column.rank,
            order[0].index(job.row.name),
            order[1].index(job.column.name),
        ),
    )
