"""Exported files, read by readers that were written from the notes on each format alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file
from torch import Tensor, nn

import wancompile
from wancompile import interchange, presets
from wancompile.cli import main
from wancompile.compiled import CompiledModel
from wancompile.errors import ArtifactError, InputError
from wancompile.interchange.names import original, wholes
from wancompile.pipeline import relative_error

# Fused projections in int8 with folded smooth scales, weights of bf16 in e4m3, and a model whose
# modulation tables become something else. All are rounded to nearest, as their errors are bounded
# weight by weight: GPTQ gives some of that up for the error of the output.
NEAREST = wancompile.Recipe("int8, to nearest", wancompile.QSpec("int8"))
MODELS = {"fused_i2v": NEAREST, "t2v": "fp8", "ti2v": "fp8"}
RESTORED = {"fused_i2v": 0.014, "t2v": 0.04, "ti2v": 0.04}


@cache
def original_of(variant: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model as a checkpoint has it, and one call."""
    dtype = torch.bfloat16 if variant == "t2v" else torch.float32
    return zoo.make(variant.removeprefix("fused_"), 1, dtype=dtype)


@cache
def compiled(variant: str) -> CompiledModel:
    model, call = original_of(variant)
    if variant.startswith("fused_"):
        model = zoo.make(variant, 1)[0]
        return wancompile.compile(model, [call], MODELS[variant], limits=None)
    return wancompile.compile(model, recipe="fp8", example_inputs=call, limits=None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return where a model was written in a format, once."""
    folder = tmp_path_factory.mktemp("written")

    @cache
    def at(variant: str, format: str) -> Path:
        originals = original_of(variant)[0] if variant == "ti2v" else None
        return interchange.write(
            compiled(variant), folder / f"{variant}-{format}", format, originals=originals
        ).path

    return at


def output(model: nn.Module, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**call, return_dict=False)[0]


def linears_in_groups(variant: str) -> set[str]:
    """Return the weights that are in 8 bits, by the names that they have in a checkpoint."""
    members = (
        m for _, group in zoo.expected_table(variant.removeprefix("fused_"), 1) for m in group
    )
    return {f"{member}.weight" for member in members}


# diffusers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", MODELS)
def test_diffusers_has_the_weights_as_they_were_before_smoothing(
    variant: str, saved: Callable[[str, str], Path]
) -> None:
    model, call = original_of(variant)
    again = presets.load(saved(variant, "diffusers"), dtype=compiled(variant).dtype)
    theirs, ours = model.state_dict(), again.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }
    eight = linears_in_groups(variant)
    for name, tensor in ours.items():
        error = relative_error(tensor, theirs[name])
        if name in eight:
            assert 1e-4 < error < RESTORED[variant], name
        elif variant == "t2v":
            assert torch.equal(tensor, theirs[name]), name
        else:  # multiplied by a smooth scale and by its reciprocal, in fp32
            assert error < 2e-7, name
    # What is left of the error when activations are not rounded.
    expected = output(model, call).float()
    whole = relative_error(output(compiled(variant), call).float(), expected)
    assert relative_error(output(again, call).float(), expected) < 1.05 * whole


def test_what_diffusers_itself_reads(saved: Callable[[str, str], Path]) -> None:
    folder = saved("fused_i2v", "diffusers")
    model = type(original_of("fused_i2v")[0]).from_pretrained(folder)
    assert torch.equal(
        model.blocks[0].attn1.to_q.weight,
        load_file(folder / "diffusion_pytorch_model.safetensors")["blocks.0.attn1.to_q.weight"],
    )


# ModelOpt -----------------------------------------------------------------------------------------


def read_modelopt(folder: Path) -> tuple[dict[str, Tensor], set[str], dict[str, Any]]:
    """Return dequantised weights, which of them were in e4m3, and the quantization's facts."""
    config = json.loads((folder / "hf_quant_config.json").read_text())
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    scales = {n: stored.pop(n) for n in list(stored) if n.endswith(".weight_scale")}
    eight = {n for n, t in stored.items() if t.dtype == torch.float8_e4m3fn}
    assert {f"{n}_scale" for n in eight} == set(scales)
    for name in eight:
        scale = scales[f"{name}_scale"]
        assert (scale.dtype, scale.shape) == (torch.float32, stored[name].shape[:1])
        stored[name] = stored[name].float() * scale[:, None]
    return stored, eight, config


def assert_rounded_to_e4m3(actual: Tensor, exact: Tensor, scale: Tensor) -> None:
    """Three bits of mantissa: half a step is a 16th of the number, or 2^-10 of the scale."""
    bound = torch.maximum(exact.abs() / 16, scale * 2**-10) * (1 + 1e-5)
    assert bool(((actual - exact).abs() <= bound).all())


@pytest.mark.parametrize("variant", MODELS)
def test_modelopt_has_e4m3_per_channel(variant: str, saved: Callable[[str, str], Path]) -> None:
    folder = saved(variant, "modelopt")
    found, eight, facts = read_modelopt(folder)
    exact = load_file(saved(variant, "diffusers") / "diffusion_pytorch_model.safetensors")
    assert found.keys() == exact.keys()
    assert eight == linears_in_groups(variant)
    for name in found.keys() - eight:
        assert torch.equal(found[name], exact[name])
    for name in eight:
        if MODELS[variant] == "fp8":  # nothing was smoothed: the bits of the compiled model
            assert torch.equal(found[name].to(exact[name].dtype), exact[name])
            continue
        scale = exact[name].abs().amax(1, keepdim=True) / 448
        assert_rounded_to_e4m3(found[name], exact[name], scale)
    assert facts["quantization"]["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"
    excluded = set(facts["quantization"]["exclude_modules"])
    assert "proj_out" in excluded
    assert not excluded & {name.removesuffix(".weight") for name in eight}
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == "WanTransformer3DModel"
    assert config["quantization_config"]["quant_method"] == "modelopt"
    assert set(config["quantization_config"]["ignore"]) == excluded


# ComfyUI ------------------------------------------------------------------------------------------


def read_comfyui(file: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return dequantised weights under diffusers' names, and the scales under the original ones."""
    stored = load_file(file)
    marker = stored.pop("scaled_fp8")
    assert (marker.dtype, marker.numel()) == (torch.float8_e4m3fn, 2)
    scales = {n: stored.pop(n) for n in list(stored) if n.endswith(".scale_weight")}
    for name, scale in scales.items():
        assert (scale.dtype, scale.dim()) == (torch.float32, 0)
        weight = name.removesuffix("scale_weight") + "weight"
        assert stored[weight].dtype == torch.float8_e4m3fn
        stored[weight] = stored[weight].float() * scale
    assert all(tensor.dtype != torch.float8_e4m3fn for tensor in stored.values())
    return convert_wan_transformer_to_diffusers(stored), {n: float(s) for n, s in scales.items()}


@pytest.mark.parametrize("variant", MODELS)
def test_comfyui_has_e4m3_per_tensor(variant: str, saved: Callable[[str, str], Path]) -> None:
    found, scales = read_comfyui(saved(variant, "comfyui-scaled-fp8"))
    exact = load_file(saved(variant, "diffusers") / "diffusion_pytorch_model.safetensors")
    assert found.keys() == exact.keys()
    eight = linears_in_groups(variant)
    assert len(scales) == len(eight)
    assert {"blocks.0.self_attn.q.scale_weight", "blocks.0.ffn.2.scale_weight"} <= scales.keys()
    for name in found.keys() - eight:
        assert torch.equal(found[name], exact[name])
    for name in eight:
        # The file is made of what is recovered in fp32; diffusers' is that in the model's type.
        slack = 2**-8 * exact[name].float().abs() if variant == "t2v" else 0
        scale = exact[name].float().abs().amax() / 448
        bound = torch.maximum(exact[name].float().abs() / 16, scale * 2**-10) * (1 + 1e-2) + slack
        assert bool(((found[name] - exact[name].float()).abs() <= bound).all())


@pytest.mark.parametrize("variant", ["t2v", "i2v", "flf2v", "vace", "animate"])
def test_every_name_is_the_one_that_diffusers_converts_back(variant: str) -> None:
    state = zoo.make(variant, 2)[0].state_dict()
    there: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        found = original(name)
        there.setdefault(found.name, []).append(
            tensor.reshape(found.shape) if found.shape else tensor
        )
    # diffusers leaves this one alone, which no converter of single files meets.
    emb = there.pop("img_emb.emb_pos", None)
    assert (emb is not None) == (variant == "flf2v")
    back = convert_wan_transformer_to_diffusers({n: torch.cat(t) for n, t in there.items()})
    state.pop("condition_embedder.image_embedder.pos_embed", None)
    assert back.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())


def test_a_name_that_no_rule_knows() -> None:
    with pytest.raises(ArtifactError, match=r"no name for blocks\.0\.gate\.weight"):
        original("blocks.0.gate.weight")
    assert list(wholes("a.to_k")) == [("a.to_qkv", 1, 3), ("a.to_kv", 0, 2)]


# What it cost, and what is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "kept", "low", "high"),
    [("diffusers", 0, 0, 1e-7), ("modelopt", 0, 0.02, 0.03), ("comfyui-scaled-fp8", 0, 0.02, 0.03)],
)
def test_the_summary_says_what_it_cost(
    format: str, kept: int, low: float, high: float, tmp_path: Path
) -> None:
    summary = interchange.write(compiled("fused_i2v"), tmp_path / "out", format)
    assert summary.errors.keys() == linears_in_groups("fused_i2v")
    assert len(summary.kept) == kept
    assert all(low <= error <= high for error in summary.errors.values())
    files = [tmp_path / "out"] if (tmp_path / "out").is_file() else (tmp_path / "out").iterdir()
    assert summary.nbytes == sum(file.stat().st_size for file in files)


def test_several_files_have_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wancompile.interchange.writer.SHARD_BYTES", 60_000)
    folder = interchange.write(compiled("fused_i2v"), tmp_path / "out", "diffusers").path
    assert len(list(folder.glob("*-of-*.safetensors"))) > 2
    again, theirs = presets.load(folder, dtype=torch.float32), original_of("fused_i2v")[0]
    assert relative_error(again.proj_out.weight, theirs.proj_out.weight) == 0


def test_what_cannot_be_had_back_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"scale_shift_table .* give the folder of the original"
    ):
        interchange.write(compiled("ti2v"), tmp_path / "out", "diffusers")
    stranger = zoo.make("t2v", 1, dtype=torch.bfloat16)[0].state_dict()
    stranger["proj_out.bias"] = torch.zeros(3)
    with pytest.raises(ArtifactError, match=r"proj_out.bias has the shape \[3\], not \[64\]"):
        interchange.write(compiled("t2v"), tmp_path / "out", "diffusers", originals=stranger)
    assert list(tmp_path.iterdir()) == []


def test_other_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled("t2v")
    with pytest.raises(InputError, match="no format 'gguf'; there are diffusers, modelopt"):
        interchange.write(model, tmp_path / "out", "gguf")
    with pytest.raises(InputError, match="exists already"):
        interchange.write(model, tmp_path, "diffusers")
    monkeypatch.setattr(model, "config", None)
    with pytest.raises(ArtifactError, match="no configuration of a Wan of diffusers"):
        interchange.write(model, tmp_path / "out", "diffusers")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", interchange.FORMATS)
def test_a_full_disk_leaves_nothing(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: dict[str, Tensor], path: str, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wancompile.interchange.writer.save_file", full)
    with pytest.raises(ArtifactError, match=r"cannot be written: .*No space left"):
        interchange.write(compiled("t2v"), tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


# The command ------------------------------------------------------------------------------------


def test_the_command_writes_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], saved: Callable[[str, str], Path]
) -> None:
    compiled("fused_i2v").save(tmp_path / "saved")
    out = tmp_path / "wan.safetensors"
    argv = ["export", str(tmp_path / "saved"), "--format", "comfyui-scaled-fp8", "--out", str(out)]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out}" in printed
    assert "12 weights that the compiled model has in 8 bits, 0 of them bit for bit" in printed
    assert "the others are off by 2." in printed
    # What is loaded is what was compiled.
    assert out.read_bytes() == saved("fused_i2v", "comfyui-scaled-fp8").read_bytes()
    assert main(argv) == 1
    assert "exists already" in capsys.readouterr().err


def test_the_command_takes_what_is_not_in_8_bits_from_the_original(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], saved: Callable[[str, str], Path]
) -> None:
    compiled("ti2v").save(tmp_path / "saved")
    argv = ["export", str(tmp_path / "saved"), "--format", "modelopt"]
    assert main([*argv, "--out", str(tmp_path / "a")]) == 1
    assert "give the folder of the original" in capsys.readouterr().err
    original_of("ti2v")[0].save_pretrained(tmp_path / "transformer")
    assert main([*argv, "--out", str(tmp_path / "b"), "--original", str(tmp_path)]) == 0
    assert "10 of them bit for bit" in capsys.readouterr().out
    file = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "b" / file).read_bytes() == (saved("ti2v", "modelopt") / file).read_bytes()
    assert main([*argv, "--out", str(tmp_path / "c"), "--part", "transformer_2"]) == 1
    assert "there is one model without a name" in capsys.readouterr().err
