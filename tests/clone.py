"""Wan written again by another hand: the same mathematics, and nothing else in common.

No class, attribute or argument has a name that Wan has. Attention is products and a softmax, norms
and rotation are plain arithmetic, and half of the linears are bare parameters. What finds the
groups of linears here cannot have looked at names. Nothing of diffusers is imported: `from_wan`
reads only the state dict and the sizes in `config`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Style = Literal["matmul", "einsum", "bmm"]
Split = Literal["count", "fixed"]
Group = tuple[str, tuple[str, ...]]

# The six vectors of a modulation, in the order of this model, as positions in Wan's order (shift,
# scale, gate of attention; shift, scale, gate of the feed-forward).
_COMPASS = (5, 1, 3, 2, 4, 0)
# The same for the two vectors of the head: Wan has shift, scale.
_GLAZE = (1, 0)


@dataclass(frozen=True)
class Taste:
    """How the model is written.

    Attributes:
        style: attention on [B, H, S, D] by matmul, on [B, S, H, D] by einsum, or on [B H, S, D] by
            bmm.
        split: a block finds the image states by their number (`count`, of the model's input), or
            by a literal number of text states at the end (`fixed`).
        long_gelu: GELU by the formula with tanh, not by F.gelu.
        words_first: text states lie before image states, not after them.
        sum_photo_first: what was seen is the left operand of the sum, what was heard the right.
    """

    style: Style = "matmul"
    split: Split = "count"
    long_gelu: bool = False
    words_first: bool = False
    sum_photo_first: bool = False


@dataclass(frozen=True)
class Size:
    """Widths and counts; `photo` is 0 for a model without image states."""

    knots: int
    strand: int
    bulk: int
    rows: int
    inlet: int
    outlet: int
    script: int
    pulse: int
    photo: int
    tile: tuple[int, int, int]
    tiny: float

    @property
    def width(self) -> int:
        return self.knots * self.strand


class Loom(nn.Module):
    """The whole model: `forward(clock, script, canvas, photo)` gives a canvas.

    clock [B], script [B, 512, text], canvas [B, C, T, H, W], photo [B, P, image] or None.
    """

    def __init__(self, size: Size, taste: Taste) -> None:
        super().__init__()
        self.size = size
        width = size.width
        self.loam = nn.Conv3d(size.inlet, width, size.tile, stride=size.tile)
        self.tide = nn.Linear(size.pulse, width)
        self.ebb = nn.Linear(width, width)
        self.surge, self.surge_salt = _matrix(6 * width, width)
        self.ink = nn.Linear(size.script, width)
        self.quill, self.quill_salt = _matrix(width, width)
        self.lens = Lens(size.photo, width) if size.photo else None
        self.heddles = nn.ModuleList(Shuttle(size, taste) for _ in range(size.rows))
        self.glaze = nn.Parameter(torch.empty(2, width))
        self.kiln = nn.Linear(width, size.outlet * math.prod(size.tile))
        self.taste = taste
        for axis, turns in enumerate(_turns(size.strand)):
            self.register_buffer(f"turn_{axis}", turns, persistent=False)

    def forward(
        self, clock: Tensor, script: Tensor, canvas: Tensor, photo: Tensor | None = None
    ) -> Tensor:
        steps = [side // part for side, part in zip(canvas.shape[2:], self.size.tile, strict=True)]
        turn = self._turn(*steps)
        cloth = self.loam(canvas).flatten(2).transpose(1, 2)

        mood = self.ebb(_swish(self.tide(_waves(clock, self.size.pulse).to(cloth.dtype))))
        winds = _affine(_swish(mood), self.surge, self.surge_salt)
        winds = winds.view(winds.shape[0], 6, -1)

        words = _affine(_bulge(self.ink(script), self.taste), self.quill, self.quill_salt)
        glimpses = 0
        if photo is not None:
            seen = self.lens(photo)
            glimpses = seen.shape[1]
            words = torch.cat((words, seen) if self.taste.words_first else (seen, words), 1)

        for shuttle in self.heddles:
            cloth = shuttle(winds, turn, cloth, words, glimpses)

        tint = self.glaze + mood[:, None]
        cloth = (_centred(cloth) * (tint[:, :1] + 1) + tint[:, 1:]).to(cloth.dtype)
        return self._unroll(self.kiln(cloth), steps)

    def _turn(self, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of the rotations, [1, N, 1, D/2] each."""
        along = self.turn_0[:frames, None, None].expand(-1, height, width, -1)
        down = self.turn_1[None, :height, None].expand(frames, -1, width, -1)
        across = self.turn_2[None, None, :width].expand(frames, height, -1, -1)
        angles = torch.cat((along, down, across), -1).reshape(1, frames * height * width, 1, -1)
        return angles.cos().float(), angles.sin().float()

    def _unroll(self, cloth: Tensor, steps: list[int]) -> Tensor:
        """Lay the tokens [B, N, pieces of a tile] out as a canvas again."""
        t, h, w = steps
        a, b, c = self.size.tile
        tiles = cloth.reshape(cloth.shape[0], t, h, w, a, b, c, self.size.outlet)
        canvas = tiles.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return canvas.reshape(cloth.shape[0], self.size.outlet, t * a, h * b, w * c)


class Lens(nn.Module):
    """Image states [B, P, image] to the model's width."""

    def __init__(self, photo: int, width: int) -> None:
        super().__init__()
        self.rim, self.rim_salt = _vector(photo), _vector(photo)
        self.shutter = nn.Linear(photo, photo)
        self.film = nn.Linear(photo, width)
        self.edge, self.edge_salt = _vector(width), _vector(width)

    def forward(self, photo: Tensor) -> Tensor:
        light = (_centred(photo, 1e-5) * self.rim + self.rim_salt).to(photo.dtype)
        light = self.film(F.gelu(self.shutter(light)))
        return (_centred(light, 1e-5) * self.edge + self.edge_salt).to(photo.dtype)


class Shuttle(nn.Module):
    """One block: attention among the tokens, attention to words and pictures, feed-forward."""

    def __init__(self, size: Size, taste: Taste) -> None:
        super().__init__()
        width = size.width
        self.taste = taste
        self.tiny = size.tiny
        self.compass = nn.Parameter(torch.empty(6, width))
        self.orchard = Orchard(size, taste)
        self.lichen, self.moss = _vector(width), _vector(width)
        self.estuary = Estuary(size, taste)
        self.anvil = nn.Linear(width, size.bulk)
        self.forge, self.forge_salt = _matrix(width, size.bulk)

    def forward(
        self,
        winds: Tensor,
        turn: tuple[Tensor, Tensor],
        cloth: Tensor,
        words: Tensor,
        glimpses: int,
    ) -> Tensor:
        bearings = (self.compass + winds.float()).unsqueeze(2).unbind(1)
        valve_late, stretch_early, lift_late, valve_early, stretch_late, lift_early = bearings

        fruit = (lift_early + (stretch_early + 1) * self._plain(cloth)).to(cloth.dtype)
        cloth = (valve_early * self.orchard(turn, fruit) + cloth.float()).to(cloth.dtype)

        water = (self._plain(cloth) * self.lichen + self.moss).to(cloth.dtype)
        cloth = self.estuary(words, water, glimpses) + cloth

        iron = (self._plain(cloth) * (1 + stretch_late) + lift_late).to(cloth.dtype)
        steel = F.linear(_bulge(self.anvil(iron), self.taste), self.forge, self.forge_salt)
        return (cloth.float() + valve_late * steel.float()).to(cloth.dtype)

    def _plain(self, cloth: Tensor) -> Tensor:
        return _centred(cloth, self.tiny)


class Orchard(nn.Module):
    """Attention among the tokens [B, N, width]."""

    def __init__(self, size: Size, taste: Taste) -> None:
        super().__init__()
        width = size.width
        self.knots, self.taste, self.tiny = size.knots, taste, size.tiny
        self.apple, self.apple_salt = _matrix(width, width)
        self.pear, self.pear_salt = _matrix(width, width)
        self.plum, self.plum_salt = _matrix(width, width)
        self.frost, self.dew = _vector(width), _vector(width)
        self.basket = nn.Linear(width, width)

    def forward(self, turn: tuple[Tensor, Tensor], fruit: Tensor) -> Tensor:
        plum = _affine(fruit, self.plum, self.plum_salt)
        pear = _even(_affine(fruit, self.pear, self.pear_salt), self.dew, self.tiny)
        apple = _even(_affine(fruit, self.apple, self.apple_salt), self.frost, self.tiny)
        spin = _spin_whole if self.taste.style == "einsum" else _spin_pairs
        apple, pear = spin(_comb(apple, self.knots), turn), spin(_comb(pear, self.knots), turn)
        return self.basket(_mingle(apple, pear, _comb(plum, self.knots), self.taste.style))


class Estuary(nn.Module):
    """Attention of the tokens [B, N, width] to words, and to pictures before them."""

    def __init__(self, size: Size, taste: Taste) -> None:
        super().__init__()
        width = size.width
        self.knots, self.taste, self.tiny = size.knots, taste, size.tiny
        self.with_photo = bool(size.photo)
        self.otter, self.otter_salt = _matrix(width, width)
        self.heron = nn.Linear(width, width)
        self.reed, self.reed_salt = _matrix(width, width)
        self.mist, self.rain = _vector(width), _vector(width)
        self.delta, self.delta_salt = _matrix(width, width)
        if self.with_photo:
            self.swan, self.swan_salt = _matrix(width, width)
            self.teal = nn.Linear(width, width)
            self.hail = _vector(width)

    def forward(self, words: Tensor, water: Tensor, glimpses: int) -> Tensor:
        otter = F.linear(water, self.otter, self.otter_salt)
        otter = _comb(_even(otter, self.mist, self.tiny), self.knots)
        if not self.with_photo:
            return self._leave(self._hear(otter, words))
        seen, said = self._part(words, glimpses)
        heard, looked = self._hear(otter, said), self._see(otter, seen)
        return self._leave(looked + heard if self.taste.sum_photo_first else heard + looked)

    def _part(self, words: Tensor, glimpses: int) -> tuple[Tensor, Tensor]:
        if self.taste.words_first:
            count = 512 if self.taste.split == "fixed" else words.shape[1] - glimpses
            return words[:, count:], words[:, :count]
        if self.taste.split == "fixed":
            return words[:, :-512], words[:, -512:]
        return words.narrow(1, 0, glimpses), words[:, glimpses:]

    def _hear(self, otter: Tensor, said: Tensor) -> Tensor:
        heron = _even(self.heron(said), self.rain, self.tiny)
        reed = _affine(said, self.reed, self.reed_salt)
        return _mingle(otter, _comb(heron, self.knots), _comb(reed, self.knots), self.taste.style)

    def _see(self, otter: Tensor, seen: Tensor) -> Tensor:
        swan = _even(F.linear(seen, self.swan, self.swan_salt), self.hail, self.tiny)
        teal = self.teal(seen)
        return _mingle(otter, _comb(swan, self.knots), _comb(teal, self.knots), self.taste.style)

    def _leave(self, water: Tensor) -> Tensor:
        return _affine(water, self.delta, self.delta_salt)


# Arithmetic -----------------------------------------------------------------------------------


def _vector(width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(width))


def _matrix(rows: int, columns: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.empty(rows, columns)), _vector(rows)


def _affine(x: Tensor, matrix: Tensor, salt: Tensor) -> Tensor:
    return x @ matrix.t() + salt


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _bulge(x: Tensor, taste: Taste) -> Tensor:
    if not taste.long_gelu:
        return F.gelu(x, approximate="tanh")
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _centred(x: Tensor, tiny: float = 1e-6) -> Tensor:
    """Return x [..., C] with mean 0 and variance 1 over C, in fp32."""
    x = x.float()
    gap = x - x.mean(-1, keepdim=True)
    return gap * torch.rsqrt((gap * gap).mean(-1, keepdim=True) + tiny)


def _even(x: Tensor, gain: Tensor, tiny: float) -> Tensor:
    """Return x [B, S, C] over the root of its mean square over C, all heads together."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + tiny)).to(x.dtype) * gain


def _comb(x: Tensor, knots: int) -> Tensor:
    """[B, S, H D] to [B, S, H, D]."""
    return x.view(x.shape[0], x.shape[1], knots, -1)


def _spin_pairs(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring channels of x [B, S, H, D], pair by pair."""
    cos, sin = turn
    even, odd = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


def _spin_whole(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate as `_spin_pairs` does, by a sum over all channels: x cos + (x turned by 90°) sin."""
    cos, sin = (table.repeat_interleave(2, -1) for table in turn)
    quarter = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).reshape(x.shape)
    return (x * cos + quarter * sin).to(x.dtype)


def _mingle(q: Tensor, k: Tensor, v: Tensor, style: Style) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v for [B, S, H, D] tensors, heads joined: [B, S, H D]."""
    return {"matmul": _by_matmul, "einsum": _by_einsum, "bmm": _by_bmm}[style](q, k, v)


def _by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return (_shares(scores) @ v).transpose(1, 2).flatten(2)


def _by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("bhqk,bkhd->bqhd", _shares(scores), v).flatten(2)


def _by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, _, heads, depth = q.shape
    q, k, v = (x.permute(0, 2, 1, 3).reshape(batch * heads, -1, depth) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(depth)
    mixed = torch.bmm(_shares(scores), v)
    return mixed.view(batch, heads, -1, depth).transpose(1, 2).reshape(batch, -1, heads * depth)


def _shares(scores: Tensor) -> Tensor:
    return torch.softmax(scores.float(), dim=-1).to(scores.dtype)


def _waves(clock: Tensor, pulse: int) -> Tensor:
    """Return cosines, then sines, of [B] times at pulse/2 frequencies."""
    half = pulse // 2
    rates = 10000.0 ** (-torch.arange(half, device=clock.device, dtype=torch.float32) / half)
    phases = clock.float()[:, None] * rates
    return torch.cat((phases.cos(), phases.sin()), dim=1)


def _turns(strand: int, reach: int = 1024) -> Iterator[Tensor]:
    """Yield the angles [reach, channels / 2] of time, height and width."""
    flat = 2 * (strand // 6)
    for channels in (strand - 2 * flat, flat, flat):
        rates = 10000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        yield torch.arange(reach, dtype=torch.float64)[:, None] * rates


# From Wan -------------------------------------------------------------------------------------

# The clone's names of parameters and Wan's, of whole modules where the name has no dot.
_MODEL_NAMES: Mapping[str, str] = {
    "loam.weight": "patch_embedding.weight",
    "loam.bias": "patch_embedding.bias",
    "tide": "condition_embedder.time_embedder.linear_1",
    "ebb": "condition_embedder.time_embedder.linear_2",
    "surge": "condition_embedder.time_proj",
    "ink": "condition_embedder.text_embedder.linear_1",
    "quill": "condition_embedder.text_embedder.linear_2",
    "kiln": "proj_out",
    "glaze": "scale_shift_table",
}
_LENS_NAMES: Mapping[str, str] = {
    "rim": "norm1",
    "shutter": "ff.net.0.proj",
    "film": "ff.net.2",
    "edge": "norm2",
}
_BLOCK_NAMES: Mapping[str, str] = {
    "compass": "scale_shift_table",
    "orchard.apple": "attn1.to_q",
    "orchard.pear": "attn1.to_k",
    "orchard.plum": "attn1.to_v",
    "orchard.frost": "attn1.norm_q",
    "orchard.dew": "attn1.norm_k",
    "orchard.basket": "attn1.to_out.0",
    "estuary.otter": "attn2.to_q",
    "estuary.heron": "attn2.to_k",
    "estuary.reed": "attn2.to_v",
    "estuary.mist": "attn2.norm_q",
    "estuary.rain": "attn2.norm_k",
    "estuary.delta": "attn2.to_out.0",
    "estuary.swan": "attn2.add_k_proj",
    "estuary.teal": "attn2.add_v_proj",
    "estuary.hail": "attn2.norm_added_k",
    "lichen": "norm2.weight",
    "moss": "norm2.bias",
    "anvil": "ffn.net.0.proj",
    "forge": "ffn.net.2",
}


def from_wan(model: nn.Module, taste: Taste | None = None) -> Loom:
    """Return a clone with the weights of a Wan 2.1 T2V or I2V model, in its dtype, in eval mode."""
    loom = Loom(_size(model.config), taste or Taste())
    theirs = model.state_dict()
    ours = {name: _taken(theirs, name) for name in loom.state_dict()}
    loom.load_state_dict(ours, assign=True)
    return loom.requires_grad_(False).eval()


def arguments(kwargs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the clone's arguments for those of Wan."""
    names = {
        "timestep": "clock",
        "encoder_hidden_states": "script",
        "hidden_states": "canvas",
        "encoder_hidden_states_image": "photo",
    }
    return {ours: kwargs[theirs] for theirs, ours in names.items() if theirs in kwargs}


def _size(config: Any) -> Size:
    return Size(
        knots=config.num_attention_heads,
        strand=config.attention_head_dim,
        bulk=config.ffn_dim,
        rows=config.num_layers,
        inlet=config.in_channels,
        outlet=config.out_channels,
        script=config.text_dim,
        pulse=config.freq_dim,
        photo=config.image_dim or 0,
        tile=tuple(config.patch_size),
        tiny=config.eps,
    )


def _taken(theirs: Mapping[str, Tensor], name: str) -> Tensor:
    """Return Wan's tensor for the clone's parameter `name`, rearranged where the orders differ."""
    found = theirs[_their_name(theirs, name)]
    last = name.rpartition(".")[2]
    if last == "compass":
        return found[0, list(_COMPASS)]
    if last == "glaze":
        return found[0, list(_GLAZE)]
    if last in ("surge", "surge_salt"):
        return found.unflatten(0, (6, -1))[list(_COMPASS)].flatten(0, 1)
    return found


def _their_name(theirs: Mapping[str, Tensor], name: str) -> str:
    """Return Wan's name of a parameter: `x` and `x_salt`, or `x.weight` and `x.bias`."""
    stem = name.removesuffix("_salt").removesuffix(".weight").removesuffix(".bias")
    path = _MODEL_NAMES.get(name) or _their_path(stem)
    if path in theirs:
        return path
    return f"{path}.bias" if name.endswith(("_salt", ".bias")) else f"{path}.weight"


def _their_path(stem: str) -> str:
    head, _, rest = stem.partition(".")
    if head == "lens":
        return f"condition_embedder.image_embedder.{_LENS_NAMES[rest]}"
    if head == "heddles":
        index, _, member = rest.partition(".")
        return f"blocks.{index}.{_BLOCK_NAMES[member]}"
    return _MODEL_NAMES[stem]


# What detection must find ---------------------------------------------------------------------


def expected_table_clone(layers: int = 2, *, photo: bool = False) -> set[Group]:
    """Return the role and the members (in the order q, k, v) of every group of the clone.

    A member is named by its weight: by the module if that is called `weight`, else in full.
    """
    groups: dict[str, list[tuple[str, ...]]] = {
        "attn_qkv_proj": [("orchard.apple", "orchard.pear", "orchard.plum")],
        "attn_q_proj": [("estuary.otter",)],
        "attn_kv_proj": [("estuary.heron", "estuary.reed")],
        "attn_out_proj": [("orchard.basket",), ("estuary.delta",)],
        "ffn_up_proj": [("anvil",)],
        "ffn_down_proj": [("forge",)],
    }
    if photo:
        groups["attn_add_kv_proj"] = [("estuary.swan", "estuary.teal")]
    return {
        (role, tuple(f"heddles.{index}.{member}" for member in members))
        for index in range(layers)
        for role, several in groups.items()
        for members in several
    }


def expected_ungrouped_clone(*, photo: bool = False) -> set[str]:
    """Return the linears that belong to no group of a block."""
    names = {"tide", "ebb", "surge", "ink", "quill", "kiln"}
    return names | {"lens.shutter", "lens.film"} if photo else names
