"""Every name that `--model` accepts, and what stands behind it: the network and its weights, the
shape that it denoises, and the sampler, steps and guidance that it is used with.

    model = models.load("digits")                    # shipped; "dit256" is downloaded on first use
    prediction = model.network(x, t, *model.network.condition(labels))
"""

import dataclasses
from pathlib import Path

import torch
from torch import nn

import command
import dit

SHIPPED = Path(__file__).parent / "checkpoints"
OFFICIAL_DIT = "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt"


@dataclasses.dataclass
class Model:
    """A network, ready for inference (frozen, in eval mode), and what it is used with."""

    name: str
    network: nn.Module
    sampler: str
    steps: int
    guidance: float
    latent: bool  # denoises latents, which an autoencoder turns into pictures, not pixels
    router: Path | None = None  # the shipped router for these settings

    @property
    def shape(self):
        """(C, H, W) of what the network denoises."""
        return self.network.in_channels, self.network.input_size, self.network.input_size

    @property
    def device(self):
        return self.network.pos_embed.device


def digits(weights):
    """This project's small DiT on the 28 x 28 pixels of handwritten digits, trained by
    experiments/pretrain.py."""
    network = dit.DiT(**dit.SIZES["digits"])
    weights = weights or SHIPPED / "digits_dit.safetensors"
    network.load_state_dict(dit.read_weights(weights, network))
    router = SHIPPED / "digits_router.safetensors"
    return Model("digits", network, "ddim", steps=20, guidance=2.5, latent=False, router=router)


def dit256(weights):
    """The official DiT-XL/2 on the 4 x 32 x 32 latents of 256 x 256 ImageNet pictures."""
    with torch.device("meta"):  # 2.7 GB that the weights replace at once
        network = dit.DiT(**dit.SIZES["XL/2"], input_size=32)
    state = dit.read_weights(weights or command.download(OFFICIAL_DIT), network)
    network.load_state_dict(state, assign=True)
    return Model("dit256", network, "ddim", steps=20, guidance=1.5, latent=True)


MODELS = {"digits": digits, "dit256": dit256}


def load(name, weights=None, device=None, dtype=None):
    """A model by name. `weights` is a file to use in place of the usual one; `device` is by default
    cuda if there is one; `dtype` is float32 (default), bfloat16 or float16.

    Raises ValueError for an unknown name, device or dtype, or weights that do not fit;
    FileNotFoundError or ConnectionError, which say what to do, if there are no weights.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name}: use {' or '.join(MODELS)}")
    dtype = str(dtype or "float32").removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"unknown dtype {dtype}: use float32, bfloat16 or float16")
    device = torch.device(find_device(device))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as the official code uses it
    model = MODELS[name](weights)
    model.network.eval().requires_grad_(False).to(device, getattr(torch, dtype))
    return model


def find_device(name=None):
    """`name`, or cuda if there is one, else cpu. Raises ValueError for one that is not there."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not (name.split(":")[0] == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"no device {name} here: use cpu, or cuda on a machine that has a GPU")
    return name
