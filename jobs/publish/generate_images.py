"""Draws images with the model in this folder; needs torch, safetensors and denoising-diffusion-pytorch alone.

python generate.py --num-samples 16 writes generated.npz (arr_0: uint8 [n, height, width, channels]; arr_1: classes,
if the model has some) and a picture.
"""

# SPDX-License-Identifier: MIT

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from denoising_diffusion_pytorch import classifier_free_guidance as with_classes
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import save_image

from diffusion.images.pixels import to_pixels, unscaled
from diffusion.images.unet import with_fast_layers
from diffusion.process.schedules import alphas_cumprod_at
from jobs.publish.drawing import arguments, draw, exact_numerics, save

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    asked, config = arguments(FOLDER)
    exact_numerics(config["precision"])
    settings, diffusion = config["model"], config["diffusion"]
    channels, height, width = config["sample_shape"]
    patch = settings["patch_size"]
    mults, num_classes = tuple(settings["dim_mults"]), config["num_classes"]

    def network() -> Unet | with_classes.Unet:
        if num_classes:
            return with_classes.Unet(settings["dim"], num_classes, dim_mults=mults, channels=channels * patch**2)
        # 4 is the library's default, with which runs without this setting were trained.
        heads = tuple(settings["attn_heads"] or [4] * len(mults))
        return Unet(settings["dim"], dim_mults=mults, channels=channels * patch**2, attn_heads=heads)

    process = with_classes.GaussianDiffusion if num_classes else GaussianDiffusion
    # Made for its noise levels alone, which must be those of the training to the last bit; `draw` does the rest.
    abar = process(
        network(),
        image_size=(height // patch, width // patch),
        timesteps=diffusion["timesteps"],
        objective="pred_noise",
        beta_schedule=diffusion["beta_schedule"],
    ).alphas_cumprod.to(asked.device)

    def load(name: str) -> Callable[..., Tensor]:
        # The weights fit the library's own network, too; these layers compute the same, rounded as in training.
        unet = with_fast_layers(network())
        unet.load_state_dict(load_file(FOLDER / name))
        unet.to(asked.device, memory_format=torch.channels_last).eval()
        return partial(predict, unet)

    def predict(unet: nn.Module, xt: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        """eps of xt [batch, channels, height, width]; patch x patch pixels are channels of the network."""
        told = {}
        if classes is not None:  # num_classes stands for no class; the network takes one that exists, and a mask
            told = {"classes": classes.clamp(max=num_classes - 1), "cond_keep_mask": classes < num_classes}
        out = F.pixel_shuffle(unet(F.pixel_unshuffle(xt, patch), t, **told), patch)
        if not settings["noise_skip"]:
            return out
        a = alphas_cumprod_at(abar, t).float().view(-1, 1, 1, 1)
        return (1 - a).sqrt() * xt + a.sqrt() * out.float()

    x0 = draw(load, abar, (-1.0, 1.0), config, asked)
    images = unscaled(x0)
    save(images, asked)
    save_image(to_pixels(images[:64]), asked.out.with_suffix(".png"))
    print(f"{len(images)} samples are in {asked.out}, the first {len(images[:64])} in {asked.out.with_suffix('.png')}.")


if __name__ == "__main__":
    main()
