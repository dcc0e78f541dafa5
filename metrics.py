"""How good are these images? FID, sFID, Inception score, precision and recall, as the ADM evaluator
defines them (Dhariwal and Nichol 2021, appendix; docs/METRICS.md has the differences), and the CLIP
score, in readable code.

    python sample.py --num-samples 2000 --batch-size 200 --out samples.npz
    python metrics.py samples.npz                    # against the shipped digits
    python metrics.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python metrics.py pictures/ --captions prompts.txt --metrics clip
    torchrun --nproc_per_node 4 metrics.py images/ --reference VIRTUAL_imagenet256_labeled.npz

Notation: N images, M reference images, D pooled and S spatial features of an image, k neighbours.
"""

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import functools
import itertools
import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

import command
import distributed
import features
import models
import pictures
import shipped
from feature_statistics import (  # noqa: F401, as notebooks use Moments from here
    Moments,
    Statistics,
    able,
    extract,
    full_precision,
    known,
    load_statistics,
    look,
    of_network,
    save_statistics,
    statistics_of,
)

# ------------------------------------------------------------------------------------------------
# Frechet distance


def square_root(sigma):
    """A covariance matrix sigma (D, D) -> A (D, rank) with sigma = A A^T. Eigenvalues that are zero
    up to rounding are left out; with fewer images than features most are zero. Raises ValueError if
    there are clearly negative ones."""
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)  # rounding breaks the symmetry
    if values[0] < -1e-3 * values.abs().max():
        raise ValueError(f"no covariance: it has the eigenvalue {values[0]:.3g}")
    kept = values > values[-1].abs() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The squared Frechet distance of two Gaussians (Heusel et al. 2017, equation 6):

        d^2 = |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr (sigma1 sigma2)^(1/2)

    With sigma1 = A A^T and sigma2 = B B^T the eigenvalues of sigma1 sigma2 are the squared singular
    values of A^T B, so the last trace is the sum of these singular values: stable for singular
    matrices, where a matrix square root needs a multiple of I added. mu (D,), sigma (D, D), arrays
    or tensors -> float. Raises ValueError for other shapes (of one feature, too, they are (1,) and
    (1, 1)), for what is no covariance, and for values that are not finite.
    """
    tensors = [torch.as_tensor(x).cpu() for x in (mu1, sigma1, mu2, sigma2)]
    if any(x.is_complex() for x in tensors):
        raise ValueError("means and covariances must be real")
    mu1, sigma1, mu2, sigma2 = tensors = [x.double() for x in tensors]
    D, shapes = mu1.numel(), [tuple(x.shape) for x in tensors]
    if shapes != [(D,), (D, D)] * 2 or not D:
        raise ValueError(f"means and covariances of shapes {shapes} do not go together: (D,) and "
                         "(D, D), twice")
    if not all(x.isfinite().all() for x in tensors):
        raise ValueError("means and covariances must be finite: were the features?")
    cross = torch.linalg.svdvals(square_root(sigma1).T @ square_root(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return distance.clamp(min=0).item()  # equal Gaussians: rounding may leave less than 0


# ------------------------------------------------------------------------------------------------
# Inception score


def inception_score(logits, split_size=5000):
    """exp E_x KL(p(y|x) || p(y)), the mean over splits (Salimans et al. 2016, section 4).

    logits (N, classes) -> float. p(y) is the mean over a split. The images are first permuted by a
    fixed seed, then split into as many equal parts as have `split_size` images or more. The ADM
    evaluator splits them in their order, in which a split may hold few of the classes, and its last
    split is the rest, which may be one image with a score of 1: either can halve the mean. Up to
    5,000 images are one split, here as there. Raises ValueError for none, and for NaN.
    """
    if logits.ndim != 2 or not logits.numel() or not logits.isfinite().all():
        raise ValueError(f"the Inception score needs finite logits (N, classes), not "
                         f"{tuple(logits.shape)}")
    N = len(logits)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    scores = []
    for part in logits.cpu()[order].double().tensor_split(max(1, N // split_size)):
        log_p = part.log_softmax(1)
        p = log_p.exp()
        # A class that no image has adds 0 to the sum; unclamped, it would add 0 * inf = NaN.
        log_mean = p.mean(0, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny).log()
        scores.append((p * (log_p - log_mean)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


# ------------------------------------------------------------------------------------------------
# Precision and recall

BLOCK = 2**26  # distances in memory at a time: 256 MB


def blocks(a, b):
    """|a_i - b_j|^2 = |a_i|^2 + |b_j|^2 - 2 a_i b_j for a (N, D) and b (M, D), by blocks of rows:
    yields the rows' slice and (rows, M). Both must be centred near zero: far from it, large numbers
    nearly cancel."""
    b_norm = b.square().sum(1)
    rows = max(1, BLOCK // len(b))
    for first in range(0, len(a), rows):
        part = a[first : first + rows]
        squared = torch.addmm(b_norm, part, b.T, alpha=-2)
        yield slice(first, first + rows), squared.add_(part.square().sum(1)[:, None]).clamp_(min=0)


def neighbour_radii(x, k):
    """x (N, D) -> the squared distance from each to its k-th nearest neighbour (N,)."""
    radii = torch.empty(len(x), dtype=x.dtype, device=x.device)
    for rows, squared in blocks(x, x):
        radii[rows] = squared.topk(k + 1, largest=False).values[:, k]  # the nearest is itself
    return radii


def precision_recall(samples, reference, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 to 3).

    Precision is the share of samples inside the reference's manifold; recall the share of reference
    images inside the samples' manifold. A manifold is the union of one ball per image, its radius
    the distance to the k-th nearest image of the same set. samples (N, D), reference (M, D) -> two
    floats. Raises ValueError for k or fewer images, and for k below 1.
    """
    if k < 1 or min(len(samples), len(reference)) <= k:
        raise ValueError(f"{k} nearest neighbours need more than {k} images, and k is 1 or more")
    with full_precision():
        centre = reference.mean(0)
        samples, reference = samples - centre, reference - centre
        sample_radii, reference_radii = neighbour_radii(samples, k), neighbour_radii(reference, k)
        precise = torch.zeros(len(samples), dtype=torch.bool)
        recalled = torch.zeros(len(reference), dtype=torch.bool)
        for rows, squared in blocks(samples, reference):
            precise[rows] = (squared <= reference_radii).any(1).cpu()
            recalled |= (squared <= sample_radii[rows, None]).any(0).cpu()
    return precise.double().mean().item(), recalled.double().mean().item()


def nearest_distance(samples, reference):
    """Does a model only memorise? The mean distance from a sample to the nearest reference image,
    and, to compare, from a reference image to the nearest other one. For new images both are about
    equal. For copies the first is 0, but for the rounding of features, which may differ with the
    batch. samples (N, D), reference (M, D) -> two floats. Raises ValueError for no samples, or
    fewer than two reference images."""
    if not len(samples) or len(reference) < 2:
        raise ValueError("nearest distances need one sample and two reference images or more")
    with full_precision():
        centre = reference.mean(0)
        samples, reference = samples - centre, reference - centre
        return (distance_to_nearest(samples, reference).mean().item(),
                distance_to_nearest(reference, reference, itself=False).mean().item())


def distance_to_nearest(a, b, itself=True):
    """The distance from each of a (N, D) to the nearest of b (M, D) -> (N,) float64 on the CPU. If
    not `itself`, a is b, and an image does not count as its own neighbour."""
    distances = []
    for rows, squared in blocks(a, b):
        if not itself:
            squared.diagonal(rows.start).fill_(torch.inf)
        # `blocks` rounds: of a distance of 0 about 0.01 would be left. The difference is exact.
        distances.append((a[rows] - b[squared.argmin(1)]).cpu().double().norm(dim=1))
    return torch.cat(distances)


# ------------------------------------------------------------------------------------------------
# CLIP score; the error between pairs of images


@torch.no_grad()
def clip_score(images, prompts, clip, batch_size=64):
    """100 max(cos(image, prompt), 0), the mean over pairs (Hessel et al. 2021, equation 1, with
    weight 100). images: N arrays uint8 (H, W, 3); prompts: N strings; clip: the result of
    `features.load_clip` -> float. Warns of prompts that are cut, as they have more tokens than CLIP
    looks at. With several processes, both are this one's share, and the mean is over all pairs.
    Raises ValueError if there are not as many prompts as images, or none."""
    network, preprocess, tokenizer = clip
    device = next(network.parameters()).device
    pairs = zip(images, prompts, strict=True)
    scores, long = [], []
    bar = command.progress(total=len(prompts), unit="image", desc="CLIP")
    with full_precision(), bar:
        while batch := list(itertools.islice(pairs, batch_size)):
            pixels = torch.stack([preprocess(Image.fromarray(image)) for image, _ in batch])
            words = [prompt for _, prompt in batch]
            tokens = tokenizer(words)
            long += features.cut(words, tokens, tokenizer)
            image = network.encode_image(pixels.to(device), normalize=True)  # (B, D) of length 1
            text = network.encode_text(tokens.to(device), normalize=True)  # the same
            scores.append(100 * (image * text).sum(1).clamp(min=0).cpu().double())
            bar.update(len(batch))
    if not scores:
        raise ValueError("the CLIP score needs an image or more")
    part = torch.stack([torch.cat(scores).sum(), *torch.tensor([len(prompts), len(long)])])
    total, count, cut = distributed.together(part[None], distributed.size()).sum(0).tolist()
    if cut:
        example = f': "{long[0][:40]}..."' if long else ""
        warnings.warn(f"{cut:.0f} of {count:.0f} captions have more than {tokens.shape[1]} tokens, "
                      f"and CLIP sees no further{example}", stacklevel=2)
    if not math.isfinite(total):
        raise ValueError("CLIP's cosines are not finite: are its weights right?")
    return total / count


def paired_error(images, uncached):
    """How far images are from those made without a cache from the same noise: the mean squared
    error of pixels in [-1, 1], and the mean SSIM. Both uint8 (N, H, W, 3) -> two floats. Raises
    ValueError for unequal shapes, no images, sides below 11, or pixels that are not uint8."""
    if (images.shape != uncached.shape or images.ndim != 4 or not len(images)
            or min(images.shape[1:3]) < 11):
        raise ValueError(f"cannot pair images of {images.shape} and {uncached.shape}: shapes must "
                         "be equal, (N, H, W, 3), and sides 11 pixels or more")
    if images.dtype != np.uint8 or uncached.dtype != np.uint8:
        raise ValueError(f"cannot pair pixels of {images.dtype} and {uncached.dtype}: use uint8")
    mse, ssim = 0.0, 0.0
    for x, y in zip(images, uncached, strict=True):
        x, y = x / 127.5 - 1, y / 127.5 - 1
        mse += np.square(x - y).mean() / len(images)
        ssim += similarity(x, y) / len(images)
    return mse, ssim


def similarity(x, y):
    """SSIM of two images (H, W, C) in [-1, 1] (Wang et al. 2004, equation 13): Gaussian window of
    11 x 11 pixels, standard deviation 1.5, K1 = 0.01, K2 = 0.03. The mean is over the pixels whose
    window lies inside the image."""
    def window(values):
        return gaussian_filter(values, (1.5, 1.5, 0), truncate=3.5)[5:-5, 5:-5]  # (H-10, W-10, C)

    C1, C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # (K L)^2 with the range of the pixels L = 2
    mean_x, mean_y = window(x), window(y)
    var_x, var_y = window(x * x) - mean_x**2, window(y * y) - mean_y**2
    cov = window(x * y) - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + C1) * (2 * cov + C2)
    return (numerator / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))).mean()


# ------------------------------------------------------------------------------------------------
# All metrics of one set against another

METRICS = {  # name: (title in the table, which values are better)
    "fid": ("FID", "lower"),
    "sfid": ("sFID", "lower"),
    "is": ("Inception score", "higher"),
    "precision": ("precision", "higher"),
    "recall": ("recall", "higher"),
    "nearest": ("nearest distance", "near"),  # near that of the reference images
    "clip": ("CLIP score", "higher"),
}


def choose_metrics(samples, reference, names=None):
    """`names`, by default all that two sets suffice for, whose lists of `able` these are. Raises
    ValueError for others."""
    allowed = [name for name in METRICS if name in samples and (name in reference or name == "is")]
    names = allowed if names is None else names
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name}: use {', '.join(METRICS)}")
        if name not in allowed:
            needs = {"is": "images, not only statistics, and a network that predicts classes",
                     "sfid": "mu_s and sigma_s, the statistics of spatial features, of both sets",
                     "clip": "captions: use clip_score"}
            images = "more than 3 images in each set, not only statistics"
            raise ValueError(f"{name} needs {needs.get(name, images)}")
    return names


def compare(samples, reference, metrics=None, device="cpu"):
    """The metrics of one set's Statistics against another's: {name: float}. `metrics` are their
    names, by default all that the two suffice for. `nearest` comes with `nearest_reference`, the
    second value of `nearest_distance`. Raises ValueError for Statistics of two networks, and for
    metrics that need more than them, as clip does."""
    if samples.network != reference.network or len(samples.mu) != len(reference.mu):
        raise ValueError(f"{len(samples.mu)} features of {samples.network} and "
                         f"{len(reference.mu)} features of {reference.network} cannot be compared")
    metrics = choose_metrics(able(samples), able(reference), metrics)
    values, a, b = {}, samples, reference
    if "fid" in metrics:
        values["fid"] = frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
    if "sfid" in metrics:
        values["sfid"] = frechet_distance(a.mu_s, a.sigma_s, b.mu_s, b.sigma_s)
    if "is" in metrics:
        values["is"] = inception_score(a.logits)
    if not {"precision", "recall", "nearest"}.isdisjoint(metrics):
        pooled = a.pooled.to(device), b.pooled.to(device)
    if not {"precision", "recall"}.isdisjoint(metrics):
        values["precision"], values["recall"] = precision_recall(*pooled)
    if "nearest" in metrics:
        values["nearest"], values["nearest_reference"] = nearest_distance(*pooled)
    return {name: value for name, value in values.items()
            if name in (*metrics, "nearest_reference")}  # not the recall that precision came with


def evaluate(samples, reference="digits", metrics=None, network=None, batch_size=64):
    """The metrics of a set of images against a reference, as `compare` returns them.

    Both sets are anything that `pictures.read` takes, an npz of statistics, or Statistics (so that
    one reference serves for many sets). `network` is a feature network, by default the usual one of
    the reference. `clip_score` and `paired_error` are separate, as they need more than features.
    Raises ValueError, FileNotFoundError or ConnectionError, with one line that says what to do."""
    if network is None:
        network = features.load(usual_features(reference))
    reference = statistics_of(reference, network, batch_size, "reference")
    samples = statistics_of(samples, network, batch_size, "samples")
    return compare(samples, reference, metrics, next(network.parameters()).device)


def usual_features(reference):
    """The feature network for a reference, by name: that of a shipped data set, that of statistics,
    else inception."""
    if isinstance(reference, str) and pictures.is_named(reference):
        return reference.split("-")[0]  # digits-held-out: digits
    statistics = known(reference)
    name = statistics.network if statistics else None
    return {"digits classifier": "digits", "emoji encoder": "emoji"}.get(name, "inception")


# ------------------------------------------------------------------------------------------------
# The command


def read_arguments():
    """The flags, `metrics` as a list of names or None for all that are possible. Raises ValueError
    for flags that do not go together."""
    parser = command.Parser(__doc__)
    parser.add_argument("samples", type=command.name,
                        help="a folder of images, an npz file, or digits, emoji, ...")
    parser.add_argument("--reference", type=command.name, default="digits",
                        help="what the samples are compared with, given in the same ways, or an "
                        "npz of statistics (digits)")
    parser.add_argument("--metrics", type=command.name,
                        help=f"a list of {','.join(METRICS)}; default: all possible")
    parser.add_argument("--features", type=command.name,
                        help="inception, digits or emoji (as the reference needs)")
    parser.add_argument("--weights", type=command.name,
                        help="Inception's weights, if not pytorch-fid's")
    parser.add_argument("--resize", default="tf1", choices=["tf1", "pytorch-fid"],
                        help="Inception's preprocessing (tf1)")
    parser.add_argument("--captions", type=command.name, help="a file with one caption a line, in "
                        "the order of the images' names, numbers in them by value (2.png before "
                        "10.png)")
    parser.add_argument("--clip-model", type=command.name, default="ViT-B-32",
                        help="a model of open_clip, or emoji for the shipped encoder (ViT-B-32)")
    parser.add_argument("--clip-pretrained", type=command.name, default="openai",
                        help="tag or file of its weights (openai)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (64)")
    command.add_device_flag(parser)
    parser.add_argument("--save-stats", type=command.name,
                        help="write the samples' statistics, an npz")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args()
    if not 1 <= args.batch_size <= 2**31:
        raise ValueError("--batch-size must be 1 or more, and a number of images")
    if args.metrics is not None:
        args.metrics = [name.strip() for name in args.metrics.split(",") if name.strip()]
        unknown = [name for name in args.metrics if name not in METRICS]
        if unknown or not args.metrics:
            words = f"unknown metric {', '.join(unknown)}" if unknown else "--metrics names none"
            raise ValueError(f"{words}: use {', '.join(METRICS)}")
        if ("clip" in args.metrics) != bool(args.captions):
            raise ValueError("the CLIP score and --captions FILE go together")
    check_save_stats(args)
    return args


def check_save_stats(args):
    """Raises ValueError for a --save-stats that would destroy what is read, or never be written."""
    if args.save_stats is None:
        return
    if Path(args.save_stats).suffix != ".npz":
        raise ValueError(f"--save-stats takes a name that ends in .npz, not {args.save_stats}")
    if args.metrics == ["clip"]:
        raise ValueError("the CLIP score alone makes no statistics: leave --save-stats out")
    command.check_not_read(args.save_stats, args.samples, args.reference, args.captions,
                           args.weights, args.clip_pretrained)


def read_captions(args):
    """The captions of the samples: a list, None without --captions. Raises ValueError if there are
    not as many as images, or none; FileNotFoundError."""
    if not args.captions:
        return None
    total, captions = pictures.read(args.samples)[0], shipped.read_lines(args.captions)
    if len(captions) != total or not total:
        raise ValueError(f"{args.captions} has {len(captions)} captions for {total} images")
    return captions


def open_sets(args):
    """Samples and reference before any image is looked at: Statistics where the file holds them,
    else what was given. Raises ValueError if either is no set of two or more images, or damaged."""
    sets = []
    for name in (args.samples, args.reference):
        sets.append(known(name) or name)
        images = sets[-1].images if isinstance(sets[-1], Statistics) else name
        total = 2 if images is None else pictures.read(images)[0]
        if total < 2:
            raise ValueError(f"{total} images in {name}: statistics need two or more")
    return sets


def prepare(args, names):
    """Finds before the long work what would fail in the middle of it -> the network, samples and
    reference for `statistics_of`. Of each set the first image is looked at. Raises ValueError."""
    sets = open_sets(args)
    kind = args.features or usual_features(sets[1])
    with distributed.first_process_first():
        network = features.load(kind, args.weights, args.device, args.resize)
    shapes = []
    for j, name in enumerate((args.samples, args.reference)):
        images = sets[j]
        if isinstance(images, Statistics):
            sets[j], images = of_network(images, network, name), images.images
        if images is not None:
            first = next(pictures.read(images)[1])
            look(np.stack([first]), network)
            shapes.append(" x ".join(map(str, first.shape[:2])))
    choose_metrics(*(able(each, network) for each in sets), names)
    if len(set(shapes)) > 1:
        warnings.warn(f"samples are {shapes[0]}, the reference {shapes[1]}: their metrics also "
                      "measure what resizing does", stacklevel=2)
    return network, *sets


def table(values, networks):
    """The table of the terminal, one line a metric: value, which values are better, network."""
    lines = [f"{'metric':17}{'value':>9}  {'better':11}  network"]
    for name, value in values.items():
        if name in METRICS:
            title, better = METRICS[name]
            if name == "nearest":
                better += f" {values['nearest_reference']:.4f}"
            lines.append(f"{title:17}{value:9.4f}  {better:11}  {networks[name]}")
    return "\n".join(lines)


def main():
    args = read_arguments()
    args.device = distributed.join(models.find_device(args.device))
    captions = read_captions(args)
    names = args.metrics and [name for name in args.metrics if name != "clip"]
    if args.metrics != ["clip"]:
        network, samples, reference = prepare(args, names)
    if args.save_stats:
        command.check_writable(args.save_stats)

    values, clip_value, networks, sizes = {}, {}, {}, {}
    if captions:
        with distributed.first_process_first():
            clip = features.load_clip(args.clip_model, args.clip_pretrained, args.device)
        mine = functools.partial(distributed.mine, group=args.batch_size)
        total, images = pictures.read(args.samples, mine)
        distributed.check_enough(math.ceil(total / args.batch_size),
                                 "batches of images: use a smaller --batch-size")
        captions = [captions[j] for j in mine(total)]
        clip_value = {"clip": clip_score(images, captions, clip, args.batch_size)}
        networks["clip"] = f"open_clip {args.clip_model}, {args.clip_pretrained}"
        if args.clip_model == "emoji":
            networks["clip"] = clip[0].name
        sizes = {"images": total}
    if args.metrics != ["clip"]:
        samples = statistics_of(samples, network, args.batch_size, "samples")
        if args.save_stats and distributed.rank() == 0:
            save_statistics(args.save_stats, samples)
        reference = statistics_of(reference, network, args.batch_size, "reference")
        values = evaluate(samples, reference, names, network)
        networks |= dict.fromkeys(values, network.name)
        sizes = {"images": samples.count, "reference": args.reference,
                 "reference_images": reference.count}
        if samples.count and samples.count <= len(samples.mu):
            print(f"note: {samples.count} images span fewer than the {len(samples.mu)} features; "
                  "FID is biased upwards, compare it at equal numbers only", file=sys.stderr)
    values |= clip_value

    if args.json:
        about = {"samples": args.samples, **sizes, "values": values, "networks": networks}
        print(json.dumps(about))
    else:
        print(", ".join(f"{key.replace('_', ' ')} {'unknown' if value is None else value}"
                        for key, value in sizes.items()))
        print(table(values, networks))


if __name__ == "__main__":
    command.run(main, several=True)
