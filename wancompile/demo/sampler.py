"""From a prompt, and a first frame where the model wants one, to a video.

T2V goes through diffusers' own `WanPipeline`. Its I2V pipeline insists on a video autoencoder, so
I2V drives the same scheduler here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from tqdm import tqdm

from wancompile.demo.conditions import image_states, text_states

FRAMES, SIZE = 9, 24
# WanPipeline counts in pixels of a video autoencoder; without one it takes these for its strides.
_STRIDE_TIME, _STRIDE_SPACE = 4, 8


@dataclass(frozen=True)
class Request:
    """Videos to make: one for each prompt.

    `first_frames [B, 1, 24, 24]` in [-1, 1] is for models that read images, None for the others.
    Video i is drawn from `seed + i`, so it does not depend on what else is asked for.
    """

    prompts: tuple[str, ...]
    first_frames: Tensor | None = None
    steps: int = 16
    guidance: float = 3.0
    seed: int = 0

    def noise(self) -> Tensor:
        """Return the `[B, 1, 9, 24, 24]` that sampling starts from."""
        generators = [
            torch.Generator().manual_seed(self.seed + index) for index in range(len(self.prompts))
        ]
        return torch.stack(
            [torch.randn(1, FRAMES, SIZE, SIZE, generator=one) for one in generators]
        )


def scheduler() -> UniPCMultistepScheduler:
    """Return Wan's scheduler: UniPC (Zhao et al. 2023) on a flow shifted towards noise."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def sample(model: Any, request: Request, *, progress: str = "") -> Tensor:
    """Return the videos `[B, 1, 9, 24, 24]` fp32 on the CPU, in [-1, 1].

    `progress` is the name of the progress bar; without one there is no bar.
    """
    draw = _sample_t2v if request.first_frames is None else _sample_i2v
    with torch.no_grad():
        return draw(model, request, progress).float().cpu().clamp(-1, 1)


def _sample_t2v(model: Any, request: Request, progress: str) -> Tensor:
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        pipe = WanPipeline(
            tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler(), transformer=model
        )
    finally:
        diffusers_logging.set_verbosity(verbosity)
    pipe.set_progress_bar_config(disable=not progress, desc=progress)
    videos: Tensor = pipe(
        prompt_embeds=text_states(request.prompts).to(model.device),
        negative_prompt_embeds=text_states([""] * len(request.prompts)).to(model.device),
        latents=request.noise().to(model.device),
        num_frames=(FRAMES - 1) * _STRIDE_TIME + 1,
        height=SIZE * _STRIDE_SPACE,
        width=SIZE * _STRIDE_SPACE,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        output_type="latent",
    ).frames
    return videos


def _sample_i2v(model: Any, request: Request, progress: str) -> Tensor:
    assert request.first_frames is not None
    device, dtype = model.device, model.dtype
    frames = request.first_frames.to(device)
    shared = {"encoder_hidden_states_image": image_states(frames).to(dtype), "return_dict": False}
    texts = [
        text_states(prompts).to(device, dtype)
        for prompts in (request.prompts, [""] * len(request.prompts))
    ]
    condition = first_frame_channels(frames)
    steps = scheduler()
    steps.set_timesteps(request.steps, device=device)
    videos = request.noise().to(device)
    for t in tqdm(steps.timesteps, disable=not progress, desc=progress):
        hidden = torch.cat([videos, condition], 1).to(dtype)
        timestep = t.expand(len(videos))
        asked, free = (
            model(hidden_states=hidden, timestep=timestep, encoder_hidden_states=text, **shared)[0]
            for text in texts
        )
        flow = free + request.guidance * (asked - free)
        videos = steps.step(flow, t, videos, return_dict=False)[0]
    return videos


def first_frame_channels(frames: Tensor) -> Tensor:
    """Return `[B, 2, 9, H, W]`: which frames are given, and those that are, after Wan 2.1 I2V."""
    given = torch.zeros(len(frames), 2, FRAMES, *frames.shape[-2:], device=frames.device)
    given[:, 0, 0] = 1
    given[:, 1, 0] = frames[:, 0]
    return given


def calls(model: Any, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Return the arguments of every call of `model.forward` while sampling: calibration data."""
    seen: list[dict[str, Any]] = []

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(dict(kwargs))

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        for request in requests:
            sample(model, request)
    finally:
        hook.remove()
    return seen
