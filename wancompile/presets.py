"""The Wan models by name: their configurations and inputs of the right shapes, without weights."""

from __future__ import annotations

import difflib
import importlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from wancompile.errors import InputError

Latent = tuple[int, int, int]

_PLAIN = "WanTransformer3DModel"
_VACE = "WanVACETransformer3DModel"
_ANIMATE = "WanAnimateTransformer3DModel"
_FACTORIES = (_PLAIN, _VACE, _ANIMATE)


@dataclass(frozen=True)
class Preset:
    """One transformer of the Wan family, and the shapes that its pipeline calls it with.

    Attributes:
        name: what `find` looks for.
        description: one line for people.
        factory: the name of the diffusers class; diffusers is imported only to build it.
        config: the arguments of that class; what is left out has the class's default.
        latent: frames, height and width of the latents in a usual call.
        tokens: text tokens, zero-padded to this number by the pipeline.
        image_tokens: image tokens that one video's cross attention reads, 0 without image states.
        per_token_timestep: timesteps come as [batch, tokens], not [batch].
        experts: transformers of this configuration in the pipeline, each for a range of timesteps.
        note: what a user of the preset should know, or nothing.
    """

    name: str
    description: str
    factory: str = _PLAIN
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    latent: Latent = (21, 60, 104)
    tokens: int = 512
    image_tokens: int = 0
    per_token_timestep: bool = False
    experts: int = 1
    note: str = ""


def _config(size: Mapping[str, int], **changes: Any) -> Mapping[str, Any]:
    return MappingProxyType({**_COMMON, **size, **changes})


_COMMON: Mapping[str, Any] = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
_SIZE_1B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_SIZE_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30}
_SIZE_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_IMAGE = {"image_dim": 1280, "added_kv_proj_dim": 5120}

_ALL = (
    Preset("t2v-1.3b", "Wan 2.1 text to video, 1.3B", config=_config(_SIZE_1B)),
    Preset("t2v-14b", "Wan 2.1 text to video, 14B", config=_config(_SIZE_14B)),
    Preset(
        "t2v-a14b",
        "Wan 2.2 text to video, two experts of 14B",
        config=_config(_SIZE_14B),
        experts=2,
    ),
    Preset(
        "i2v-14b",
        "Wan 2.1 image to video, 14B",
        config=_config(_SIZE_14B, in_channels=36, **_IMAGE),
        image_tokens=257,
    ),
    Preset(
        "flf2v-14b",
        "Wan 2.1 first and last frame to video, 14B",
        config=_config(_SIZE_14B, in_channels=36, pos_embed_seq_len=514, **_IMAGE),
        image_tokens=514,
    ),
    Preset(
        "i2v-a14b",
        "Wan 2.2 image to video, two experts of 14B",
        config=_config(_SIZE_14B, in_channels=36),
        experts=2,
    ),
    Preset(
        "ti2v-5b",
        "Wan 2.2 text or image to video, 5B",
        config=_config(_SIZE_5B, in_channels=48, out_channels=48),
        # 121 frames of 704 x 1280 pixels; this model's VAE shrinks 4 x 16 x 16.
        latent=(31, 44, 80),
        per_token_timestep=True,
    ),
    Preset(
        "vace-1.3b",
        "Wan 2.1 VACE video editing, 1.3B",
        factory=_VACE,
        config=_config(_SIZE_1B, vace_layers=tuple(range(0, 30, 2)), vace_in_channels=96),
    ),
    Preset(
        "vace-14b",
        "Wan 2.1 VACE video editing, 14B",
        factory=_VACE,
        config=_config(_SIZE_14B, vace_layers=tuple(range(0, 40, 5)), vace_in_channels=96),
    ),
    Preset(
        "animate-14b",
        "Wan 2.2 Animate, 14B",
        factory=_ANIMATE,
        config=_config(_SIZE_14B, in_channels=36, latent_channels=16, **_IMAGE),
        image_tokens=257,
    ),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _ALL})


def find(name: str) -> Preset:
    """Return the preset called `name`, in any case.

    Raises:
        InputError: there is none; the message has the nearest names.
    """
    found = PRESETS.get(name.lower())
    if found is not None:
        return found
    near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(PRESETS)}"
    raise InputError(f"there is no preset {name!r}: {hint}")


def tiny(preset: Preset) -> Preset:
    """Return the same kind of model with every width shrunk, quick to run on a CPU.

    The widths differ from each other, so that a mix-up of two of them shows; text keeps its number
    of tokens, which diffusers has in its code.
    """
    heads, head_dim = 3, 16
    images = preset.image_tokens and 7 * _images_per_video(preset.config)
    shrunk = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "ffn_dim": 80,
        "text_dim": 40,
        "freq_dim": 32,
        "image_dim": 28,
        "added_kv_proj_dim": heads * head_dim,
        "pos_embed_seq_len": images,
    }
    config = {
        key: shrunk.get(key, value) if value is not None else None
        for key, value in preset.config.items()
    }
    if preset.factory == _ANIMATE:
        config.update(_TINY_FACE)
    return replace(
        truncated(replace(preset, config=config), 2),
        name=f"{preset.name}-tiny",
        latent=(5, 8, 12),
        image_tokens=images,
    )


_TINY_FACE: Mapping[str, Any] = {
    "motion_encoder_channel_sizes": {"4": 12, "8": 10, "16": 6},
    "motion_encoder_size": 16,
    "motion_style_dim": 14,
    "motion_dim": 9,
    "motion_encoder_dim": 18,
    "face_encoder_hidden_dim": 22,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
}


def truncated(preset: Preset, layers: int) -> Preset:
    """Return `preset` with `layers` blocks, and only those control blocks that still have one.

    Raises:
        InputError: Animate would lose the face adapter of one of the blocks.
    """
    config = {**preset.config, "num_layers": layers}
    if preset.factory == _VACE:
        config["vace_layers"] = tuple(one for one in config["vace_layers"] if one < layers)
    if preset.factory == _ANIMATE:
        config["inject_face_latents_blocks"] = _face_interval(config, layers)
    return replace(preset, config=config)


def _face_interval(config: Mapping[str, Any], layers: int) -> int:
    # diffusers makes adapters for whole intervals only, and needs one at the start of each.
    interval = int(config.get("inject_face_latents_blocks", 5))
    if layers < interval:
        return layers
    if layers % interval:
        raise InputError(
            f"there is a face adapter every {interval} blocks, so {layers} blocks are not possible:"
            f" take a multiple of {interval}, or fewer"
        )
    return interval


def build(
    preset: Preset | Mapping[str, Any],
    *,
    layers: int | None = None,
    device: str | torch.device = "meta",
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """Make the model, in eval mode, on `meta` without weights or elsewhere with random ones.

    Args:
        preset: a preset, or a diffusers configuration that names its class in `_class_name`.
        layers: keep only that many blocks.
        device: where the model is made.
        dtype: of all parameters but those that diffusers keeps in fp32 when it loads weights.

    Raises:
        InputError: the configuration is not one of a Wan transformer.
    """
    chosen = _chosen(preset)
    if layers is not None:
        chosen = truncated(chosen, layers)
    cls = _class(chosen.factory)
    try:
        with torch.device(device):
            model: nn.Module = cls(**chosen.config)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{chosen.factory} does not take the configuration {chosen.name}: {error}"
        ) from error
    _cast(model, dtype)
    return model.eval()


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    # Buffers stay as they are: the rotary tables are fp32 in every checkpoint.
    kept = frozenset(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if not kept.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def _class(factory: str) -> Any:
    if factory not in _FACTORIES:
        raise InputError(f"{factory!r} is not a Wan transformer: {', '.join(_FACTORIES)} are")
    try:
        return getattr(importlib.import_module("diffusers"), factory)
    except (AttributeError, ImportError) as error:
        raise InputError(f"the installed diffusers has no {factory}") from error


def example_inputs(
    preset: Preset | Mapping[str, Any],
    *,
    latent: Latent | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    device: str | torch.device = "meta",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """Return named arguments of the model's forward, in the shapes that the pipeline uses.

    With B the batch, C channels and (F, H, W) the latent:

        hidden_states                [B, C, F, H, W]
        timestep                     [B], or [B, N] with one for each of the N video tokens; fp32
        encoder_hidden_states        [B, tokens, text_dim]
        encoder_hidden_states_image  [B, image_tokens, image_dim], or [2 B, image_tokens / 2, ...]
                                     with first and last frame as neighbours in the batch
        control_hidden_states        [B, vace_in_channels, F, H, W]
        control_hidden_states_scale  [control blocks]
        pose_hidden_states           [B, latent_channels, F - 1, H, W]
        face_pixel_values            [B, 3, 4 (F - 2) + 1, size, size]

    Args:
        preset: a preset, or a diffusers configuration that names its class in `_class_name`.
        latent: frames, height and width of the latents, instead of the preset's.
        frames: replaces the first of them.
        height: replaces the second.
        width: replaces the third.
        batch: videos in one call; the pipelines call once with text and once without.
        device: where the tensors are made; all but on `meta` they are random.
        dtype: of all tensors but the timestep.

    Raises:
        InputError: the latents do not divide into patches.
    """
    chosen = _chosen(preset)
    usual = latent or chosen.latent
    size = (frames or usual[0], height or usual[1], width or usual[2])
    patches = _patches(chosen.config, size)
    inputs = {
        name: torch.randn(shape, device=device, dtype=dtype)
        for name, shape in _shapes(chosen, size, batch).items()
    }
    steps = (batch, patches) if chosen.per_token_timestep else (batch,)
    inputs["timestep"] = torch.full(steps, 500.0, device=device)
    if chosen.factory == _VACE:
        blocks = len(chosen.config["vace_layers"])
        inputs["control_hidden_states_scale"] = torch.ones(blocks, device=device, dtype=dtype)
    return inputs


def _shapes(preset: Preset, size: Latent, batch: int) -> dict[str, tuple[int, ...]]:
    config = preset.config
    shapes: dict[str, tuple[int, ...]] = {
        "hidden_states": (batch, config["in_channels"], *size),
        "encoder_hidden_states": (batch, preset.tokens, config["text_dim"]),
    }
    if preset.image_tokens:
        count = _images_per_video(config)
        shapes["encoder_hidden_states_image"] = (
            count * batch,
            preset.image_tokens // count,
            config["image_dim"],
        )
    if preset.factory == _VACE:
        shapes["control_hidden_states"] = (batch, config["vace_in_channels"], *size)
    if preset.factory == _ANIMATE:
        shapes.update(_face_shapes(config, size, batch))
    return shapes


def _face_shapes(config: Mapping[str, Any], size: Latent, batch: int) -> dict[str, tuple[int, ...]]:
    # The first latent frame is the reference picture: it has neither pose nor face.
    frames, height, width = size
    if frames < 2:
        raise InputError("Animate needs at least 2 latent frames, the first is the reference")
    face = config.get("motion_encoder_size", 512)
    return {
        "pose_hidden_states": (batch, config["latent_channels"], frames - 1, height, width),
        "face_pixel_values": (batch, 3, 4 * (frames - 2) + 1, face, face),
    }


def _images_per_video(config: Mapping[str, Any]) -> int:
    """Return 2 for models that read the first and the last frame: they have positions for both."""
    return 1 if config.get("pos_embed_seq_len") is None else 2


def _patches(config: Mapping[str, Any], size: Latent) -> int:
    """Return the number of video tokens of a latent of this size."""
    patch = config["patch_size"]
    if any(length < 1 or length % step for length, step in zip(size, patch, strict=True)):
        raise InputError(
            f"latents of {'x'.join(map(str, size))} do not divide into patches of "
            f"{'x'.join(map(str, patch))}"
        )
    return math.prod(length // step for length, step in zip(size, patch, strict=True))


def from_folder(path: Path | str) -> Preset:
    """Return the preset of a diffusers folder, of a pipeline or of its transformer alone.

    What the configuration does not say, as the usual size of the latents, is taken from the known
    model with the same one; `build` makes the model.

    Raises:
        InputError: there is no configuration, or not one of a Wan transformer.
    """
    root = Path(path)
    folder = _transformer_folder(root)
    preset = _chosen(_read_json(folder / "config.json"))
    pipeline = folder.parent if folder == root else root
    index = pipeline / "model_index.json"
    changes: dict[str, Any] = {"name": root.resolve().name}
    if index.is_file():
        entries = _read_json(index)
        changes["per_token_timestep"] = bool(entries.get("expand_timesteps"))
        changes["experts"] = sum(
            (pipeline / name / "config.json").is_file() for name in ("transformer", "transformer_2")
        )
    return replace(preset, **changes)


def load(
    path: Path | str, *, layers: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """Load the weights of a diffusers folder, of only the first `layers` blocks if given.

    Weights go from the file to the model without a second copy, and those of blocks left out are
    not read.

    Raises:
        InputError: there is no model in the folder, or not one of the Wan transformers, or some of
            its weights are missing or of another shape.
    """
    folder = _transformer_folder(Path(path))
    with _parameters_on_meta():
        model = build(_read_json(folder / "config.json"), layers=layers, device="cpu", dtype=dtype)
    wanted = model.state_dict()
    found = _read_weights(folder, {name: tensor.dtype for name, tensor in wanted.items()})
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise InputError(f"{folder} has no weights for {missing[0]} (of {len(missing)} missing)")
    try:
        model.load_state_dict(found, assign=True)
    except RuntimeError as error:
        raise InputError(f"the weights in {folder} do not fit its config.json: {error}") from error
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Give new modules parameters without storage; buffers, which no file has, stay real."""

    def strip(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(strip)
    try:
        yield
    finally:
        hook.remove()


def _read_weights(folder: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as stored:
                names = dtypes.keys() & stored.keys()
                found.update({name: stored.get_tensor(name).to(dtypes[name]) for name in names})
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error
    return found


def _weight_files(folder: Path) -> list[Path]:
    single = folder / "diffusion_pytorch_model.safetensors"
    index = folder / f"{single.name}.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    return [single]


def _transformer_folder(root: Path) -> Path:
    for folder in (root / "transformer", root):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(f"{root} has neither transformer/config.json nor config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object")
    return content


def _chosen(preset: Preset | Mapping[str, Any]) -> Preset:
    return preset if isinstance(preset, Preset) else _from_config(preset)


def _from_config(config: Mapping[str, Any]) -> Preset:
    factory = config.get("_class_name")
    if factory not in _FACTORIES:
        said = "names no class" if factory is None else f"is of the class {factory}"
        raise InputError(f"the configuration {said}, not one of {', '.join(_FACTORIES)}")
    given = {key: _frozen(value) for key, value in config.items() if not key.startswith("_")}
    full = {**_COMMON, **_DEFAULTS[factory], **given}
    full["out_channels"] = full["out_channels"] or full["in_channels"]
    like = next((one for one in _ALL if one.factory == factory and _alike(one, full)), None)
    if like is not None:
        return replace(like, config=full)
    images = (full["pos_embed_seq_len"] or 257) if full["image_dim"] else 0
    return Preset(
        factory,
        f"a {factory} of its own size",
        factory=factory,
        config=full,
        image_tokens=images,
    )


# The sizes that diffusers takes where a configuration leaves them out.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    _PLAIN: _SIZE_14B,
    _VACE: {**_SIZE_14B, "vace_layers": tuple(range(0, 40, 5)), "vace_in_channels": 96},
    _ANIMATE: {**_SIZE_14B, "in_channels": 36, "latent_channels": 16, "image_dim": 1280},
}


def _alike(preset: Preset, config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of `preset`, but for the number of blocks."""
    depth = ("num_layers", "vace_layers")
    return all(config.get(key) == value for key, value in preset.config.items() if key not in depth)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
