"""Train one of the small Wans that ship with the package, from nothing, in minutes on one GPU.

    python -m training.train t2v --out wancompile/demo/weights/t2v
    python -m training.train i2v --out wancompile/demo/weights/i2v

Needs scikit-learn for its handwritten digits. Prints a line of JSON per 500 steps, and at the end
how many of 100 generated videos the classifier names right.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from training import digits
from training.classifier import Classifier
from training.flow import Batches, Schedule, train
from wancompile import presets
from wancompile.demo.conditions import IMAGE_DIM, TEXT_DIM, prompt
from wancompile.demo.sampler import Request, sample

_WIDTH = 256
_COMMON: Mapping[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "out_channels": 1,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 4 * _WIDTH,
    "num_layers": 6,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "t2v": {**_COMMON, "in_channels": 1},
    # Wan 2.1 I2V: the noisy video, which frames are given, and those that are, as channels; image
    # states besides, with projections of their own.
    "i2v": {**_COMMON, "in_channels": 3, "image_dim": IMAGE_DIM, "added_kv_proj_dim": _WIDTH},
}


def request(name: str, count: int, seed: int = 0) -> tuple[Request, torch.Tensor]:
    """Return a request for `count` videos, digit after digit, and the digits asked for.

    First frames show digits that nothing was trained on.
    """
    labels = torch.arange(count) % 10
    frames = _first_frames(labels, seed) if name == "i2v" else None
    return Request(tuple(prompt(int(d)) for d in labels), frames, seed=seed), labels


def _first_frames(labels: torch.Tensor, seed: int) -> torch.Tensor:
    _, held_out = digits.split()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for label in labels:
        of_label = (held_out.labels == label).nonzero().flatten()
        pick = of_label[int(torch.randint(len(of_label), (1,), generator=generator))]
        corner = (digits.SIZE - digits.GLYPH) * torch.rand(1, 2, generator=generator)
        found.append(digits.paint(held_out.images[pick][None], corner))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=CONFIGS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    model = WanTransformer3DModel(**CONFIGS[options.name]).to(device)
    batches = Batches(options.batch, options.name == "i2v", device, options.seed)
    schedule = Schedule(options.steps, options.batch)
    model.load_state_dict(train(model, batches, schedule))
    model.to(torch.bfloat16).save_pretrained(options.out)
    trained = presets.load(options.out, dtype=torch.float32)
    asked, labels = request(options.name, 100, seed=1000)
    videos = sample(trained.to(device), asked)
    accuracy = Classifier().accuracy(videos, labels)
    print(json.dumps({"model": options.name, "recognised": accuracy, "of": len(labels)}))


if __name__ == "__main__":
    main()
