"""Draws numbers with the model in this folder; needs torch, safetensors and numpy alone.

python generate.py --num-samples 16 writes generated.npz (arr_0: float32 [n]; arr_1: classes, if it has some).
"""

# SPDX-License-Identifier: MIT

from pathlib import Path

from safetensors.torch import load_file

from diffusion.gaussian1d.mlp import Mlp
from diffusion.process.schedules import alphas_cumprod
from jobs.publish.drawing import arguments, draw, exact_numerics, save

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    asked, config = arguments(FOLDER)
    exact_numerics(config["precision"])
    settings, diffusion = config["model"], config["diffusion"]

    def load(name: str) -> Mlp:
        network = Mlp(settings["dim"], settings["layers"], diffusion["timesteps"], config["num_classes"])
        network.load_state_dict(load_file(FOLDER / name))
        return network.to(asked.device).eval()

    abar = alphas_cumprod(diffusion["beta_schedule"], diffusion["timesteps"])
    x0 = draw(load, abar, None, config, asked)
    save(x0[:, 0].float().cpu().numpy(), asked)
    print(f"{len(x0)} samples are in {asked.out}.")


if __name__ == "__main__":
    main()
