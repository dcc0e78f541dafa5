"""The networks whose features the metrics compare: the Inception network of FID; and, so that the
metrics work without a download, a small classifier of digits and a small CLIP for emoji.

    network = features.load("digits")                # "inception" is downloaded on first use
    pooled, spatial, logits = network(images)        # images uint8 (B, 3, H, W)

Each returns three kinds of features from one pass: `pooled` (B, D) for FID, precision and recall;
`spatial` (B, S) for sFID; `logits` (B, classes) for the Inception score. `network.sizes` are (D, S,
classes), with None in place of classes if there are none.

Notation: B images, C channels, H and W sides in pixels, D pooled and S spatial features.
"""

import contextlib
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import command
import hub
import text

SHIPPED = Path(__file__).parent / "checkpoints"
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")

# ------------------------------------------------------------------------------------------------
# Preprocessing


def resize_tf1(images, size):
    """Bilinear resize as in TensorFlow 1, with neither half-pixel centres nor aligned corners:
    output pixel i reads at i * size_in / size_out. images (B, C, H, W) -> (B, C, size, size)."""
    for dim in (2, 3):  # bilinear is linear along the rows, then along the columns
        length = images.shape[dim]
        at = torch.arange(size, device=images.device, dtype=torch.float32) * (length / size)
        low = at.long()
        high = (low + 1).clamp(max=length - 1)  # beyond the last pixel: the last pixel
        weight = (at - low).to(images.dtype).view([-1, 1] if dim == 2 else [-1])
        images = torch.lerp(images.index_select(dim, low), images.index_select(dim, high), weight)
    return images


# ------------------------------------------------------------------------------------------------
# Inception v3 (Szegedy et al. 2016, sections 3 to 6), as in the TensorFlow graph of 2015-12-05 that
# defines FID. The parameters have the names of pytorch-fid's file of weights.


class Conv(nn.Module):
    """Convolution without bias, batch normalisation with stored statistics, ReLU."""

    def __init__(self, channels_in, channels_out, kernel_size, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=1e-3)

    def forward(self, x):
        return F.relu_(self.bn(self.conv(x)))


def average(x):
    """3 x 3 average, (B, C, H, W) -> the same. As pytorch-fid's port found, the 2015 graph leaves
    the padding out of the mean; torchvision's network does not."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class MixedA(nn.Module):
    """(B, C, 35, 35) -> (B, 224 + pool, 35, 35). As in all Mixed blocks, the input passes through
    several branches side by side, and their outputs are concatenated."""

    def __init__(self, C, pool):
        super().__init__()
        self.branch1x1 = Conv(C, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(C, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(C, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(C, pool, 1)

    def forward(self, x):
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pool = self.branch_pool(average(x))
        return torch.cat([self.branch1x1(x), branch5x5, branch3x3dbl, pool], 1)


class MixedB(nn.Module):
    """(B, 288, 35, 35) -> (B, 768, 17, 17)."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = Conv(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(288, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x):
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), branch3x3dbl, F.max_pool2d(x, 3, stride=2)], 1)


class MixedC(nn.Module):
    """(B, 768, 17, 17) -> the same. A 7 x 7 convolution is split into a 1 x 7 and a 7 x 1 one."""

    def __init__(self, C7):
        super().__init__()
        row = dict(kernel_size=(1, 7), padding=(0, 3))
        column = dict(kernel_size=(7, 1), padding=(3, 0))
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, C7, 1)
        self.branch7x7_2, self.branch7x7_3 = Conv(C7, C7, **row), Conv(C7, 192, **column)
        self.branch7x7dbl_1 = Conv(768, C7, 1)
        self.branch7x7dbl_2, self.branch7x7dbl_3 = Conv(C7, C7, **column), Conv(C7, C7, **row)
        self.branch7x7dbl_4, self.branch7x7dbl_5 = Conv(C7, C7, **column), Conv(C7, 192, **row)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x):
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        pool = self.branch_pool(average(x))
        return torch.cat([self.branch1x1(x), branch7x7, branch7x7dbl, pool], 1)


class MixedD(nn.Module):
    """(B, 768, 17, 17) -> (B, 1280, 8, 8)."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x):
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7x3 = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        branch7x7x3 = self.branch7x7x3_4(branch7x7x3)
        return torch.cat([branch3x3, branch7x7x3, F.max_pool2d(x, 3, stride=2)], 1)


class MixedE(nn.Module):
    """(B, C, 8, 8) -> (B, 2048, 8, 8). `pool` is the 3 x 3 pooling: the average in the first block
    of this kind, the maximum in the last, a quirk of the 2015 graph."""

    def __init__(self, C, pool):
        super().__init__()
        row = dict(kernel_size=(1, 3), padding=(0, 1))
        column = dict(kernel_size=(3, 1), padding=(1, 0))
        self.branch1x1 = Conv(C, 320, 1)
        self.branch3x3_1 = Conv(C, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, **row), Conv(384, 384, **column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(C, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, **row), Conv(384, 384, **column)
        self.branch_pool = Conv(C, 192, 1)
        self.pool = pool

    def forward(self, x):
        branch3x3 = self.branch3x3_1(x)
        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3),
            self.branch3x3dbl_3a(branch3x3dbl), self.branch3x3dbl_3b(branch3x3dbl),
            self.branch_pool(self.pool(x)),
        ]
        return torch.cat(branches, 1)


class Inception(nn.Module):
    """The network of FID, sFID and the Inception score, with 1008 outputs.

    `resize` is the preprocessing to 299 x 299. "tf1" is the graph's own, as in the ADM evaluator
    and in torch-fidelity: TensorFlow 1's bilinear resize, then (x - 128) / 128. "pytorch-fid" has
    half-pixel centres and 2 x / 255 - 1. Metrics of the two differ: never compare them.
    Raises ValueError for another name.
    """

    sizes = 2048, 2023, 1008

    def __init__(self, resize="tf1"):
        super().__init__()
        if resize not in ("tf1", "pytorch-fid"):
            raise ValueError(f"unknown resize {resize}: use tf1 or pytorch-fid")
        self.resize = resize
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c = MixedA(192, 32), MixedA(256, 64)
        self.Mixed_5d = MixedA(288, 64)
        self.Mixed_6a = MixedB()
        self.Mixed_6b, self.Mixed_6c = MixedC(128), MixedC(160)
        self.Mixed_6d, self.Mixed_6e = MixedC(160), MixedC(192)
        self.Mixed_7a = MixedD()
        self.Mixed_7b = MixedE(1280, average)
        self.Mixed_7c = MixedE(2048, lambda x: F.max_pool2d(x, 3, stride=1, padding=1))
        self.fc = nn.Linear(2048, 1008)

    @property
    def name(self):
        """Names the features: only statistics of equal names are compared."""
        return f"Inception 2015-12-05, resize {self.resize}"

    def preprocess(self, images):
        """uint8 (B, 3, H, W) -> float (B, 3, 299, 299), about from -1 to 1."""
        images = images.to(self.fc.weight.dtype)
        if self.resize == "tf1":
            return (resize_tf1(images, 299) - 128) / 128
        return F.interpolate(images / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1

    def forward(self, images):
        """uint8 (B, 3, H, W) -> pooled (B, 2048), spatial (B, 2023), logits (B, 1008).

        `pooled` is the graph's layer pool_3; `spatial` the first 7 channels of its mixed_6/conv, in
        its order (row, column, channel); `logits` lack the bias, as in the official Inception
        score.
        """
        x = self.preprocess(images)                                    # (B,    3, 299, 299)
        x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))                  # (B,   32, 147, 147)
        x = F.max_pool2d(self.Conv2d_2b_3x3(x), 3, stride=2)           # (B,   64,  73,  73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))                  # (B,  192,  71,  71)
        x = F.max_pool2d(x, 3, stride=2)                               # (B,  192,  35,  35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))             # (B,  288,  35,  35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))             # (B,  768,  17,  17)
        x = self.Mixed_6d(x)                                           # (B,  768,  17,  17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)              # (B, 2023), of branch1x1
        x = self.Mixed_6e(x)                                           # (B,  768,  17,  17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))             # (B, 2048,   8,   8)
        pooled = x.mean((2, 3))                                        # (B, 2048)
        return pooled, spatial, pooled @ self.fc.weight.T


# ------------------------------------------------------------------------------------------------
# The network for digits

GREY = 16  # levels of 255 between the channels of a grey picture at most, which JPEG may put there


class DigitsClassifier(nn.Module):
    """A small convolutional classifier of the ten digits, trained by experiments/pretrain.py on the
    shipped digits only. Its features take the place of Inception's."""

    name = "digits classifier"
    sizes = 64, 196, 10

    def __init__(self):
        super().__init__()
        self.conv1 = Conv(1, 16, 3, padding=1)
        self.conv2 = Conv(16, 32, 3, stride=2, padding=1)
        self.conv3 = Conv(32, 32, 3, padding=1)
        self.conv4 = Conv(32, 64, 3, stride=2, padding=1)
        self.conv5 = Conv(64, 64, 3, padding=1)
        self.fc = nn.Linear(64, 10)

    def forward(self, images):
        """uint8 (B, 3, 28, 28), three equal channels -> pooled (B, 64), the input of the last
        layer; spatial (B, 196), the first 4 channels of `conv4`; logits (B, 10). Raises ValueError
        for another size, and warns of colours, as only red is looked at."""
        if images.shape[2:] != (28, 28):
            H, W = images.shape[2:]
            raise ValueError(f"the digits classifier takes 28 x 28 images, not {H} x {W}")
        if (images.amax(1) - images.amin(1)).max() > GREY:
            warnings.warn("images in colour: the digits classifier looks at their red only",
                          stacklevel=2)
        x = images[:, :1].to(self.fc.weight.dtype) / 127.5 - 1         # (B,   1, 28, 28)
        x = self.conv3(self.conv2(self.conv1(x)))                      # (B,  32, 14, 14)
        x = self.conv4(x)                                              # (B,  64,  7,  7)
        spatial = x[:, :4].permute(0, 2, 3, 1).flatten(1)              # (B, 196)
        pooled = self.conv5(x).mean((2, 3))                            # (B,  64)
        return pooled, spatial, self.fc(pooled)


# ------------------------------------------------------------------------------------------------
# The network for emoji


class EmojiEncoder(nn.Module):
    """A small CLIP for emoji (Radford et al. 2021), trained by experiments/pretrain.py. It maps
    images and captions of hashed words into one space, where an image is close to its caption. Its
    features take the place of Inception's, its cosines the place of CLIP's."""

    name = "emoji encoder"
    sizes = 96, 256, None

    def __init__(self):
        super().__init__()
        self.conv1 = Conv(3, 24, 3, padding=1)
        self.conv2 = Conv(24, 48, 3, stride=2, padding=1)
        self.conv3 = Conv(48, 48, 3, padding=1)
        self.conv4 = Conv(48, 96, 3, stride=2, padding=1)
        self.conv5 = Conv(96, 96, 3, padding=1)
        self.image = nn.Linear(96, 64)
        self.word = nn.Linear(128, 256, bias=False)
        self.text = nn.Linear(256, 64)
        self.log_scale = nn.Parameter(torch.tensor(2.0))  # scales the cosines; used in training

    def forward(self, images):
        """uint8 (B, 3, 32, 32) -> pooled (B, 96); spatial (B, 256), the first 4 channels of
        `conv4`; None, as there are no classes. Raises ValueError for another size."""
        if images.shape[2:] != (32, 32):
            H, W = images.shape[2:]
            raise ValueError(f"the emoji encoder takes 32 x 32 images, not {H} x {W}")
        x = images.to(self.image.weight.dtype) / 127.5 - 1             # (B,  3, 32, 32)
        x = self.conv3(self.conv2(self.conv1(x)))                      # (B, 48, 16, 16)
        x = self.conv4(x)                                              # (B, 96,  8,  8)
        spatial = x[:, :4].permute(0, 2, 3, 1).flatten(1)              # (B, 256)
        return self.conv5(x).mean((2, 3)), spatial, None

    def encode_image(self, images, normalize=True):
        """uint8 (B, 3, 32, 32) -> (B, 64), of length 1 if `normalize`."""
        x = self.image(self(images)[0])
        return F.normalize(x, dim=1) if normalize else x

    def encode_text(self, words, normalize=True):
        """Hashed words (B, L, 128), zeros beyond the last word -> (B, 64), of length 1 if
        `normalize`."""
        count = words.abs().sum(2).gt(0).sum(1, keepdim=True).clamp(min=1)  # words: (B, 1)
        # `word` has no bias, so the places beyond the last word add nothing to the mean.
        x = self.text(F.relu(self.word(words)).sum(1) / count)
        return F.normalize(x, dim=1) if normalize else x


# ------------------------------------------------------------------------------------------------
# Networks by name


def read_weights(path, network):
    """Reads a file of weights -> a state dict for `network`. The counters of batch normalisation,
    which nothing here uses, are the network's own: not every file has them. Raises as
    `checkpoint.read` and `checkpoint.fitted` do."""
    state = checkpoint.read(path)
    # As floating point, because what `fitted` lets pass are weights.
    counters = {k: v.float() for k, v in network.state_dict().items()
                if k.endswith("batches_tracked")}
    return checkpoint.fitted(state | counters, network, path)


def load(name, weights=None, device="cpu", resize="tf1"):
    """A feature network by name, frozen and in eval mode: inception, digits or emoji. `weights` is
    a file to use in place of the usual one: pytorch-fid's for inception, downloaded on first use;
    the shipped files for the others. `resize` is Inception's preprocessing.

    Raises ValueError for an unknown name or weights that do not fit; FileNotFoundError or
    ConnectionError if there are no weights.
    """
    if name == "inception":
        network = Inception(resize)
        weights = weights or command.download(INCEPTION)
    elif name == "digits":
        network = DigitsClassifier()
        weights = weights or SHIPPED / "digits_classifier.safetensors"
    elif name == "emoji":
        network = EmojiEncoder()
        weights = weights or SHIPPED / "emoji_encoder.safetensors"
    else:
        raise ValueError(f"unknown features {name}: use inception, digits or emoji")
    network.load_state_dict(read_weights(weights, network))
    network.eval().requires_grad_(False).to(device)
    return network.to(memory_format=torch.channels_last)  # on a CPU 1.4 times as fast


def load_clip(model="ViT-B-32", pretrained="openai", device="cpu"):
    """A CLIP network of open_clip by name -> the network, its preprocessing of Pillow images, its
    tokenizer. `pretrained` is a tag of open_clip, whose weights are downloaded on first use, or a
    file. (OpenAI's weights from a file need a model whose name ends in -quickgelu.) The model
    emoji is the shipped encoder.

    Raises ValueError for an unknown name or a file without weights of this model, ConnectionError
    if the weights cannot be downloaded.
    """
    if model == "emoji":
        return load("emoji", device=device), preprocess_emoji, tokenize_emoji
    try:
        import open_clip  # takes seconds, and only the CLIP score needs it
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"open_clip cannot be imported ({reason}): install open_clip_torch and a "
                         "torchvision that goes with your PyTorch") from error
    if model not in open_clip.list_models():
        raise ValueError(f"unknown CLIP model {model}: use one of open_clip.list_models()")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained not in tags and not Path(pretrained).is_file():
        raise ValueError(f"no weights {pretrained} of {model}: use {', '.join([*tags, 'a file'])}")
    # OpenAI's own weights need the activation they were trained with; open_clip would only warn.
    about = open_clip.get_pretrained_cfg(model, pretrained) or {}
    quick_gelu = about.get("quick_gelu", False)
    try:
        probe_hub(about.get("hf_hub", "").strip("/"))
        network, _, preprocess = open_clip.create_model_and_transforms(
            model, pretrained, force_quick_gelu=quick_gelu
        )
    except Exception as error:  # of many kinds, for a damaged file as for a missing network
        if Path(pretrained).is_file():
            raise ValueError(f"{pretrained} holds no weights of {model}: {hub.reason(error)}"
                             ) from error
        raise ConnectionError(f"could not get {pretrained} of {model} ({hub.reason(error)}): "
                              f"{hub.advice(error)}, or download it where there is a network, and "
                              "give its file (--clip-pretrained)") from error
    check_clip(network, pretrained)
    network.eval().requires_grad_(False).to(device)
    return network, preprocess, open_clip.get_tokenizer(model)


def probe_hub(repository):
    """Raises what the hub's library does if weights of CLIP are not in its cache, and the hub does
    not answer. (open_clip alone would try for a minute.) '' is no repository."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    names = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
    if not repository or any(isinstance(try_to_load_from_cache(repository, name), str)
                             for name in names):
        return
    with contextlib.suppress(EntryNotFoundError):  # that is an answer
        hub.probe(repository, names[0])


def check_clip(network, pretrained):
    """Raises ValueError for a CLIP network loaded from what are no weights: whole numbers, NaN.
    `pretrained` is a tag, or the file: loading has already made its whole numbers floating point.
    """
    weights = dict(network.named_parameters())
    for name, value in weights.items():
        checkpoint.check_weight(value, f"{pretrained}: {name}")
    if Path(pretrained).suffix not in (".npz", ".npy") and Path(pretrained).is_file():
        from open_clip.factory import load_state_dict

        for name, value in load_state_dict(str(pretrained)).items():
            if name in weights:
                checkpoint.check_weight(value, f"{pretrained}: {name}")


def cut(prompts, tokens, tokenizer):
    """Those of B prompts whose end is cut: tokens (B, L) of an open_clip tokenizer -> a list of
    prompts. (The emoji's tokens (B, L, C) have their own warning.)"""
    if tokens.ndim != 2:
        return []
    L, padding = tokens.shape[1], tokenizer([""])[0, -1]
    full = [prompt for prompt, row in zip(prompts, tokens, strict=True) if row[-1] != padding]
    # A prompt of L tokens fills its row as a longer one does; with more room they differ.
    return [prompt for prompt in full
            if tokenizer([prompt], context_length=L + 1)[0, -1] != padding]


def preprocess_emoji(image):
    """A Pillow image of 32 x 32 pixels -> uint8 (3, 32, 32)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def tokenize_emoji(prompts):
    """B prompts -> hashed words (B, 12, 128)."""
    return text.hashed_words(prompts)[0]
