"""Sites, groups and the vocabulary that detection speaks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


@dataclass(frozen=True, order=True)
class Site:
    """The stable name of one call in the model: who was called, and the how-manieth time.

    `path` is the qualified name of the module (or of the bare parameter) in the caller's model,
    `call` counts its calls in execution order from 0. Two programs made from the same model agree
    on sites; fx node names do not have this property, so nothing is ever keyed by them.
    """

    path: str
    call: int = 0

    def __str__(self) -> str:
        return self.path if self.call == 0 else f"{self.path}#{self.call}"


class Role(StrEnum):
    """What a group of linears does, as proved from the dataflow around it."""

    ATTN_QKV = "attn_qkv_proj"
    ATTN_Q = "attn_q_proj"
    ATTN_KV = "attn_kv_proj"
    ATTN_ADD_KV = "attn_add_kv_proj"
    ATTN_OUT = "attn_out_proj"
    FFN_UP = "ffn_up_proj"
    FFN_DOWN = "ffn_down_proj"


class Source(StrEnum):
    """Where the shared input of a group comes from."""

    MODULATED_NORM = "modulated norm"
    AFFINE_NORM = "affine norm"
    STREAM = "video stream"
    TEXT = "text states"
    IMAGE = "image states"
    ATTENTION = "attention output"
    ACTIVATION = "activation"


class Fold(StrEnum):
    """Where the reciprocal of a group's smooth scale goes."""

    MODULATION = "norm modulation"
    AFFINE = "norm weight and bias"
    VALUE_ROWS = "value rows"
    QUANTIZE = "quantise op"


@dataclass(frozen=True)
class Group:
    """Linears that read one value and are therefore observed, smoothed and quantized together.

    Invariants: `members` is not empty and every member reads the same producer value; every linear
    of a program is a member of exactly one group or has an entry among the program's ungrouped.
    `fold_reason` says why `fold` is the quantise op where nothing cheaper was proved.
    """

    role: Role
    sites: tuple[Site, ...]
    source: Source
    fold: Fold = Fold.QUANTIZE
    fold_reason: str = ""

    @property
    def members(self) -> tuple[str, ...]:
        """Qualified names of the member linears, in execution order."""
        return tuple(str(site) for site in self.sites)

    @property
    def key(self) -> Site:
        """The site that stands for the group in statistics and reports: its first member."""
        return self.sites[0]

    def with_fold(self, fold: Fold, reason: str = "") -> Group:
        """Return this group with another decision about its fold."""
        return replace(self, fold=fold, fold_reason=reason)


@dataclass(frozen=True)
class Attention:
    """One scaled-dot-product attention of the program and the projections proved to feed it.

    `q`, `k` and `v` are the sites of the linears; with fused projections they may coincide.
    """

    site: Site
    q: Site
    k: Site
    v: Site
    is_self: bool


@dataclass(frozen=True)
class Ungrouped:
    """A linear that is in no group, with the reason."""

    site: Site
    reason: str
