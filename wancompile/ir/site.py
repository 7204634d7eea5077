"""Sites, groups and the vocabulary that detection speaks."""

from __future__ import annotations

from dataclasses import dataclass
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

    @classmethod
    def parse(cls, text: str) -> Site:
        """Return the site that `str` printed as `text`."""
        path, _, call = text.partition("#")
        return cls(path, int(call or 0))


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


class Span(StrEnum):
    """How the size of a channel is measured."""

    AMAX = "amax"
    RMS = "rms"


@dataclass(frozen=True)
class Smoothing:
    """What the search found for one group, on tokens it was not chosen on.

    `error_plain` and `error_smoothed` are relative L2 errors of the group's quantized output
    without and with the best scale `s = span_x ** alpha / span_w ** beta`; `inverse` names the
    stored 1/s where it was applied and is empty where it was not, for the reason in `refusal`.
    """

    alpha: float
    beta: float
    error_plain: float
    error_smoothed: float
    inverse: str = ""
    span_x: Span = Span.AMAX
    span_w: Span = Span.AMAX
    refusal: str = ""

    @property
    def applied(self) -> bool:
        """Whether the group is smoothed."""
        return bool(self.inverse)

    @property
    def error(self) -> float:
        """The error of the choice that was made."""
        return self.error_smoothed if self.applied else self.error_plain


@dataclass(frozen=True)
class Rounding:
    """How the weights of one group were rounded, judged on tokens that did not choose it.

    `error_nearest` is the relative L2 error of the group's quantized output, smoothed if it is,
    with weights rounded to nearest; `error_clipped` and `error_gptq` are those with clipped scales
    and with GPTQ on the scales kept, None where it was not tried. `ratio` is the mean of what the
    range of an output channel was clipped to. `clipped` and `gptq` say what was kept,
    `clip_refusal` and `gptq_refusal` why something tried was not.
    """

    error_nearest: float
    error_clipped: float | None = None
    error_gptq: float | None = None
    ratio: float = 1.0
    clipped: bool = False
    gptq: bool = False
    clip_refusal: str = ""
    gptq_refusal: str = ""

    @property
    def error(self) -> float:
        """The error of the choice that was made."""
        if self.gptq and self.error_gptq is not None:
            return self.error_gptq
        if self.clipped and self.error_clipped is not None:
            return self.error_clipped
        return self.error_nearest


@dataclass(frozen=True)
class Weight:
    """Where the weight `W [N, K]` of one linear went, and what it was multiplied by.

    Invariants: `data` names the stored 8-bit tensor that holds it from row `first` on, `scale` the
    fp32 scales of its rows; both are empty for a linear in floating point. What is stored is
    `W * inputs * outputs[:, None]`, rounded: `inputs [K]` and `outputs [N]` name stored fp32
    factors of smoothing, empty for none. `name` is what the model calls the weight.
    """

    site: Site
    name: str
    data: str = ""
    scale: str = ""
    first: int = 0
    inputs: str = ""
    outputs: str = ""


@dataclass(frozen=True)
class Group:
    """Linears that read one value and are therefore observed, smoothed and quantized together.

    Invariants: `sites` is not empty and every member reads the same producer value; every linear
    of a program is a member of exactly one group or has an entry among the program's ungrouped.
    `producer` is the first site that reads this value, and the key of its statistics: groups that
    share a producer share an observer. `fold_reason` says why `fold` is the quantise op where
    nothing cheaper was proved. `smoothing` is None until a search has run, `rounding` where the
    recipe asked for rounding to nearest alone. `weights` has an entry for each member once it has
    been decided which of them are quantized, but for weights that are computed from the inputs.
    """

    role: Role
    sites: tuple[Site, ...]
    source: Source
    producer: Site | None = None
    fold: Fold = Fold.QUANTIZE
    fold_reason: str = ""
    smoothing: Smoothing | None = None
    rounding: Rounding | None = None
    weights: tuple[Weight, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """Qualified names of the member linears."""
        return tuple(str(site) for site in self.sites)

    @property
    def key(self) -> Site:
        """The site that stands for the group in reports: its first member."""
        return self.sites[0]

    @property
    def observer(self) -> Site:
        """The site under which the statistics of the group's input are kept."""
        return self.producer or self.key


@dataclass(frozen=True)
class Attention:
    """One scaled-dot-product attention of the program and the projections proved to feed it.

    `q`, `k` and `v` are the sites of the linears; with fused projections they may coincide. `out`
    is the linear that reads the result, where one was found.
    """

    site: Site
    q: Site
    k: Site
    v: Site
    is_self: bool
    out: Site | None = None


@dataclass(frozen=True)
class Ungrouped:
    """A linear that is in no group, with the reason."""

    site: Site
    reason: str
