"""The presets against the published models' numbers, and what is made from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from wancompile import presets
from wancompile.errors import InputError

NO_IMAGE, IMAGE, TWO_IMAGES = (None, None, None), (1280, 5120, None), (1280, 5120, 514)

# heads, channels, feed-forward, layers, in and out channels, (image_dim, added_kv, positions).
TABLE: dict[str, tuple[Any, ...]] = {
    "t2v-1.3b": (12, 1536, 8960, 30, 16, 16, NO_IMAGE),
    "t2v-14b": (40, 5120, 13824, 40, 16, 16, NO_IMAGE),
    "t2v-a14b": (40, 5120, 13824, 40, 16, 16, NO_IMAGE),
    "i2v-14b": (40, 5120, 13824, 40, 36, 16, IMAGE),
    "flf2v-14b": (40, 5120, 13824, 40, 36, 16, TWO_IMAGES),
    "i2v-a14b": (40, 5120, 13824, 40, 36, 16, NO_IMAGE),
    "ti2v-5b": (24, 3072, 14336, 30, 48, 48, NO_IMAGE),
    "vace-1.3b": (12, 1536, 8960, 30, 16, 16, NO_IMAGE),
    "vace-14b": (40, 5120, 13824, 40, 16, 16, NO_IMAGE),
    "animate-14b": (40, 5120, 13824, 40, 36, 16, IMAGE),
}
# Billions of parameters, control blocks of VACE and face adapters of Animate included.
BILLIONS = {
    "t2v-1.3b": 1.42,
    "t2v-14b": 14.29,
    "t2v-a14b": 14.29,
    "i2v-14b": 16.39,
    "flf2v-14b": 16.40,
    "i2v-a14b": 14.29,
    "ti2v-5b": 5.00,
    "vace-1.3b": 2.15,
    "vace-14b": 17.34,
    "animate-14b": 17.27,
}
NAMES = list(TABLE)


# Numbers --------------------------------------------------------------------------------------


def test_there_is_a_preset_for_every_model() -> None:
    assert list(presets.PRESETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_has_the_published_numbers(name: str) -> None:
    found = presets.find(name).config
    heads, head_dim = found["num_attention_heads"], found["attention_head_dim"]
    images = tuple(found[key] for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"))
    channels = found["in_channels"], found["out_channels"]
    sizes = heads, heads * head_dim, found["ffn_dim"], found["num_layers"]
    assert (*sizes, *channels, images) == TABLE[name]
    assert head_dim == 128
    assert found["patch_size"] == (1, 2, 2)
    assert (found["text_dim"], found["freq_dim"]) == (4096, 256)
    assert found["cross_attn_norm"] is True


def test_what_only_some_models_have() -> None:
    found = presets.PRESETS
    assert [name for name in NAMES if found[name].experts == 2] == ["t2v-a14b", "i2v-a14b"]
    assert [name for name in NAMES if found[name].per_token_timestep] == ["ti2v-5b"]
    assert found["vace-1.3b"].config["vace_layers"] == tuple(range(0, 30, 2))
    assert found["vace-14b"].config["vace_layers"] == tuple(range(0, 40, 5))
    assert {found[name].config.get("vace_in_channels") for name in NAMES} == {None, 96}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_built_without_weights(name: str) -> None:
    model = presets.build(presets.find(name))
    assert not model.training
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters / 1e9 == pytest.approx(BILLIONS[name], abs=0.01)


def test_the_face_adapters_of_animate_stand_at_every_fifth_block() -> None:
    model = presets.build(presets.find("animate-14b"))
    assert len(model.face_adapter) * 5 == len(model.blocks) == 40


def test_some_parameters_stay_in_fp32_as_diffusers_keeps_them() -> None:
    model = presets.build(presets.find("t2v-1.3b"), layers=1, dtype=torch.bfloat16)
    block = model.blocks[0]
    assert block.attn1.to_q.weight.dtype == block.ffn.net[2].weight.dtype == torch.bfloat16
    assert block.scale_shift_table.dtype == block.norm2.weight.dtype == torch.float32


# Calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_model_runs_on_its_example_inputs(name: str) -> None:
    tiny = presets.tiny(presets.find(name))
    model = presets.build(tiny, device="cpu", dtype=torch.float32)
    inputs = presets.example_inputs(tiny, batch=2, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        out = model(**inputs, return_dict=False)[0]
    assert out.shape == (2, tiny.config["out_channels"], *inputs["hidden_states"].shape[2:])
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["t2v-1.3b", "flf2v-14b", "ti2v-5b", "vace-14b", "animate-14b"])
def test_the_full_model_takes_its_example_inputs(name: str) -> None:
    found = presets.truncated(presets.find(name), 1)
    inputs = presets.example_inputs(found, frames=3)
    out = presets.build(found)(**inputs, return_dict=False)[0]
    assert out.shape == (1, found.config["out_channels"], 3, *found.latent[1:])


def test_the_usual_calls_have_the_shapes_of_the_pipelines() -> None:
    def shapes(name: str) -> dict[str, tuple[int, ...]]:
        inputs = presets.example_inputs(presets.find(name))
        return {key: tuple(tensor.shape) for key, tensor in inputs.items()}

    assert shapes("t2v-14b") == {
        "hidden_states": (1, 16, 21, 60, 104),
        "encoder_hidden_states": (1, 512, 4096),
        "timestep": (1,),
    }
    assert shapes("i2v-14b")["encoder_hidden_states_image"] == (1, 257, 1280)
    assert shapes("flf2v-14b")["encoder_hidden_states_image"] == (2, 257, 1280)
    assert shapes("ti2v-5b")["timestep"] == (1, 31 * 22 * 40)


def test_the_size_of_a_call_can_be_chosen() -> None:
    found = presets.find("t2v-1.3b")
    inputs = presets.example_inputs(found, latent=(5, 8, 12), width=16, batch=3)
    assert inputs["hidden_states"].shape == (3, 16, 5, 8, 16)


# Smaller models -------------------------------------------------------------------------------


def test_no_two_widths_of_a_tiny_model_are_alike() -> None:
    tiny = presets.tiny(presets.find("flf2v-14b"))
    inner = tiny.config["num_attention_heads"] * tiny.config["attention_head_dim"]
    keys = ("ffn_dim", "text_dim", "freq_dim", "image_dim", "in_channels", "out_channels")
    widths = [inner, tiny.image_tokens, *(tiny.config[key] for key in keys)]
    assert len(set(widths)) == len(widths)


def test_a_truncated_model_keeps_the_control_blocks_that_have_a_block() -> None:
    found = presets.truncated(presets.find("vace-1.3b"), 5)
    assert found.config["vace_layers"] == (0, 2, 4)
    assert len(presets.build(found).vace_blocks) == 3
    assert presets.find("vace-1.3b").config["num_layers"] == 30


@pytest.mark.parametrize(("layers", "adapters"), [(1, 1), (4, 1), (10, 2)])
def test_a_truncated_animate_keeps_its_face_adapters(layers: int, adapters: int) -> None:
    model = presets.build(presets.find("animate-14b"), layers=layers)
    assert (len(model.blocks), len(model.face_adapter)) == (layers, adapters)


# Folders --------------------------------------------------------------------------------------


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """Save a tiny model as diffusers does; return it and the folder."""

    def make(name: str, folder: str = "model", **options: Any) -> tuple[Any, Path]:
        model = presets.build(presets.tiny(presets.find(name)), device="cpu", dtype=torch.float32)
        return model, save(model, tmp_path / folder, **options)

    return make


@pytest.mark.parametrize("name", ["t2v-1.3b", "flf2v-14b", "vace-1.3b", "animate-14b"])
def test_a_saved_model_is_loaded_with_its_weights(
    name: str, saved: Callable[..., tuple[Any, Path]]
) -> None:
    model, folder = saved(name)
    loaded = presets.load(folder, dtype=torch.float32)
    tiny = presets.tiny(presets.find(name))
    inputs = presets.example_inputs(tiny, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        actual, expected = (one(**inputs, return_dict=False)[0] for one in (loaded, model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    weights = model.state_dict()
    assert all(torch.equal(one, weights[key]) for key, one in loaded.state_dict().items())
    assert not any(one.is_meta for one in (*loaded.parameters(), *loaded.buffers()))


def test_weights_in_several_files_are_cast_and_those_of_other_blocks_not_read(
    saved: Callable[..., tuple[Any, Path]],
) -> None:
    model, folder = saved("t2v-1.3b", max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = presets.load(folder, layers=1)
    assert len(loaded.blocks) == 1
    weight = model.blocks[0].ffn.net[2].weight
    assert torch.equal(loaded.blocks[0].ffn.net[2].weight, weight.to(torch.bfloat16))
    assert loaded.blocks[0].scale_shift_table.dtype == torch.float32


def test_a_folder_of_its_own_size_has_a_preset(saved: Callable[..., tuple[Any, Path]]) -> None:
    _, folder = saved("flf2v-14b")
    found = presets.from_folder(folder)
    tiny = presets.tiny(presets.find("flf2v-14b"))
    assert (found.name, found.image_tokens, found.images_per_video) == ("model", 14, 2)
    assert {key: found.config[key] for key in tiny.config} == tiny.config


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_a_pipeline_folder_says_how_it_calls_its_transformers(tmp_path: Path) -> None:
    known = presets.find("ti2v-5b")
    config = {"_class_name": "WanTransformer3DModel", **known.config}
    folder = write(
        tmp_path / "pipeline",
        transformer__config=config,
        transformer_2__config=config,
        model_index={"expand_timesteps": True},
    )
    for path in (folder, folder / "transformer"):
        found = presets.from_folder(path)
        assert found.name == path.name
        assert (found.per_token_timestep, found.experts) == (True, 2)
        assert found.latent == known.latent


# Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [("i2v-14", "did you mean i2v-14b"), ("flux", "there are t2v-1.3b, t2v-14b")],
)
def test_an_unknown_name_lists_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=f"no preset '{name}': {hint}"):
        presets.find(name)


def test_names_have_no_case() -> None:
    assert presets.find("T2V-1.3B") is presets.find("t2v-1.3b")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_layers": 2}, "names no class, not one of WanTransformer3DModel"),
        ({"_class_name": "FluxTransformer2DModel"}, "is of the class FluxTransformer2DModel"),
        ({"_class_name": "WanTransformer3DModel", "layers": 2}, "does not take the configuration"),
    ],
)
def test_a_configuration_of_something_else_is_refused(
    config: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        presets.build(config)


def test_latents_that_do_not_divide_into_patches_are_refused() -> None:
    with pytest.raises(InputError, match="latents of 5x7x8 do not divide into patches of 1x2x2"):
        presets.example_inputs(presets.find("t2v-1.3b"), latent=(5, 7, 8))


def test_animate_needs_whole_intervals_and_a_frame_beside_the_reference() -> None:
    found = presets.find("animate-14b")
    with pytest.raises(InputError, match="take a multiple of 5, or fewer"):
        presets.build(found, layers=7)
    with pytest.raises(InputError, match="at least 2 latent frames"):
        presets.example_inputs(found, frames=1)


def test_a_class_that_diffusers_lacks_is_named() -> None:
    with pytest.raises(InputError, match="'Wan3' is not a Wan transformer"):
        presets.build(replace(presets.find("t2v-1.3b"), factory="Wan3"))


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has neither transformer/config"):
        presets.from_folder(tmp_path)
    write(tmp_path, config=[1])
    with pytest.raises(InputError, match=r"config\.json holds no JSON object"):
        presets.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        presets.from_folder(tmp_path)


def test_weights_that_are_missing_or_do_not_fit_are_named(
    saved: Callable[..., tuple[Any, Path]],
) -> None:
    model, folder = saved("t2v-1.3b")
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = dict(model.state_dict())
    bias = weights.pop("proj_out.bias")
    save_file(weights, file)
    with pytest.raises(InputError, match=r"no weights for proj_out\.bias \(of 1 missing\)"):
        presets.load(folder)
    save_file({**weights, "proj_out.bias": bias[:3].clone()}, file)
    with pytest.raises(InputError, match=r"(?s)do not fit its config\.json.*proj_out\.bias"):
        presets.load(folder)
    file.write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot be read"):
        presets.load(folder)
    file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        presets.load(folder)
