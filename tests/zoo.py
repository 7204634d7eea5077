"""Small random Wan models of every kind, and the groups of linears that each must yield.

No width of a model equals another one (3 heads of 16 channels, 80 in the feed-forward, 40 for
text, 28 for images, 32 for time; batch 2, 5 x 4 x 6 video tokens, 7 image tokens), so that a
mix-up changes a shape. Text has 512 tokens, the number that diffusers slices by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.export import Dim

from wancompile import presets

Group = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Variant:
    """A preset to shrink, and what is done to it."""

    preset: str
    fused: bool = False
    cross_norm: bool = True


VARIANTS: Mapping[str, Variant] = {
    "t2v": Variant("t2v-1.3b"),
    "i2v": Variant("i2v-14b"),
    "flf2v": Variant("flf2v-14b"),
    "i2v22": Variant("i2v-a14b"),
    "ti2v": Variant("ti2v-5b"),
    "vace": Variant("vace-1.3b"),
    "animate": Variant("animate-14b"),
    "no_cross_norm": Variant("t2v-1.3b", cross_norm=False),
    "i2v_no_cross_norm": Variant("i2v-14b", cross_norm=False),
    "fused": Variant("t2v-1.3b", fused=True),
    "fused_i2v": Variant("i2v-14b", fused=True),
    "fused_flf2v": Variant("flf2v-14b", fused=True),
    "fused_ti2v": Variant("ti2v-5b", fused=True),
    "fused_vace": Variant("vace-1.3b", fused=True),
}


def make(
    variant: str,
    layers: int = 2,
    *,
    batch: int = 2,
    latent: presets.Latent = (5, 8, 12),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model in eval mode and named arguments of its forward, the same for the same seed.

    Every parameter is random, the affine ones of norms and the modulation tables included, so that
    none of them can be dropped unnoticed.
    """
    preset = _tiny(variant, layers)
    model = presets.build(preset, device="cpu", dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    randomize(model, generator)
    if VARIANTS[variant].fused:
        fuse(model)
    return model, _inputs(preset, batch, latent, dtype, generator)


def fuse(model: nn.Module) -> None:
    """Turn the projections of every attention into fused ones, as diffusers does."""
    for module in model.modules():
        if hasattr(module, "fuse_projections"):
            module.fuse_projections()


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw all parameters anew: gains near 1, other vectors near 0, matrices that keep scale."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(_drawn(name, parameter, noise))


def _drawn(name: str, parameter: Tensor, noise: Tensor) -> Tensor:
    is_gain = parameter.dim() == 1 and name.endswith("weight")
    if is_gain:
        return 1 + 0.3 * noise
    if parameter.dim() == 1 or name.endswith("scale_shift_table"):
        return 0.3 * noise
    if not name.endswith("weight"):
        return noise
    fan_in = parameter[0].numel()
    return noise / fan_in**0.5


def example(variant: str, layers: int = 2, *, batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Return other arguments for the model of `make`, of another size of latents."""
    generator = torch.Generator().manual_seed(seed)
    return _inputs(_tiny(variant, layers), batch, (3, 12, 8), torch.float32, generator)


def dynamic_shapes(kwargs: Mapping[str, Tensor]) -> dict[str, dict[int, object] | None]:
    """Return what torch.export needs to leave batch, frames, height, width and tokens open.

    Faces have a fixed height and width; the scales of control blocks belong to no batch.
    """
    open_dims = {1: (0,), 2: (0, 1), 3: (0,), 5: (0, 2, 3, 4)}
    fixed = {"control_hidden_states_scale": (), "face_pixel_values": (0, 2)}
    return {
        name: dict.fromkeys(fixed.get(name, open_dims[tensor.dim()]), Dim.AUTO) or None
        for name, tensor in kwargs.items()
    }


def _tiny(variant: str, layers: int) -> presets.Preset:
    chosen = VARIANTS[variant]
    tiny = presets.tiny(presets.find(chosen.preset))
    config = {**tiny.config, "cross_attn_norm": chosen.cross_norm}
    if "vace_layers" in config:
        config["vace_layers"] = vace_layers(layers)
    return presets.truncated(replace(tiny, config=config), layers)


def vace_layers(layers: int) -> tuple[int, ...]:
    """Return the blocks that get a control hint: all but every third, so the two lists differ."""
    return tuple(index for index in range(layers) if index % 3 != 2)


def _inputs(
    preset: presets.Preset,
    batch: int,
    latent: presets.Latent,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    shaped = presets.example_inputs(preset, latent=latent, batch=batch)
    inputs = {
        name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for name, tensor in shaped.items()
    }
    inputs["timestep"] = _timestep(shaped["timestep"].shape, preset, latent, generator)
    return inputs


def _timestep(
    shape: torch.Size, preset: presets.Preset, latent: presets.Latent, generator: torch.Generator
) -> Tensor:
    """Return a timestep per video or per token; the tokens of the first frame then have 0."""
    steps = 1000 * torch.rand(shape[0], generator=generator)
    if not preset.per_token_timestep:
        return steps
    per_token = steps[:, None].repeat(1, shape[1])
    per_token[:, : shape[1] // latent[0]] = 0
    return per_token


# What detection must find ---------------------------------------------------------------------


def expected_table(variant: str, layers: int = 2) -> set[Group]:
    """Return the role and the members (in the order q, k, v) of every group of the model."""
    fused = VARIANTS[variant].fused
    has_image = "encoder_hidden_states_image" in _shapes(variant, layers)
    groups = {
        (role, tuple(f"{block}.{member}" for member in members))
        for block in _blocks(variant, layers)
        for role, members in _block_groups(fused, has_image)
    }
    return groups | _face_groups(variant, layers)


def _block_groups(fused: bool, has_image: bool) -> Iterator[Group]:
    yield "attn_qkv_proj", _members("attn1", fused, "to_qkv", "to_q", "to_k", "to_v")
    yield "attn_out_proj", ("attn1.to_out.0",)
    yield "attn_q_proj", ("attn2.to_q",)
    yield "attn_kv_proj", _members("attn2", fused, "to_kv", "to_k", "to_v")
    if has_image:
        added = _members("attn2", fused, "to_added_kv", "add_k_proj", "add_v_proj")
        yield "attn_add_kv_proj", added
    yield "attn_out_proj", ("attn2.to_out.0",)
    yield "ffn_up_proj", ("ffn.net.0.proj",)
    yield "ffn_down_proj", ("ffn.net.2",)


def _face_groups(variant: str, layers: int) -> set[Group]:
    """Return the groups of Animate's face adapters: cross attention from video to faces."""
    if variant != "animate":
        return set()
    config = _tiny(variant, layers).config
    adapters = range(layers // config["inject_face_latents_blocks"])
    roles = {
        "attn_q_proj": ("to_q",),
        "attn_kv_proj": ("to_k", "to_v"),
        "attn_out_proj": ("to_out",),
    }
    return {
        (role, tuple(f"face_adapter.{index}.{member}" for member in members))
        for index in adapters
        for role, members in roles.items()
    }


def _members(attention: str, fused: bool, one: str, *each: str) -> tuple[str, ...]:
    return tuple(f"{attention}.{name}" for name in ((one,) if fused else each))


def _blocks(variant: str, layers: int) -> list[str]:
    blocks = [f"blocks.{index}" for index in range(layers)]
    if VARIANTS[variant].preset.startswith("vace"):
        blocks += [f"vace_blocks.{index}" for index in range(len(vace_layers(layers)))]
    return blocks


def expected_ungrouped(variant: str, layers: int = 2) -> set[str]:
    """Return the linears that belong to no group of a block."""
    embedder = "condition_embedder"
    names = {
        f"{embedder}.time_embedder.linear_1",
        f"{embedder}.time_embedder.linear_2",
        f"{embedder}.time_proj",
        f"{embedder}.text_embedder.linear_1",
        f"{embedder}.text_embedder.linear_2",
        "proj_out",
    }
    if "encoder_hidden_states_image" in _shapes(variant, layers):
        names |= {f"{embedder}.image_embedder.ff.net.{part}" for part in ("0.proj", "2")}
    if VARIANTS[variant].preset.startswith("vace"):
        controls = range(len(vace_layers(layers)))
        names |= {"vace_blocks.0.proj_in", *(f"vace_blocks.{one}.proj_out" for one in controls)}
    if variant == "animate":
        names |= {f"motion_encoder.motion_network.{index}" for index in range(5)}
        names.add("face_encoder.out_proj")
    return names


def _shapes(variant: str, layers: int) -> dict[str, Tensor]:
    return presets.example_inputs(_tiny(variant, layers))
