"""A diffusers pipeline in 8 bits: compiled, saved, and loaded again without its originals.

python examples/pipeline.py path/to/Wan2.1-T2V-1.3B-Diffusers wan-int8 --device cuda
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline

import wancompile
from wancompile import presets

# A few of the kind that will be asked for; ten are better than these two.
PROMPTS = ("a red cat runs over a lawn", "the blue bird sings slowly")


def main() -> None:
    """Compile the pipeline in a folder, save it, and make a video with what was saved."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a diffusers pipeline")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    size = {"num_frames": args.frames, "height": args.height, "width": args.width}
    asked = [{"prompt": one, "num_inference_steps": args.steps, **size} for one in PROMPTS]

    # `from_pretrained` reads them, too, where accelerate is installed.
    paths = [args.folder / name for name in ("transformer", "transformer_2")]
    experts = {path.name: presets.load(path) for path in paths if path.is_dir()}

    # Today: weights stay on the host and come to the device while it computes.
    pipe = WanPipeline.from_pretrained(args.folder, torch_dtype=torch.bfloat16, **experts)
    compiled = wancompile.compile(pipe, asked, recipe="int8", device=args.device, progress=True)
    compiled.save(args.out)
    print(compiled.report)

    # Tomorrow: neither the originals nor any calibration.
    none: dict[str, Any] = dict.fromkeys(compiled.experts)
    pipe = WanPipeline.from_pretrained(args.folder, torch_dtype=torch.bfloat16, **none)
    wancompile.load(args.out, device=args.device).attach(pipe)
    pipe.to(args.device)
    video = pipe(**asked[0], output_type="np").frames[0]
    print(f"a video of {video.shape} by a {type(pipe.transformer).__name__}")


if __name__ == "__main__":
    main()
