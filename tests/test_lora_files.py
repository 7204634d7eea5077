"""How LoRAs are stored, and what is wrong with those that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable

import artifacts
import loras
import pytest
import torch
import zoo
from safetensors.torch import save_file
from torch import Tensor

from wancompile.compiled import CompiledModel
from wancompile.errors import LoraError
from wancompile.lora.adapter import Factors, parse
from wancompile.lora.files import read, split

RANK, WIDTH, HIDDEN = 4, 6, 10
ORIGINAL = {
    **{f"attn1.{ours}": f"self_attn.{theirs}" for ours, theirs in
       (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))},
    **{f"attn2.{ours}": f"cross_attn.{theirs}" for ours, theirs in
       (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))},
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}  # fmt: skip


def pairs(blocks: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        f"blocks.{block}.{name}": (torch.randn(RANK, WIDTH), torch.randn(HIDDEN, RANK))
        for block in range(blocks)
        for name in ORIGINAL
    }


def original_names(factors: loras.Factors, prefix: str, alpha: float) -> dict[str, Tensor]:
    """The same as the original Wan names it, A divided by the scale that alpha will stand for."""
    found = {}
    for path, (down, up) in factors.items():
        _, block, name = path.split(".", 2)
        stem = f"blocks.{block}.{ORIGINAL[name]}"
        stem = prefix + (stem.replace(".", "_") if prefix == "lora_unet_" else stem)
        found[f"{stem}.lora_down.weight"] = down
        found[f"{stem}.lora_up.weight"] = up
        found[f"{stem}.alpha"] = torch.tensor(alpha)
    return found


def effect(one: Factors) -> Tensor:
    return one.scale * (one.up.double() @ one.down.double())


def assert_same(found: dict[str, Factors], factors: loras.Factors, scale: float = 1.0) -> None:
    assert found.keys() == factors.keys()
    for path, (down, up) in factors.items():
        torch.testing.assert_close(effect(found[path]), scale * (up.double() @ down.double()))


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_", ""])
def test_names_and_alpha_of_the_original(prefix):
    factors = pairs()
    stored = original_names(factors, prefix, alpha=2.0)
    before = {name: tensor.clone() for name, tensor in stored.items()}
    assert_same(parse(read(stored)), factors, scale=2.0 / RANK)
    assert all(torch.equal(stored[name], before[name]) for name in before)


def test_biases_of_the_original_are_those_of_b():
    stored = original_names(pairs(), "diffusion_model.", 4.0)
    stored["diffusion_model.blocks.0.ffn.2.diff_b"] = shift = torch.randn(HIDDEN)
    stored["diffusion_model.blocks.0.norm3.diff"] = torch.zeros(WIDTH)
    assert torch.equal(parse(read(stored))["blocks.0.ffn.net.2"].bias, shift)


@pytest.mark.parametrize("name", ["norm3.diff", "norm3.diff_b", "self_attn.q.diff"])
def test_whole_differences_are_refused(name):
    stored = original_names(pairs(), "diffusion_model.", 4.0)
    stored[f"diffusion_model.blocks.0.{name}"] = torch.ones(WIDTH)
    with pytest.raises(LoraError, match=rf"blocks\.0\.{name} changes a parameter as a whole"):
        read(stored)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        (None, 1.0),
        ({"transformer.r": 4, "transformer.lora_alpha": 8}, 2.0),
        ({"transformer.lora_alpha": 8, "transformer.use_rslora": True}, 4.0),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn1.to_q": 2}}, 2.0),
    ],
)
def test_a_file_of_diffusers_with_its_settings(tmp_path, settings, scale):
    factors = pairs(1)
    metadata = {} if settings is None else {"lora_adapter_metadata": json.dumps(settings)}
    save_file(loras.as_peft(factors), tmp_path / "lora.safetensors", metadata)
    found = parse(read(tmp_path / "lora.safetensors"))
    exception = "blocks.0.attn1.to_q"
    if settings and "transformer.alpha_pattern" in settings:
        assert found.pop(exception).scale == 0.5
        factors.pop(exception)
    assert_same(found, factors, scale)


def test_names_of_peft():
    factors = pairs(1)
    stored = {
        name.replace("transformer.", "base_model.model.").replace("lora_A.", "lora_A.default."): one
        for name, one in loras.as_peft(factors).items()
    }
    assert_same(parse(read(stored)), factors)


def test_each_expert_gets_its_own():
    high, low = pairs(1), pairs(1)
    stored = loras.as_peft(high)
    stored |= {
        name.replace("transformer", "transformer_2"): t for name, t in loras.as_peft(low).items()
    }
    parts = split(stored)
    assert parts.keys() == {"transformer", "transformer_2"}
    assert_same(parse(parts["transformer"]), high)
    assert_same(parse(parts["transformer_2"]), low)


def test_what_names_no_part_is_for_none():
    high = pairs(1)
    bare = {name.removeprefix("transformer."): one for name, one in loras.as_peft(high).items()}
    for stored in (bare, original_names(high, "diffusion_model.", RANK)):
        ((part, found),) = split(stored).items()
        assert part == ""
        assert_same(parse(found), high)
    stored = {**loras.as_peft(high), "denoise.proj_out.lora_A.weight": torch.ones(RANK, WIDTH)}
    parts = split(stored, ["denoise", "transformer"])
    assert parts["denoise"].keys() == {"proj_out.lora_A.weight"}
    assert_same(parse(parts["transformer"]), high)


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    return artifacts.compiled("t2v", "int8")


@pytest.fixture(scope="module")
def lora() -> dict[str, Tensor]:
    return loras.as_peft(loras.random(zoo.make("t2v", layers=1)[0], RANK))


Q = "transformer.blocks.0.attn1.to_q"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda lora: {name.replace(old, new): tensor for name, tensor in lora.items()}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict], dict]:
    return lambda lora: {**lora, name: change(lora[name])}


def with_nan(tensor: Tensor) -> Tensor:
    return tensor.index_fill(0, torch.tensor([1]), float("nan"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed(A, lambda t: t[:, 1:]), r"of another model: .* is \[48, 48\] here"),
        (changed(B, lambda t: t[1:]), r"another model: .* and \[47, 48\] there"),
        (changed(A, lambda t: t[1:]), r"ranks of blocks\.0\.attn1\.to_q differ: A is \[3, 48\]"),
        (changed(A, with_nan), rf"{A} holds NaN or infinity"),
        (changed(A, lambda t: t[:, :, None]), r"is no linear: A is \[4, 48, 1\]"),
        (lambda lora: {k: t for k, t in lora.items() if k != B}, r"0\.attn1\.to_q has no B"),
        (lambda lora: {**lora, "other.weight": lora[A]}, r"other\.weight is no part of a LoRA"),
        (lambda lora: {**lora, f"{Q}.lora_A.bias": lora[A]}, r"only B may have a bias"),
        (lambda lora: {**lora, f"{Q}.lora_B.bias": lora[A][0][1:]}, r"the bias of .* is \[47\]"),
        (lambda lora: {**lora, A[12:]: lora[A]}, r"is there twice"),
        (lambda lora: {**lora, f"{Q}.dora_scale": lora[A]}, r"this is a DoRA"),
        (lambda lora: {**lora, A: 3}, r"to_q\.lora_A\.weight of the LoRA is a int, no tensor"),
        (lambda lora: {}, r"the LoRA is empty"),
        (renamed("blocks.0", "blocks.9"), r"10 of the 10 .* blocks\.9\.attn1\.to_q, .*nearest"),
        (renamed("attn2", "attn3"), r"4 of the 10 .* model: blocks\.0\.attn3\.to_q, "),
        (lambda lora: {"lora_unet_blocks_0_ffn_0.lora_up.weight": lora[B]}, r"cannot convert"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(model, lora, damage, message):
    with pytest.raises(LoraError, match=message):
        model.load_lora(damage(lora))
    with pytest.raises(LoraError, match=message):
        model.merge_lora(damage(lora))
    assert model.loras == {}


def test_the_nearest_names_come_with_those_that_match_nothing(model, lora):
    with pytest.raises(LoraError) as caught:
        model.load_lora(renamed("attn1.to_q", "attn1.to_qq")(lora))
    assert "1 of the 10 linears" in str(caught.value)
    assert "nearest to the first are blocks.0.attn1.to_q," in str(caught.value)


def test_what_is_not_in_the_model_may_be_left_out(model, lora):
    other = {**lora, **renamed("blocks.0", "blocks.7")(lora)}
    model.load_lora(other, strict=False)
    assert model.loras == {"default": 1.0}
    model.unload_lora("default")
    with pytest.raises(LoraError, match="10 of the 10"):
        model.load_lora(renamed("blocks.0", "blocks.7")(lora), strict=False)


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(b"not tensors")
    for name in ("lora.safetensors", "missing.safetensors"):
        with pytest.raises(LoraError, match="cannot be read as safetensors"):
            read(tmp_path / name)
