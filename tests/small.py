"""Tiny networks, and weights, that the tests share."""

import torch
from safetensors.torch import save_file

import dit
import models
import uvit


def tiny_dit(seed=0, **changes):
    """A frozen DiT with 16 tokens and 6 branches, of which every parameter is drawn N(0, 0.15^2).
    No gate is zero, as it is in a freshly initialised network, so that every branch acts; the
    output is of order 1. `changes` are arguments of dit.DiT."""
    sizes = dict(
        input_size=8, patch_size=2, in_channels=2, hidden_size=32, depth=3, num_heads=2,
        num_classes=5, learn_sigma=True,
    )
    network = dit.DiT(**{**sizes, **changes})
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return network.eval().requires_grad_(False)


def tiny_uvit(seed=0, **changes):
    """A frozen U-ViT with 18 tokens and 10 branches, drawn likewise. `changes` are arguments of
    uvit.UViT."""
    sizes = dict(img_size=8, patch_size=2, in_chans=2, embed_dim=32, depth=4, num_heads=2,
                 num_classes=6, conv=True)
    network = uvit.UViT(**{**sizes, **changes})
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return network.eval().requires_grad_(False)


def digits_weights(folder):
    """A file in `folder` with random weights of the digits network: its path."""
    network = dit.DiT(**dit.SIZES["digits"])
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.08, generator=generator)
    path = folder / "digits.safetensors"
    save_file(network.state_dict(), path)
    return path


def tiny_model(seed=0):
    """The same, as a model to sample and train with."""
    return models.Model("tiny", tiny_dit(seed), "ddim", steps=4, guidance=1.5)
