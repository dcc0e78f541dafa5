"""Learning-to-Cache's own training of a router, to be read beside train_stepwise.py, which fixes
what it leaves out (Ma et al. 2024, https://arxiv.org/abs/2406.01733, section 3.3).

    python -m experiments.train_ltc                                  # digits
    python -m experiments.train_ltc --target-cur 0.4
    python -m experiments.train_ltc --model dit256 --images train    # ImageNet's folder of classes

Steps of odd timestep index (among the T respaced ones, the cleanest is 0) compute everything. Steps
of even index reuse, where the router says so, what the step just before computed. One iteration:
    x_s         an image of the training set, noised to a random odd step s
    x           the DDIM step from x_s by a full pass, which fills the cache
    LTC         L = MSE(with the soft cache, without one) + beta sum_k r[i, k] at the next step
    update      one AdamW step on row i
On a U-ViT it pairs the evaluations of DPM-Solver's second order: the middle of a step computes
everything, and the start of the next may reuse it. x is then two evaluations from x_s.

SDT differs: it walks whole trajectories from noise, so that the student meets its own accumulated
error and cache entries as old as in sampling; it has guidance, as sampling has; any step may reuse;
and it needs no images. IEPO adds lambda.

Notation: B images, T denoising steps, K branches.
"""

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import math
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import command
import models
import pictures
import router as routers
import shipped
import training
from cache import SoftCache
from samplers import Noise, sampler_name

DROP_LABEL = 0.1  # the share of images that are shown without their label
# On digits, and those published for DiT-XL/2, 256 x 256, both at T = 20 (published for T = 10 and
# 50: beta 1e-6, for 512 x 512: tau 0.9; for U-ViT-H/2: 2.4e-5, which is 0.1 for a sum over 4,096
# numbers, tau 0.9 and 40,000 iterations). An iteration is a row's update.
DEFAULTS = {"digits": dict(beta=1e-4, lr=0.1, iterations=1000, batch_size=8)}
PUBLISHED = dict(beta=5e-6, lr=1e-3, iterations=20000, batch_size=64, micro_batch=8)
MIRROR = 3  # a purpose of Noise

# ------------------------------------------------------------------------------------------------
# The images


def digits():
    """-> a function: a Noise of B numbers -> B random digits (B, 1, 28, 28) in [-1, 1], labels."""
    images, labels = shipped.digits("train")

    def draw(noise):
        chosen = noise.labels(len(images))
        return images[chosen] / 127.5 - 1, labels[chosen]

    return draw


def list_classes(root):
    """A folder of one folder a class, which are numbered by their sorted names as ImageNet's are
    -> the files (see `pictures.image_files`) of each: a list of lists of paths. One warning says
    what is left out. Raises ValueError if there are none, OSError if there is no such folder."""
    classes = sorted(path for path in Path(root).iterdir()
                     if path.is_dir() and not path.name.startswith("."))
    with warnings.catch_warnings(record=True) as left_out:
        warnings.simplefilter("always")
        files = [pictures.image_files(path) for path in classes]
    if left_out:
        more = f" (and files of {len(left_out) - 1} more classes)" if len(left_out) > 1 else ""
        warnings.warn(f"{left_out[0].message}{more}", stacklevel=2)
    if not any(files):
        raise ValueError(f"no images in folders of {root}: it takes a folder for each class")
    return files


def folder(root, model, autoencoder, classes=None):
    """The same for the images of `classes`, by default those in the folder `root`: random latents
    of them, (B, 4, H, W), half of them mirrored, and their labels. Raises ValueError if there are
    not as many classes as the model has, or if an image cannot be read."""
    classes = classes or list_classes(root)
    if len(classes) != model.network.num_classes:
        raise ValueError(f"{root} has {len(classes)} folders, {model.name} "
                         f"{model.network.num_classes} classes: it takes a folder for each")
    empty = [str(label) for label, known in enumerate(classes) if not known]
    if empty:
        raise ValueError(f"{root}: no images in the folder of class {', '.join(empty[:5])}")
    files = [(file, label) for label, known in enumerate(classes) for file in known]

    def draw(noise):
        chosen = [files[j] for j in noise.labels(len(files))]
        # By an image's number alone, so that a resumed run mirrors the same ones.
        mirrored = Noise(noise.seed, noise.numbers, MIRROR).labels(2)
        pixels = torch.stack([centre(file, model.pixels, mirror)
                              for (file, _), mirror in zip(chosen, mirrored, strict=True)])
        spread = noise.start(model.shape, model.device)
        latents = autoencoder.encode(pixels.to(model.device), spread)
        return model.scale * latents, torch.tensor([label for _, label in chosen])

    return draw


def centre(file, size, mirror=False):
    """An image as DiT was trained on it: its middle, square, of the shape (H, W) `size`, mirrored
    or not: (3, H, W) in [-1, 1]. Raises ValueError if it cannot be read."""
    image = square(Image.fromarray(pictures.read_image(file)), size[0])
    pixels = np.asarray(image)[:, ::-1] if mirror else np.asarray(image)
    return torch.from_numpy(pixels / np.float32(127.5) - 1).permute(2, 0, 1)


def square(image, size):
    """The middle of a Pillow image, size x size, by ADM's center_crop_arr: halved as long as its
    shorter side stays at `size` or more, then scaled until that side is `size`, then cut."""
    while min(image.size) >= 2 * size:
        image = image.resize([side // 2 for side in image.size], Image.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


# ------------------------------------------------------------------------------------------------
# The method


SINGLE_STEPS = {"ddim": 1, "dpm-solver-2s": 2}  # sampler: the evaluations in one of its steps


def learned_rows(steps, sampler="ddim"):
    """The rows that may reuse, in executed order. Of DDIM, those of even timestep index, but not
    row 0, which is the index T - 1 (for odd T that is even, and computes everything all the same).
    Of DPM-Solver, the starts of all steps but the first."""
    if sampler == "dpm-solver-2s":
        return list(range(2, steps, 2))
    return [i for i in range(1, steps) if (steps - 1 - i) % 2 == 0]


def make_router(steps, branches, seed, learned):
    """A router whose rows, but for those `learned`, always compute: fixed at the highest score, and
    never trained."""
    router = routers.Router(steps, branches, seed)
    with torch.no_grad():
        for i in set(range(1, steps)) - set(learned):
            router.rows[i - 1].fill_(routers.LIMIT).requires_grad_(False)
    return router


def train_row(model, router, optimizer, sampler, i, images, labels, noise, tau, beta, micro_batch,
              before=1):
    """One iteration, on row i, from the row `before` rows earlier. images (B, C, H, W) are clean.
    -> the loss and the squared error. Raises ValueError, before the update, if the loss is not
    finite."""
    t, a, B, error = sampler.timesteps[i], sampler.alpha_bar[i - before], len(images), 0.0
    scale = training.loss_scale(1 / images[:micro_batch].numel())
    x = math.sqrt(a) * images + math.sqrt(1 - a) * noise.step(i, images)
    for part in range(0, B, micro_batch):
        x_t, y = x[part : part + micro_batch], labels[part : part + micro_batch]
        cache = SoftCache(router.scores, tau)
        predict = partial(evaluate, model.network, y)
        with torch.no_grad():
            for j in range(i - before, i):
                # To the cache this is step 0: nothing that came before may be reused.
                prediction = predict(x_t, sampler.timesteps[j], cache.start(0))
                x_t = sampler.step(prediction, j, x_t)
            target = predict(x_t, t)
        mse = len(y) / B * F.mse_loss(predict(x_t, t, cache.start(i)), target)
        (scale * mse).backward()
        error += mse.item()
    router.rows[i - 1].grad /= scale
    usage = beta * router.scores(i).sum()
    usage.backward()
    loss = error + usage.item()
    training.check_loss(loss, f" at step {i} (timestep {t:g})")
    optimizer.step()  # finds a gradient on row i only
    optimizer.zero_grad()
    router.clamp(i)
    return loss, error


def evaluate(network, y, x, t, cache=None):
    """The network's prediction, without guidance."""
    return network(x, torch.full((len(x),), t, device=x.device), y, cache=cache)


def plan(name, sampler, steps):
    """-> the sampler of a model, by its name, and the rows to learn. Raises ValueError for another
    sampler than DDIM, or U-ViT's of order 2, and for a T without such rows."""
    kind = sampler_name(sampler)
    if kind not in SINGLE_STEPS:
        raise ValueError("Learning-to-Cache trains along single steps: use --sampler ddim, or "
                         "dpm-solver-2s for a U-ViT")
    rows = learned_rows(steps, kind)
    if not rows:
        raise ValueError(f"at T = {steps} no evaluation may reuse: use more --steps")
    return models.make_sampler(name, kind, steps), rows


def train(model, settings, out, draw, resume=False, files=()):
    """Learning-to-Cache's training, new or resumed, in the folder `out`. A "trajectory" of the log
    is as many iterations as there are learned rows, each on a row drawn at random. `files` names
    the images, if `draw` reads them: with others the run is not resumed.
    -> a dict of results. Raises ValueError as `plan` does."""
    name, steps, B = sampler_name(settings["sampler"]), settings["steps"], settings["batch_size"]
    sampler, rows = plan(model.name, name, steps)
    classes = model.network.num_classes

    router = make_router(steps, len(model.network.branches), settings["seed"], rows)
    run = training.Run(model, sampler, router, settings, out, resume, len(rows), files)
    for n in run:
        losses, errors = [0.0] * steps, [0.0] * steps
        generator = torch.Generator().manual_seed((settings["seed"] * 1_000_000_007 + n) % 2**63)
        for j in range(len(rows)):
            first = (n * len(rows) + j) * B
            noise = Noise(settings["seed"], range(first, first + B), purpose=1)
            i = rows[torch.randint(len(rows), (), generator=generator)]
            images, labels = (values.to(model.device) for values in draw(noise))
            dropped = torch.rand(B, generator=generator) < DROP_LABEL
            labels = torch.where(dropped.to(model.device), classes, labels)
            losses[i], errors[i] = train_row(
                model, router, run.optimizer, sampler, i, images, labels, noise, settings["tau"],
                run.beta, settings["micro_batch"], SINGLE_STEPS[name],
            )
        run.record(losses, errors)
    return run.finish()


def main():
    parser = command.Parser(__doc__)
    command.add_model_flags(parser)
    parser.add_argument("--images", type=command.name,
                        help="a folder of one folder a class, if not for digits")
    parser.add_argument("--vae", type=command.place,
                        help="the autoencoder's weights, if not the usual file or folder")
    training.add_flags(parser, "runs/MODEL-ltc", {**DEFAULTS, "others": PUBLISHED})
    args = parser.parse_args()

    if (args.images is None) != (args.model == "digits"):
        raise ValueError("digits are trained on the shipped ones, every other model on --images")
    if args.guidance is not None:
        raise ValueError("Learning-to-Cache is trained without guidance: leave --guidance out")
    small = args.model in DEFAULTS
    defaults = training.for_steps(DEFAULTS[args.model], args.steps) if small else PUBLISHED
    settings = training.settings_of(args, defaults)
    if args.target_cur is not None and args.target_cur >= 0.5:
        raise ValueError("Learning-to-Cache reuses at every other step at most: --target-cur must "
                         "be below 0.5")
    # What needs no network is checked before its download.
    model = models.outline(args.model, args.dtype)
    if model.text:
        raise ValueError(f"{args.model} takes prompts: Learning-to-Cache is for models that take "
                         "labels")
    sampler = args.sampler or (model.sampler if model.name in models.UVIT else "ddim")
    settings |= {"objective": "learning-to-cache", "proxy": "none", "guidance": 1.0,
                 "steps": model.steps if args.steps is None else args.steps, "sampler": sampler}
    plan(args.model, sampler, settings["steps"])
    classes = list_classes(args.images) if args.images else None
    model = models.load(args.model, args.weights, args.device, args.dtype)
    models.choose_kernels(model.device)
    if args.images:
        draw = folder(args.images, model, models.load_autoencoder(model, args.vae), classes)
    else:
        draw = digits()
    out = args.out or Path("runs") / f"{args.model}-ltc"
    print(f"{args.model} on {model.device}: Learning-to-Cache, beta {settings['beta']:g}, "
          f"T = {settings['steps']}, seed {settings['seed']} -> {out}")
    files = [str(file) for known in classes or () for file in known]
    with training.run_folder(out):
        training.report(train(model, settings, out, draw, args.resume, files), settings, out)


if __name__ == "__main__":
    command.run(main)
