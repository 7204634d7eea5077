"""Flow matching (Lipman et al. 2023): the objective, and the loop that minimizes it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

from training import digits
from wancompile.demo.conditions import TEMPLATES, image_states, prompt, text_states
from wancompile.demo.sampler import first_frame_channels

_DROPPED = 0.1  # share of the videos whose prompt is left out, for classifier-free guidance
_SHIFT = 3.0  # of the noise levels, as when sampling


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    batch: int = 128
    rate: float = 1e-3
    warmup: int = 200
    average: float = 0.999
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Return the learning rate: linear warm-up, then half a cosine down to 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * 0.5 * (1 + math.cos(math.pi * share))


class Batches:
    """Noisy videos with what the model is told of them, and the flow it has to predict."""

    def __init__(self, size: int, with_image: bool, device: torch.device, seed: int) -> None:
        self._glyphs = digits.split()[0].to(device)
        self._generator = torch.Generator(device).manual_seed(seed)
        self._size, self._with_image = size, with_image
        texts = [prompt(d, t) for d in range(10) for t in range(len(TEMPLATES))]
        self._texts = text_states([*texts, ""]).to(device)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            videos, labels = digits.videos(self._glyphs, self._size, self._generator)
            noise = torch.randn(videos.shape, generator=self._generator, device=videos.device)
            level = self._levels(videos.device)
            mixed = torch.lerp(videos, noise, level[:, None, None, None, None])
            yield self._call(mixed, videos[:, :, 0], level, labels), noise - videos

    def _levels(self, device: torch.device) -> Tensor:
        """Draw logit-normal noise levels (Esser et al. 2024) and shift them."""
        level = torch.randn(self._size, generator=self._generator, device=device).sigmoid()
        return _SHIFT * level / (1 + (_SHIFT - 1) * level)

    def _call(
        self, mixed: Tensor, first: Tensor, level: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        def draw(high: int) -> Tensor:
            size = (self._size,)
            return torch.randint(high, size, generator=self._generator, device=mixed.device)

        text = labels * len(TEMPLATES) + draw(len(TEMPLATES))
        text = torch.where(draw(1000) < 1000 * _DROPPED, len(self._texts) - 1, text)
        call = {
            "hidden_states": mixed,
            "timestep": 1000 * level,
            "encoder_hidden_states": self._texts[text],
        }
        if self._with_image:
            call["hidden_states"] = torch.cat([mixed, first_frame_channels(first)], 1)
            call["encoder_hidden_states_image"] = image_states(first)
        return call


def train(model: WanTransformer3DModel, batches: Batches, schedule: Schedule) -> dict[str, Tensor]:
    """Train `model` in place and return the running average of its weights, which is better."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.99), fused=device.type == "cuda"
    )
    averages = {name: one.detach().clone() for name, one in model.state_dict().items()}
    run = torch.compile(model) if device.type == "cuda" else model
    losses = torch.zeros(100, device=device)
    started = time.perf_counter()
    for step, (call, flow) in zip(range(schedule.steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = run(**call, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), flow)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _average(averages, model, min(schedule.average, (step + 1) / (step + 10)))
        losses[step % len(losses)] = loss.detach()
        if (step + 1) % 500 == 0 or step + 1 == schedule.steps:
            mean = float(losses[: step + 1].mean())
            seconds = time.perf_counter() - started
            print(json.dumps({"step": step + 1, "loss": round(mean, 5), "seconds": round(seconds)}))
    return averages


@torch.no_grad()
def _average(averages: dict[str, Tensor], model: torch.nn.Module, keep: float) -> None:
    names = [name for name, one in averages.items() if one.is_floating_point()]
    state = model.state_dict()
    torch._foreach_lerp_([averages[n] for n in names], [state[n] for n in names], 1 - keep)
