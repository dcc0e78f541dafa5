"""Trains the shipped networks from the shipped images.

    python -m experiments.pretrain                    # the digits DiT, on 4,000 digits
    python -m experiments.pretrain --model digits-classifier    # and the statistics for FID
    python -m experiments.pretrain --model emoji --compile      # the emoji PixArt
    python -m experiments.pretrain --model emoji-encoder

The DiT is trained as in its paper (Peebles and Xie 2023, section 3), with the loss of IDDPM (Nichol
and Dhariwal 2021). A run may be interrupted at any time. The same command with --resume then
continues it and ends with bitwise the same weights (not tested with --compile).

Notation: B images of a batch, N of the data set, C channels, M caption tokens.
"""

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch.nn.attention import SDPBackend, sdpa_kernel

import command
import dit
import features
import metrics
import pixart
import shipped
import text
from samplers import DDPM

VERSION = 1  # of what a state holds and of what it leads to: a state of another one is refused
SAVE_EVERY = 200  # steps
DROP_LABEL = 0.1  # the share of labels replaced by the null label, for classifier-free guidance
SETTINGS = {  # the defaults of each model; ema=0.0 means no averaging of the weights
    "digits": dict(steps=8000, batch_size=64, lr=2e-3, ema=0.999),
    "digits-classifier": dict(steps=2000, batch_size=64, lr=3e-3, ema=0.0),
    "emoji": dict(steps=9000, batch_size=32, lr=1.5e-3, ema=0.999),
    "emoji-encoder": dict(steps=1500, batch_size=128, lr=2e-3, ema=0.0),
}
OUT = {
    "digits": "digits_dit.safetensors",
    "digits-classifier": "digits_classifier.safetensors",
    "emoji": "emoji_pixart.safetensors",
    "emoji-encoder": "emoji_encoder.safetensors",
}

# ------------------------------------------------------------------------------------------------
# The training loop that all of them share


def learning_rate(step, steps, peak):
    """The learning rate of a step: a linear warm-up over 100 steps times a cosine down to zero."""
    return peak * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def fit(network, loss, args, state_path, bfloat16=False):
    """Trains `network` with AdamW; loss(generator, step) returns a dict of terms to add up. Saves
    the state before the first step, every SAVE_EVERY steps and at the end and, with args.resume,
    continues from it.

    -> a copy of the network with averaged weights, in eval mode, and the hours that training took.
    Raises ValueError for a state of other settings or a damaged one, and for a loss that is not
    finite.
    """
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0)
    settings = used_settings(args) | {"network": type(network).__name__, "compile": args.compile,
                                      "version": VERSION}
    first, seconds = 0, 0.0
    check_state(state_path, args)
    if Path(state_path).exists():
        state = command.load_state(state_path)
        if not isinstance(state, dict) or state.get("settings") != settings:
            raise ValueError(f"{state_path} is not the state of a run with these settings")
        first, seconds, bfloat16 = load(state, state_path, network, average, optimizer, args.steps)

    def save_at(step):
        state = {"settings": settings, "network": network.state_dict(),
                 "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                 "step": step, "seconds": seconds, "bfloat16": bfloat16}
        try:
            command.save_state(state_path, state)
        except OSError as error:  # a full disk, say
            raise OSError(f"{state_path} cannot be written ({error}): once it can be, the same "
                          "command with --resume goes on from the last state") from error

    if not Path(state_path).exists():
        save_at(0)  # so that a lack of room is found now, and there is a state to go on from
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, "
          f"{'bfloat16' if bfloat16 else 'float32'}, seed {args.seed}")

    bar = command.progress(range(first, args.steps), initial=first, total=args.steps, unit="step")
    running = {}  # moving averages of the terms, for the bar
    for step in bar:
        start = time.perf_counter()
        terms = optimize(network, optimizer, loss, step, args, bfloat16)
        update_average(average, network, step, args.ema)
        seconds += time.perf_counter() - start
        for key, term in terms.items():
            running[key] = 0.99 * running.get(key, term.item()) + 0.01 * term.item()
        bar.set_postfix({key: f"{value:.4f}" for key, value in running.items()}, refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            save_at(step + 1)
    return average.eval(), seconds / 3600


def check_state(path, args):
    """Raises OSError if no state can be written, ValueError if there is one that is not resumed."""
    command.check_not_read(args.out, path)
    command.check_writable(path)
    if Path(path).exists() and not args.resume:
        raise ValueError(f"{path} holds a run: --resume goes on with it, or name another --state")


def load(state, path, network, average, optimizer, steps):
    """Puts a state, a dict read from `path`, into the three. -> the step to go on with, the seconds
    so far, and whether it was bfloat16 (this machine may find the other dtype faster).
    Raises ValueError if it cannot have come from a run."""
    try:
        groups = [{key: value for key, value in group.items() if key not in ("lr", "initial_lr")}
                  for group in optimizer.state_dict()["param_groups"]]
        for key, module in (("network", network), ("average", average)):
            for name, value in module.state_dict().items():
                if state[key][name].dtype != value.dtype:
                    raise ValueError(f"{name} is {state[key][name].dtype}")
            module.load_state_dict(state[key])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, bfloat16 = (state[key] for key in ("step", "seconds", "bfloat16"))
        theirs = optimizer.state_dict()["param_groups"]
        theirs = [{key: group.get(key) for key in ours}
                  for group, ours in zip(theirs, groups, strict=True)]
        if type(first) is not int or not 0 <= first <= steps or type(bfloat16) is not bool or (
            not 0 <= seconds < math.inf or theirs != groups
        ):
            raise ValueError("its numbers do not go together")
        tensors = [*network.state_dict().values(), *average.state_dict().values()]
        for parameter in network.parameters() if first else ():
            moments = optimizer.state[parameter]
            if any(moments[key].shape != parameter.shape for key in ("exp_avg", "exp_avg_sq")):
                raise ValueError("its moments have other shapes")
            if moments["step"].item() != first:
                raise ValueError("its moments are of another step")
            tensors += [moments["exp_avg"], moments["exp_avg_sq"]]
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError("not all of its numbers are finite")
    except Exception as error:  # a foreign file may hold anything anywhere
        reason = command.one_line(f"{type(error).__name__}: {error}")[:200]
        raise ValueError(f"{path} is not a whole state of this training ({reason}): name another "
                         "--state") from error
    return first, seconds, bfloat16


def used_settings(args):
    """The flags on which the weights depend: a dict."""
    return {key: getattr(args, key) for key in ("steps", "batch_size", "lr", "ema", "seed")}


def optimize(network, optimizer, loss, step, args, bfloat16):
    """One optimiser step -> the terms of the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args.steps, args.lr)
    # Every step seeds its own generator, so no state of a generator has to be saved.
    generator = torch.Generator().manual_seed((args.seed * 1_000_000_007 + step) % 2**63)
    # The fused CPU attention is slow for 49 tokens, above all in the backward pass.
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        terms = loss(generator, step)
    total = sum(terms.values())
    if not math.isfinite(total.item()):
        raise ValueError(f"the loss is not finite at step {step}: start again with a lower --lr")
    optimizer.zero_grad()
    total.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return terms


@torch.no_grad()
def update_average(average, network, step, decay):
    """Moves the averaged weights towards the network's: average = decay average + (1 - decay) new.
    In the first steps the decay is smaller, so that the random initialisation is soon forgotten."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), weight)
    # The statistics of batch normalisation are averages already.
    for mine, theirs in zip(average.buffers(), network.buffers(), strict=True):
        mine.copy_(theirs)


def save_weights(path, network, args, dtype=torch.float32, **about):
    """Writes a network's weights as `dtype`, with the settings and `about` as metadata."""
    metadata = {key: str(value) for key, value in (used_settings(args) | about).items()}
    state = {key: value.to(dtype) for key, value in network.state_dict().items()}
    with command.replacing(path) as temporary:
        temporary.write_bytes(save(state, metadata))
    print(f"wrote {path}: {metadata}")


# ------------------------------------------------------------------------------------------------
# The digits DiT


def bfloat16_is_faster():
    """Measures whether bfloat16 multiplies matrices of this training's shapes faster than float32.
    A CPU with instructions for it is about 2 x as fast; one without is more than 10 x as slow."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(3136, 128, dtype=dtype), torch.ones(128, 512, dtype=dtype)
        a @ b  # the first product also sets up the library, so it is not timed
        start = time.perf_counter()
        for _ in range(3):
            a @ b
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < seconds[torch.float32]


def training_loss(network, schedule, images, labels, generator, of_v=False):
    """The two terms of IDDPM's hybrid loss (Nichol and Dhariwal 2021, section 3.1) on one batch.

    The first is mean w (eps - eps_theta)^2. w is 1; with `of_v` it is 1 / alpha_bar, and the term
    becomes the squared error of v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans and Ho
    2022, appendix D). The second is the mean KL divergence of a pixel's learned p(x' | x) from
    q(x' | x, x_0), in bits. It trains the variance only. images (B, C, H, W) in [-1, 1], labels
    (B,) -> two numbers.
    """
    B = len(images)
    i = torch.randint(len(schedule.timesteps), (B,), generator=generator)  # steps as executed
    noise = torch.randn(images.shape, generator=generator)
    dropped = torch.rand(B, generator=generator) < DROP_LABEL
    labels = torch.where(dropped, network.num_classes, labels)

    def at(table):  # the coefficient of each image's step: (B, 1, 1, 1)
        return torch.from_numpy(table).float()[i][:, None, None, None]

    a = at(schedule.alpha_bar)
    x = a.sqrt() * images + (1 - a).sqrt() * noise  # (B, C, H, W)
    t = torch.tensor(schedule.timesteps)[i]  # (B,)
    eps, variance = network(x, t, labels).float().chunk(2, dim=1)  # each (B, C, H, W)

    # KL between two Gaussians whose means differ by from_x0 (x_0 - predicted x_0). eps is detached:
    # as in IDDPM, this term trains the variance only.
    x0 = (x - (1 - a).sqrt() * eps.detach()) / a.sqrt()
    from_x0 = at(np.sqrt(schedule.alpha_bar_next) * schedule.beta / (1 - schedule.alpha_bar))
    share = (variance + 1) / 2  # log_p lies between two bounds (IDDPM, equation 15)
    log_q = at(schedule.log_beta_tilde)
    log_p = share * at(schedule.log_beta) + (1 - share) * log_q
    distance = (from_x0 * (images - x0)) ** 2
    kl = 0.5 * (log_p - log_q - 1 + torch.exp(log_q - log_p) + distance * torch.exp(-log_p))
    mse = ((eps - noise).square() / (a if of_v else 1)).mean()
    return mse, kl.mean() / math.log(2)


def train_digits(args):
    """Trains and saves the DiT of `--model digits`."""
    torch.manual_seed(args.seed)  # for the initialisation only
    network = dit.initialize(dit.DiT(**dit.SIZES["digits"]))
    schedule = DDPM(1000)
    images, labels = shipped.digits("train")
    images = images / 127.5 - 1

    def loss(generator, step):
        batch = torch.randint(len(images), (args.batch_size,), generator=generator)
        mse, kl = training_loss(network, schedule, images[batch], labels[batch], generator)
        return {"mse": mse, "kl": kl}

    average, hours = fit(network, loss, args, args.state, bfloat16_is_faster())
    save_weights(args.out, average, args, hours=f"{hours:.2f}", data="digits28.npz")


# ------------------------------------------------------------------------------------------------
# The digits classifier


def augmented(images, generator):
    """Turns each image by up to 15 degrees, scales it by up to 15 %, shears it by up to 0.2 and
    shifts it by up to 2 pixels. images (B, C, H, W), 0 is background -> the same shape, float."""
    B, _, H, _ = images.shape
    u = torch.rand(B, 6, generator=generator) * 2 - 1  # in [-1, 1]
    angle, scale, shear = 0.26 * u[:, 0], 1 + 0.15 * u[:, 1:3], 0.2 * u[:, 3]
    cos, sin, shift = angle.cos(), angle.sin(), u[:, 4:] * 4 / H
    rows = [
        torch.stack([scale[:, 0] * cos, scale[:, 0] * (shear * cos - sin), shift[:, 0]], 1),
        torch.stack([scale[:, 1] * sin, scale[:, 1] * (shear * sin + cos), shift[:, 1]], 1),
    ]
    where = F.affine_grid(torch.stack(rows, 1), images.shape, align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(images.float(), where, align_corners=False)


def train_classifier(args):
    """Trains and saves the classifier for the digits' metrics. The accuracy is the mean of three
    trainings, each with other 1,000 digits held out. The network with fold 0 held out is saved,
    with its statistics of the digits beside it."""
    images, labels = shipped.digits("all")
    accuracies, state = [], Path(args.state)
    states = [state.with_stem(f"{state.stem}-{fold}") for fold in range(3)]
    outputs = {name: Path(args.out).with_name(f"digits_{name}.npz")
               for name in ("statistics", "held_out_statistics")}
    for path in outputs.values():
        command.check_not_read(path, args.out, *states)
        command.check_writable(path)
    for path in states:
        check_state(path, args)
    for fold in (2, 1, 0):  # fold 0 last, so that its network is at hand below
        held_out = shipped.held_out(labels, fold)
        seen, seen_labels = images[~held_out], labels[~held_out]
        torch.manual_seed(args.seed)  # for the initialisation only
        network = features.DigitsClassifier()

        # The defaults bind this fold's values; a closure would look the names up when called.
        def loss(generator, step, network=network, seen=seen, seen_labels=seen_labels):
            batch = torch.randint(len(seen), (args.batch_size,), generator=generator)
            _, _, logits = network(augmented(seen[batch], generator))
            return {"cross-entropy": F.cross_entropy(logits, seen_labels[batch])}

        network, hours = fit(network, loss, args, states[fold])
        with torch.no_grad():
            logits = network(images[held_out])[2]
        accuracies.append((logits.argmax(1) == labels[held_out]).double().mean().item())
        print(f"held-out accuracy {100 * accuracies[-1]:.1f} %")
    words = ", ".join(f"{100 * accuracy:.1f}" for accuracy in reversed(accuracies))
    print(f"mean of three splits {100 * sum(accuracies) / 3:.2f} %")
    save_weights(args.out, network, args, hours=f"{hours:.2f}", data="digits28.npz",
                 accuracies=words)
    for source, path in zip(("digits", "digits-held-out"), outputs.values(), strict=True):
        metrics.save_statistics(path, metrics.extract(source, network))
        print(f"wrote {path}")


# ------------------------------------------------------------------------------------------------
# The emoji PixArt


class Captioned:
    """A PixArt that takes labels, as `training_loss` calls it. Label j means caption j of
    `captions`, and the label after the last the null caption. Guidance gives the null caption the
    mask of the caption beside it, so it has to work at every length: here its first 1 to M tokens
    are shown in turn."""

    def __init__(self, network, captions):
        self.network, self.num_classes = network, len(captions)
        self.features, self.mask = text.hashed_words(captions)  # (N, M, channels), (N, M)

    def __call__(self, x, t, labels):
        """x (B, C, H, W), t (B,), labels (B,) -> the network's output (B, 2 C, H, W)."""
        null = labels == self.num_classes  # (B,)
        caption = torch.where(null, 0, labels)
        M = self.network.model_max_length
        tokens = torch.arange(M) <= torch.arange(len(labels))[:, None] % M  # (B, M): 1 to M True
        features = self.network.y_embedder.y_embedding
        y = torch.where(null[:, None, None], features, self.features[caption])  # (B, M, channels)
        return self.network(x, t, y, torch.where(null[:, None], tokens, self.mask[caption]))


def epoch_order(step, N, B, seed):
    """The numbers (B,) of the images of a step. In every epoch each of the N images comes once, in
    an order that depends only on the seed and the epoch: nothing has to be saved to resume."""
    places = torch.arange(step * B, (step + 1) * B)  # a step may reach into the next epoch
    chosen = []
    for epoch in places.div(N, rounding_mode="floor").unique().tolist():
        number = (seed * 1_000_000_007 + 500_000_003 + epoch) % 2**63
        order = torch.randperm(N, generator=torch.Generator().manual_seed(number))
        chosen.append(order[places[places // N == epoch] % N])
    return torch.cat(chosen)


def train_emoji(args):
    """Trains and saves the PixArt of `--model emoji`. It is meant to learn 1,026 emoji by heart, so
    none is held out. The loss is the error of v: the caption decides the image while x is almost
    pure noise, and there the error of eps is tiny for any image, but the error of v is not."""
    torch.manual_seed(args.seed)  # for the initialisation and the null caption only
    network = pixart.initialize(pixart.PixArt(**pixart.SIZES["emoji"]))
    schedule = DDPM(1000)
    images, captions = shipped.emoji()
    images = images / 127.5 - 1
    captioned = Captioned(network, captions)
    if args.compile:
        network.compile()

    def loss(generator, step):
        batch = epoch_order(step, len(images), args.batch_size, args.seed)
        mse, kl = training_loss(captioned, schedule, images[batch], batch, generator, of_v=True)
        return {"mse": mse, "kl": kl}

    average, hours = fit(network, loss, args, args.state)
    save_weights(args.out, average, args, torch.float16, hours=f"{hours:.2f}", data="emoji32.npz")


# ------------------------------------------------------------------------------------------------
# The emoji encoder


def contrastive_loss(images, texts, scale):
    """The loss of CLIP (Radford et al. 2021, figure 3): each image has to find its caption among
    those of the batch, and each caption its image. Embeddings, images and texts (B, D), of length 1
    -> a number."""
    logits = scale * images @ texts.T  # (B, B)
    own = torch.arange(len(logits))  # image i belongs to caption i
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train_emoji_encoder(args):
    """Trains and saves the encoder for the emoji's metrics. Every tenth of the 1,026 emoji is held
    out. It learns from the others and from the 885 that the emoji model leaves out."""
    images, captions = shipped.emoji(every=True)
    words = text.hashed_words(captions)[0]  # (1911, 12, 128)
    held_out = torch.zeros(len(images), dtype=torch.bool)
    held_out[: len(shipped.emoji()[1]) : 10] = True
    seen, seen_words = images[~held_out], words[~held_out]
    torch.manual_seed(args.seed)  # for the initialisation only
    network = features.EmojiEncoder()

    def loss(generator, step):
        batch = torch.randperm(len(seen), generator=generator)[: args.batch_size]
        pixels = 255 - augmented(255 - seen[batch], generator)  # their background is white
        dropped = torch.rand(len(batch), 12, 1, generator=generator) < 0.2  # a fifth of the words
        texts = network.encode_text(seen_words[batch] * ~dropped)
        scale = network.log_scale.exp().clamp(max=100)  # CLIP's limit
        return {"contrastive": contrastive_loss(network.encode_image(pixels), texts, scale)}

    average, hours = fit(network, loss, args, args.state)
    with torch.no_grad():
        cosines = average.encode_image(images[held_out]) @ average.encode_text(words[held_out]).T
    better = (cosines > cosines.diagonal()[:, None]).sum(1)  # captions closer than the image's own
    top1, top5 = (100 * (better < n).double().mean().item() for n in (1, 5))
    retrieval = f"{top1:.1f} % first, {top5:.1f} % among 5, of {len(better)}"
    print(f"held-out images that find their caption: {retrieval}")
    save_weights(args.out, average, args, hours=f"{hours:.2f}", data="emoji32.npz",
                 retrieval=retrieval)


# ------------------------------------------------------------------------------------------------
# The command

TRAIN = {
    "digits": train_digits,
    "digits-classifier": train_classifier,
    "emoji": train_emoji,
    "emoji-encoder": train_emoji_encoder,
}


def main():
    parser = command.Parser(__doc__)
    parser.add_argument("--model", default="digits", choices=TRAIN, help="default: digits")
    parser.add_argument("--steps", type=int, help="optimiser steps (digits: 8000)")
    parser.add_argument("--batch-size", type=int, help="images a step (digits: 64)")
    parser.add_argument("--lr", type=command.finite, help="peak learning rate (digits: 2e-3)")
    parser.add_argument("--ema", type=command.finite,
                        help="decay of the averaged weights, 0 for no average (digits: 0.999)")
    parser.add_argument("--seed", type=command.seed, default=0, help="0 or more (0)")
    parser.add_argument("--out", type=command.name,
                        help="file of the weights (default: in checkpoints/)")
    parser.add_argument("--state", type=command.name,
                        help="file for --resume (default: runs/pretrain/MODEL/state.pt)")
    parser.add_argument("--compile", action="store_true",
                        help="fuse the operations of the emoji PixArt: 1.3 x as fast, not bitwise "
                             "the same weights; needs a C++ compiler")
    parser.add_argument("--resume", action="store_true", help="continue from --state if it exists")
    args = parser.parse_args()
    for key, value in SETTINGS[args.model].items():  # defaults that depend on --model
        if getattr(args, key) is None:
            setattr(args, key, value)
    if min(args.steps, args.batch_size) < 1 or args.lr <= 0 or not 0 <= args.ema < 1:
        raise ValueError("--steps and --batch-size must be 1 or more, --lr more than 0, --ema from "
                         "0 to less than 1")
    args.out = args.out or f"checkpoints/{OUT[args.model]}"
    if args.compile and args.model != "emoji":
        raise ValueError("--compile is for --model emoji only")
    args.state = args.state or f"runs/pretrain/{args.model}/state.pt"
    command.check_writable(args.out)
    with command.locked(Path(args.state).parent):
        TRAIN[args.model](args)


if __name__ == "__main__":
    command.run(main)
