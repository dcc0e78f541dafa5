"""Every name that `--model` accepts, and what it stands for: the network and its weights, the shape
that it denoises, the text encoder, the autoencoder, and the usual sampler, steps and guidance.

    model = models.load("digits")                    # shipped; "dit256" is downloaded on first use
    prediction = model.network(x, t, *model.condition(labels))
    model = models.load("pixart256")
    condition = model.condition(["a red apple", "a house by the sea"])
"""

import dataclasses
import hashlib
from functools import partial
from pathlib import Path

import torch
from torch import nn

import command
import dit
import dpm_solver
import layout
import pixart
import samplers
import shipped
import text
import uvit
import vae
from hub import download as hugging_face

SHIPPED = Path(__file__).parent / "checkpoints"
OFFICIAL_DIT = "https://dl.fbaipublicfiles.com/DiT/models/"
CAPTIONS = Path("runs/captions.safetensors")  # where T5's features are kept
VAE_FILE = "diffusion_pytorch_model.safetensors"


NONE = object()  # in the place of weights: none are read


@dataclasses.dataclass
class Model:
    """A network, frozen and in eval mode, and what it is used with."""

    name: str
    network: nn.Module
    sampler: str
    steps: int
    guidance: float
    router: Path | None = None  # the shipped router for these settings
    text: str | None = None  # what reads its prompts, "t5" or "hashed"; None: it takes labels
    autoencoder: str | None = None  # its repository at Hugging Face; None: it denoises pixels
    scale: float = 1.0  # of the latents: the network denoises scale * latent
    size: tuple | None = None  # (H, W) of what it denoises, if not as in training
    clean: bool = False  # whether captions are cleaned before T5 reads them
    folder: Path | None = None  # the pipeline's, if its weights are from one of diffusers

    @property
    def shape(self):
        """(C, H, W) of what the network denoises."""
        side = self.network.input_size
        return self.network.in_channels, *(self.size or (side, side))

    @property
    def pixels(self):
        """(H, W) of the pictures."""
        factor = 8 if self.autoencoder else 1
        return tuple(factor * side for side in self.shape[1:])

    @property
    def device(self):
        return next(self.network.parameters()).device

    def to(self, device):
        """Moves the network. -> the model itself."""
        self.network.to(device)
        return self

    def resize(self, height=None, width=None):
        """From now on the pictures have height x width pixels; None leaves a side as it is.
        Raises ValueError for sides that do not divide, or a network of one size only."""
        if height is None and width is None:
            return
        factor = self.pixels[0] // self.shape[1]
        unit = factor * self.network.patch_size  # of pixels to a token
        height = self.pixels[0] if height is None else height
        width = self.pixels[1] if width is None else width
        if self.text is None:
            raise ValueError(f"{self.name} makes pictures of {self.pixels[0]} x {self.pixels[1]} "
                             "pixels only: leave --height and --width out")
        if min(height, width) < unit or height % unit or width % unit:
            raise ValueError(f"height and width must be multiples of {unit}, not {height}, {width}")
        self.size = height // factor, width // factor

    def part(self, name):
        """The folder that holds a part of its pipeline (vae, text_encoder), or None."""
        return self.folder if self.folder and (self.folder / name).is_dir() else None

    def prompts(self):
        """The default prompts, for sampling and for training its router; None if it takes
        labels."""
        if self.text is None:
            return None
        return shipped.emoji_prompts() if self.text == "hashed" else shipped.read_prompts()

    def items(self, count, prompts=None):
        """What `count` images show: labels in turn, or prompts in turn. -> a list."""
        choices = prompts or self.prompts() or range(self.network.num_classes)
        return [choices[j % len(choices)] for j in range(count)]

    def encode(self, prompts):
        """Caption features of B prompts and their mask, as `PixArt.condition` takes them."""
        tokens, channels = self.network.model_max_length, self.network.caption_channels
        if self.text == "hashed":
            return text.hashed_words(prompts, tokens, channels)
        return text.encode(prompts, model=self.t5, max_length=tokens, file=CAPTIONS,
                           clean=self.clean)

    @property
    def t5(self):
        """The text encoder of its pipeline, or else the usual one."""
        return self.part("text_encoder") or text.T5_XXL

    def prepare(self, items, device=None):
        """Checks prompts, and has T5 encode them into a file, where `condition` finds them. T5,
        several times as large as the network, is gone from the device afterwards. Raises ValueError
        for prompts that are no text and features of another width, and as `text.encode_each`."""
        for item in items if self.text else ():
            text.check(item)
        if self.text == "t5":
            tokens, channels = self.network.model_max_length, self.network.caption_channels
            each = text.encode_each(items, model=self.t5, max_length=tokens, device=device,
                                    file=CAPTIONS, clean=self.clean)
            if each and each[0].shape[-1] != channels:
                raise ValueError(f"{CAPTIONS} holds features of {each[0].shape[-1]} channels, "
                                 f"{self.name} reads {channels}: move it away")
            self.null_caption(device)

    def null_caption(self, device=None):
        """T5's features of the empty prompt, if the weights hold no null caption; else None."""
        if self.text == "hashed" or self.network.y_embedder.null is not None:
            return None
        tokens = self.network.model_max_length
        return text.null_caption(model=self.t5, max_length=tokens, device=device,
                                 file=CAPTIONS)

    def condition(self, items):
        """B labels, a tensor or a list, or B prompts -> the condition of a guided batch
        [items, null]: a tuple for 2 B rows. Raises ValueError for a label that does not exist."""
        if self.text is None:
            return self.network.condition(torch.as_tensor(items))
        size = self.pixels if self.network.micro_conditions else None
        return self.network.condition(*self.encode(list(items)), size, self.null_caption())

    def fingerprint(self):
        """A text that changes with the weights: of the first 64 numbers of each tensor, which
        training moves, like all others. (Hashing all of DiT-XL/2 would take seconds.)"""
        digest = hashlib.sha256()
        for tensor in self.network.state_dict().values():
            digest.update(tensor.flatten()[:64].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def flops(self, steps, reused=None, guidance=None):
        """Arithmetic of one image in `steps` evaluations, in FLOP, both halves of the guided batch,
        or at a `guidance` of 1 the conditional half. `reused` (K,) says how often each branch is
        reused in that time."""
        branch_flops, other_flops = self.network.flops(*(self.size or ()))
        everything = steps * (sum(branch_flops) + other_flops)
        reused = reused or [0] * len(branch_flops)
        saved = sum(n * f for n, f in zip(reused, branch_flops, strict=True))
        return (1 if guidance == 1 else 2) * (everything - saved)


# ------------------------------------------------------------------------------------------------
# The models


def digits(weights):
    """This project's small DiT on the 28 x 28 pixels of handwritten digits, trained by
    experiments/pretrain.py."""
    network = dit.DiT(**dit.SIZES["digits"])
    fill(network, dit.read_weights, weights, lambda: SHIPPED / "digits_dit.safetensors")
    router = SHIPPED / "digits_router.safetensors"
    return Model("digits", network, "ddim", steps=20, guidance=2.5, router=router)


def emoji(weights):
    """This project's small PixArt on the 32 x 32 pixels of emoji, which it has memorised, trained
    by experiments/pretrain.py. Its prompts are hashed words."""
    network = pixart.PixArt(**pixart.SIZES["emoji"])
    fill(network, pixart.read_weights, weights, lambda: SHIPPED / "emoji_pixart.safetensors")
    router = SHIPPED / "emoji_router.safetensors"
    return Model("emoji", network, "dpm-solver++", steps=20, guidance=2.0, text="hashed",
                 router=router)


def official_dit(weights, size):
    """The official DiT-XL/2 on the latents of `size` x `size` ImageNet pictures."""
    network = bare_network(f"dit{size}")
    fill(network, dit.read_weights, weights,
         lambda: command.download(f"{OFFICIAL_DIT}DiT-XL-2-{size}x{size}.pt"))
    return Model(f"dit{size}", network, "ddim", steps=20, guidance=1.5,
                 autoencoder="stabilityai/sd-vae-ft-ema", scale=0.18215)


def official_pixart(weights, name):
    """An official PixArt, alpha or Sigma, by its name in PIXART."""
    size, file = PIXART[name]
    alpha = size.startswith("alpha")
    network = bare_network(name)
    repository = "PixArt-alpha/PixArt-alpha" if alpha else "PixArt-alpha/PixArt-Sigma"
    fill(network, pixart.read_weights, weights, lambda: hugging_face(repository, file))
    vae_name = "stabilityai/sd-vae-ft-ema" if alpha else "stabilityai/sdxl-vae"
    return Model(name, network, "dpm-solver++", steps=20, guidance=4.5, text="t5",
                 autoencoder=vae_name, scale=0.18215 if alpha else 0.13025, clean=alpha)


def official_uvit(weights, size):
    """The official U-ViT-H on the latents of `size` x `size` ImageNet pictures. Its code writes
    guidance as cond + s (cond - null): the published s of 0.4 (0.7 at 512) is 1.4 (1.7) here."""
    name = f"uvit{size}"
    network = bare_network(name)

    def usual():
        raise FileNotFoundError(f"{name} has no address for a program: fetch imagenet{size}_uvit_"
                                "huge.pth by hand, from the link in the README of "
                                "https://github.com/baofff/U-ViT, and name it by --weights")

    fill(network, uvit.read_weights, weights, usual)
    return Model(name, network, "dpm-solver-2s", steps=20, guidance=1.4 if size == 256 else 1.7,
                 autoencoder="stabilityai/sd-vae-ft-ema", scale=0.18215)


PIXART = {  # name: (pixart.SIZES, the file of the weights)
    "pixart256": ("alpha256", "PixArt-XL-2-256x256.pth"),
    "pixart512": ("alpha512", "PixArt-XL-2-512x512.pth"),
    "pixart1024": ("alpha1024", "PixArt-XL-2-1024-MS.pth"),
    "sigma256": ("sigma256", "PixArt-Sigma-XL-2-256x256.pth"),
    "sigma512": ("sigma512", "PixArt-Sigma-XL-2-512-MS.pth"),
    "sigma1024": ("sigma1024", "PixArt-Sigma-XL-2-1024-MS.pth"),
    "sigma2048": ("sigma2048", "PixArt-Sigma-XL-2-2K-MS.pth"),
}
UVIT = {"uvit256": "H/2", "uvit512": "H/4"}  # name: uvit.SIZES
MODELS = {  # name: weights -> Model
    "digits": digits,
    "emoji": emoji,
    "dit256": partial(official_dit, size=256),
    "dit512": partial(official_dit, size=512),
    **{name: partial(official_pixart, name=name) for name in PIXART},
    "uvit256": partial(official_uvit, size=256),
    "uvit512": partial(official_uvit, size=512),
}

NETWORKS = {  # name: (class, sizes by name, the name there, what differs)
    "digits": (dit.DiT, dit.SIZES, "digits", {}),
    "emoji": (pixart.PixArt, pixart.SIZES, "emoji", {}),
    "dit256": (dit.DiT, dit.SIZES, "XL/2", {"input_size": 32}),
    "dit512": (dit.DiT, dit.SIZES, "XL/2", {"input_size": 64}),
    **{name: (pixart.PixArt, pixart.SIZES, size, {}) for name, (size, _) in PIXART.items()},
    **{name: (uvit.UViT, uvit.SIZES, size, {}) for name, size in UVIT.items()},
}


def bare_network(name):
    """The network of a model, without memory for its weights (2.7 GB for DiT-XL/2).
    Raises ValueError for an unknown name."""
    check_name(name)
    make, sizes, size, changes = NETWORKS[name]
    with torch.device("meta"):
        return make(**sizes[size] | changes)


def make_sampler(name, sampler, steps):
    """A sampler by its name, of `steps` steps, for the model `name`. Raises ValueError for one of
    another noise schedule than the model's: its images would be wrong, without a word."""
    ours = dpm_solver.SAMPLERS
    if name in UVIT and sampler in ours:
        return ours[sampler](steps)
    if name in UVIT or sampler in ours:
        raise ValueError(f"{name} cannot be sampled with {sampler}: {' and '.join(ours)} are for "
                         f"the noise schedule of {', '.join(UVIT)}, all others for that of the "
                         "other models")
    return samplers.make_sampler(sampler, steps)


def fill(network, read_weights, weights, usual):
    """Reads weights into a network: from the file or folder `weights`; if that is None, from the
    one that `usual` finds or downloads; if it is NONE, not at all."""
    if weights is not NONE:
        bare = next(network.parameters()).is_meta  # it has no memory of its own
        network.load_state_dict(read_weights(weights or usual(), network), assign=bare)


def check_name(name):
    """Raises ValueError for a name that is no model's."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name}: use {', '.join(MODELS)}")


# ------------------------------------------------------------------------------------------------
# Loading


def outline(name, dtype=None, raw_captions=False):
    """A model without weights: all that can be said of it, and checked, before they are there.
    Raises ValueError for an unknown name or dtype, or raw captions for a model that T5 does not
    read for."""
    return make(name, NONE, dtype, raw_captions)


def make(name, weights, dtype, raw_captions):
    """What `outline` and `load` share."""
    check_name(name)
    if raw_captions and name not in PIXART:
        raise ValueError(f"--raw-captions is for models that read captions by T5, not for {name}")
    dtype_name(dtype)
    model = MODELS[name](weights)
    model.clean = model.clean and not raw_captions
    return model


def load(name, weights=None, device=None, dtype=None, raw_captions=False):
    """A model by name. `weights` is a file to use in place of the usual one, or a folder in the
    layout of diffusers; of a whole pipeline its autoencoder and text encoder are used too, if they
    are there. `device` is as in `find_device`, `dtype` as in `dtype_name`. With `raw_captions` T5
    reads captions as they are; for PixArt-alpha they are cleaned otherwise, as in the official
    code.

    Raises ValueError as `outline` does, and for an unknown device or weights that do not fit;
    FileNotFoundError or ConnectionError, which say what to do, if there are no weights.
    """
    device = find_device(device)  # before a download
    model = make(name, weights, dtype, raw_captions)
    model.folder = layout.pipeline(weights)
    # Frozen: only routers are trained here, and autograd then keeps fewer tensors for them.
    model.network.eval().requires_grad_(False).to(getattr(torch, dtype_name(dtype)))
    return model.to(device)


def dtype_name(dtype=None):
    """The one name of a dtype, however it was written: float32 (None, fp32, torch.float32),
    bfloat16 (bf16) or float16 (fp16). Raises ValueError for another."""
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.").strip().lower()
    name = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(name, name)
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"unknown dtype {dtype}: use float32, bfloat16 or float16")
    return name


def choose_kernels(device):
    """Has a GPU do products of float32 in TF32, as in the official code (Apple's have none and
    ignore that). It holds for the whole process, so commands call this once. On CPUs torch's own
    choices are left alone: others moved the time by a tenth either way, with AVX2 and the sizes
    digits, emoji, S/2 and XL/2, and none was faster in all."""
    if torch.device(device).type != "cpu":
        torch.set_float32_matmul_precision("high")


def compile_branches(network, backend="inductor"):
    """Has torch.compile make a graph of every kind of branch (attention, MLP), at its first use. A
    graph of the whole network would be another one for each row of a schedule. -> the modules."""
    modules = [getattr(block, name) for block in network.blocks
               for name in ("attn", "cross_attn", "mlp") if hasattr(block, name)]
    for module in modules:
        module.compile(backend=backend)
    return modules


def load_autoencoder(model, weights=None):
    """The autoencoder that a latent model is used with, ready, on its device and in its dtype (but
    bfloat16 for float16, in which SDXL's overflows). `weights` is a file or a folder, by default
    the pipeline's that the network is from, or else the usual ones. Raises as `load` does, also
    for an autoencoder of latents of another scale."""
    with torch.device("meta"):
        network = vae.Autoencoder()
    weights = weights or model.part("vae") or hugging_face(model.autoencoder, VAE_FILE)
    file = layout.find(weights, "vae")
    network.load_state_dict(vae.read_weights(file, network), assign=True)
    scale = layout.config(file).get("scaling_factor", model.scale)
    if scale != model.scale and file.name.startswith(layout.STEM):
        raise ValueError(f"{file} is of latents at scale {scale}, by its config.json; {model.name} "
                         f"denoises latents at {model.scale}")
    dtype = next(model.network.parameters()).dtype
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    return network.eval().requires_grad_(False).to(model.device, dtype)


def find_device(name=None):
    """`name`, or by default the first that is there of cuda, mps (Apple's GPUs) and cpu. Raises
    ValueError for one that is not there."""
    there = command.devices()
    if name is None:
        return there[0]
    if name not in there:
        raise ValueError(f"no device {name} here: torch finds only {', '.join(there)}")
    return name
