"""LoRAs beside 8-bit weights: loaded, weighed, merged. On a small model with random weights.

python examples/lora.py
"""

from __future__ import annotations

import torch
from torch import Tensor

import wancompile
from wancompile import presets

RANK = 4


def main() -> None:
    """Compile, then add a LoRA in three ways, and print how far each moves the output."""
    torch.manual_seed(0)
    preset = presets.truncated(presets.tiny(presets.find("t2v-14b")), 1)
    model = presets.build(preset, device="cpu", dtype=torch.float32)
    call = presets.example_inputs(preset, device="cpu", dtype=torch.float32)
    compiled = wancompile.compile(model, [call], recipe="int8")
    plain = compiled(**call).sample

    def tell(what: str) -> None:
        moved = (compiled(**call).sample - plain).norm() / plain.norm()
        print(f"{what:<12} {float(moved):.2%}")

    # In place of the dict, the path of a safetensors file: diffusers, PEFT, ComfyUI or Kohya.
    lora = random_lora(model)
    compiled.load_lora(lora, name="style", scale=0.8)
    tell("scale 0.8")
    compiled.set_lora({"style": 0.4})  # numbers are copied, nothing is compiled again
    tell("scale 0.4")
    compiled.unload_lora("style")
    tell("unloaded")

    # For good, at no cost in each call; from the original weights, which are rounded once.
    compiled.merge_lora(lora, scale=0.8, reference=model)
    tell("merged")


def random_lora(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return a LoRA for values and output of self-attention, in the names of diffusers."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith(("attn1.to_v", "attn1.to_out.0")):
            rows, columns = module.weight.shape
            found[f"transformer.{name}.lora_A.weight"] = torch.randn(RANK, columns) / columns**0.5
            found[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, RANK) / RANK**0.5
    return found


if __name__ == "__main__":
    main()
