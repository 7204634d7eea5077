"""Whole diffusers pipelines in miniature, made from configurations alone, with random weights.

Every part is the real class: tokenizer, UMT5 text encoder, CLIP image encoder, VAE, scheduler and
transformers, these of the sizes of `zoo`. Videos are 5 frames of 32 x 32 pixels, or 4 tokens a
frame. `pipe.save_pretrained` and `from_pretrained` work on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
import zoo
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

SIZE = 32
WORDS = ("a", "an", "the", "cat", "dog", "bird", "runs", "sings", "red", "blue", "slowly", "bad")
PROMPTS = ("a red cat runs", "the blue bird sings slowly", "a dog")


@dataclass(frozen=True)
class Kind:
    """A pipeline class, the transformer that goes into it, and whether it has two of them."""

    pipeline: str
    variant: str
    experts: int = 1
    boundary: float | None = None
    per_token: bool = False


KINDS: Mapping[str, Kind] = {
    "t2v": Kind("WanPipeline", "t2v"),
    "t2v22": Kind("WanPipeline", "t2v", experts=2, boundary=0.875),
    "ti2v": Kind("WanPipeline", "ti2v", per_token=True),
    "i2v": Kind("WanImageToVideoPipeline", "i2v"),
    "i2v22": Kind("WanImageToVideoPipeline", "i2v22", experts=2, boundary=0.9),
    "ti2v_image": Kind("WanImageToVideoPipeline", "ti2v", per_token=True),
    "vace": Kind("WanVACEPipeline", "vace"),
    "animate": Kind("WanAnimatePipeline", "animate"),
    "v2v": Kind("WanVideoToVideoPipeline", "t2v"),
}


def make(kind: str, layers: int = 1, *, scheduler: Any = None) -> Any:
    """Return the pipeline, silent, the same for the same arguments."""
    chosen = KINDS[kind]
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "tokenizer": tokenizer(),
        "text_encoder": text_encoder(),
        "vae": vae(48 if chosen.variant == "ti2v" else 16),
        "scheduler": scheduler
        or diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "transformer": transformer(chosen.variant, layers),
    }
    if chosen.pipeline != "WanVideoToVideoPipeline" and chosen.variant != "animate":
        second = transformer(chosen.variant, layers, seed=1) if chosen.experts == 2 else None
        parts.update(transformer_2=second, boundary_ratio=chosen.boundary)
    if chosen.per_token:
        parts["expand_timesteps"] = True
    if chosen.variant in ("i2v", "animate"):
        parts.update(image_encoder=image_encoder(), image_processor=image_processor())
    pipe = getattr(diffusers, chosen.pipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(
    kind: str, prompt: str = PROMPTS[0], *, steps: int = 2, seed: int = 0
) -> dict[str, Any]:
    """Return what the pipeline is called with, up to its latents or, for Animate, its frames."""
    chosen = KINDS[kind]
    found: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": "bad",
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    if chosen.pipeline == "WanVideoToVideoPipeline":
        return {**found, "video": frames(5, seed), "strength": 1.0}
    if chosen.variant == "animate":
        found.update(segment_frame_length=5, output_type="pt", motion_encode_batch_size=16)
        faces = frames(5, seed + 2, size=16)
        return {
            **found,
            "image": picture(seed),
            "pose_video": frames(5, seed + 1),
            "face_video": faces,
        }
    found["num_frames"] = 5
    if chosen.pipeline == "WanImageToVideoPipeline":
        found["image"] = picture(seed)
    return found


def run(pipe: Any, asked: Mapping[str, Any]) -> Tensor:
    """Return the latents, or the frames, that the pipeline makes."""
    made = pipe(**asked).frames
    return torch.as_tensor(made)


def picture(seed: int, size: int = SIZE) -> Image.Image:
    """A random picture."""
    noise = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def frames(count: int, seed: int, size: int = SIZE) -> list[Image.Image]:
    """Random pictures."""
    return [picture(100 * seed + index, size) for index in range(count)]


# Parts -----------------------------------------------------------------------------------------


def transformer(variant: str, layers: int, seed: int = 0) -> nn.Module:
    """A transformer of `zoo`."""
    model, _ = zoo.make(variant, layers, seed=seed)
    return model


def tokenizer() -> Any:
    """A tokenizer of whole words, that ends a text with `</s>` as that of T5 does."""
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def text_encoder() -> nn.Module:
    """One layer of UMT5, as wide as the transformers' text."""
    config = transformers.UMT5Config(
        vocab_size=3 + len(WORDS), d_model=40, d_kv=10, d_ff=48, num_layers=1, num_heads=4
    )
    return transformers.UMT5EncoderModel(config).eval()


def vae(channels: int) -> nn.Module:
    """A VAE of few channels that shrinks pictures 8 times and time 4 times."""
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * channels,
        latents_std=[0.9] * channels,
    ).eval()


def image_encoder() -> nn.Module:
    """CLIP for pictures of 4 x 4 pixels, as wide as the transformers' images."""
    config = transformers.CLIPVisionConfig(
        hidden_size=28,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4,
        patch_size=2,
    )
    return transformers.CLIPVisionModel(config).eval()


def image_processor() -> Any:
    """What makes a picture 4 x 4 pixels."""
    return transformers.CLIPImageProcessor(
        size={"height": 4, "width": 4}, crop_size={"height": 4, "width": 4}
    )
