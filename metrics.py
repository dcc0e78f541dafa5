"""How good are these images? FID, sFID, Inception score, precision and recall, as the ADM evaluator
defines them (Dhariwal and Nichol 2021, appendix), and the CLIP score, in readable code.

    python sample.py --num-samples 2000 --batch-size 200 --out samples.npz
    python metrics.py samples.npz                    # against the shipped digits
    python metrics.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python metrics.py pictures/ --captions prompts.txt --metrics clip

Notation: N images, M reference images, D pooled and S spatial features of an image, k neighbours.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

import command
import features
import models
import pictures
import shipped

# ------------------------------------------------------------------------------------------------
# Frechet distance


class Moments:
    """Mean and covariance of a stream of vectors, float64 (Chan, Golub and LeVeque 1979)."""

    def __init__(self):
        self.n, self.mean, self.scatter = 0, 0.0, 0.0  # scatter = sum (x - mean) (x - mean)^T

    def add(self, x):
        """Adds a batch x (B, D)."""
        x = x.double()
        B, mean = len(x), x.mean(0)
        centred, delta = x - mean, mean - self.mean
        self.scatter = self.scatter + centred.T @ centred
        # The two scatters are about two means: this term moves both to the common mean.
        self.scatter += torch.outer(delta, delta) * (self.n * B / (self.n + B))
        self.mean = self.mean + delta * (B / (self.n + B))
        self.n += B

    @property
    def covariance(self):
        """(D, D), divided by n - 1."""
        return self.scatter / (self.n - 1)


def square_root(sigma):
    """A covariance matrix sigma (D, D) -> A (D, rank) with sigma = A A^T. Eigenvalues that are zero
    up to rounding are left out; with fewer images than features most are zero."""
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)  # rounding breaks the symmetry
    kept = values > values[-1].abs() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The squared Frechet distance of two Gaussians (Heusel et al. 2017, equation 6):

        d^2 = |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr (sigma1 sigma2)^(1/2)

    With sigma1 = A A^T and sigma2 = B B^T the eigenvalues of sigma1 sigma2 are the squared singular
    values of A^T B, so the last trace is the sum of these singular values: stable for singular
    matrices, where a matrix square root needs a multiple of I added. mu (D,), sigma (D, D), arrays
    or tensors -> float. Raises ValueError for other shapes and for values that are not finite.
    """
    tensors = [torch.as_tensor(x, dtype=torch.float64) for x in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = tensors
    D, shapes = len(mu1), [tuple(x.shape) for x in tensors]
    if shapes != [(D,), (D, D)] * 2:
        raise ValueError(f"means and covariances of shapes {shapes} do not go together")
    if not all(x.isfinite().all() for x in tensors):
        raise ValueError("means and covariances must be finite: were the features?")
    cross = torch.linalg.svdvals(square_root(sigma1).T @ square_root(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return distance.clamp(min=0).item()  # equal Gaussians: rounding may leave less than 0


# ------------------------------------------------------------------------------------------------
# Inception score


def inception_score(logits, split_size=5000):
    """exp E_x KL(p(y|x) || p(y)), the mean over splits (Salimans et al. 2016, section 4).

    logits (N, classes), in the order of the images -> float. p(y) is the mean over a split of
    `split_size` images; the last split may be smaller, as in the ADM evaluator.
    """
    scores = []
    for part in logits.double().split(split_size):
        log_p = part.log_softmax(1)
        p = log_p.exp()
        # A class that no image has adds 0 to the sum; unclamped, it would add 0 * inf = NaN.
        log_mean = p.mean(0, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny).log()
        scores.append((p * (log_p - log_mean)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


# ------------------------------------------------------------------------------------------------
# Precision and recall

BLOCK = 2**26  # distances in memory at a time: 256 MB


@contextlib.contextmanager
def full_precision():
    """Switches TF32 off inside the block: its 10 bits of mantissa are too few for distances."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


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
    floats. Raises ValueError for k or fewer images.
    """
    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"{k} nearest neighbours need more than {k} images")
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
    and, to compare, from a reference image to the nearest other one. For copies the first is 0; for
    new images both are about equal. samples (N, D), reference (M, D) -> two floats."""
    with full_precision():
        centre = reference.mean(0)
        samples, reference = samples - centre, reference - centre
        nearest = torch.cat([squared.amin(1) for _, squared in blocks(samples, reference)])
        return nearest.sqrt().mean().item(), neighbour_radii(reference, 1).sqrt().mean().item()


# ------------------------------------------------------------------------------------------------
# CLIP score; the error between pairs of images


@torch.no_grad()
def clip_score(images, prompts, clip, batch_size=64):
    """100 max(cos(image, prompt), 0), the mean over pairs (Hessel et al. 2021, equation 1, with
    weight 100). images: N arrays uint8 (H, W, 3); prompts: N strings; clip: the result of
    `features.load_clip` -> float. Raises ValueError if there are not as many prompts as images."""
    network, preprocess, tokenizer = clip
    device = next(network.parameters()).device
    pairs = zip(images, prompts, strict=True)
    scores = []
    with full_precision(), tqdm(total=len(prompts), unit="image", desc="CLIP", disable=None) as bar:
        while batch := list(itertools.islice(pairs, batch_size)):
            pixels = torch.stack([preprocess(Image.fromarray(image)) for image, _ in batch])
            tokens = tokenizer([prompt for _, prompt in batch])
            image = network.encode_image(pixels.to(device), normalize=True)  # (B, D) of length 1
            text = network.encode_text(tokens.to(device), normalize=True)  # the same
            scores.append(100 * (image * text).sum(1).clamp(min=0).double().cpu())
            bar.update(len(batch))
    return torch.cat(scores).mean().item()


def paired_error(images, uncached):
    """How far images are from those made without a cache from the same noise: the mean squared
    error of pixels in [-1, 1], and the mean SSIM. Both uint8 (N, H, W, 3) -> two floats. Raises
    ValueError for unequal shapes or sides below 11."""
    if images.shape != uncached.shape or min(images.shape[1:3]) < 11:
        raise ValueError(f"cannot pair images of {images.shape} and {uncached.shape}: shapes must "
                         "be equal, and sides 11 pixels or more")
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
# Statistics: the features of a set of images

SHIPPED_STATISTICS = {  # (source, network): file
    ("digits", "digits classifier"): features.SHIPPED / "digits_statistics.npz",
    ("digits-held-out", "digits classifier"): features.SHIPPED / "digits_held_out_statistics.npz",
}
ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "pooled", "logits")
ADM_NETWORK = "Inception 2015-12-05, resize tf1"  # ADM's files do not name their network


@dataclasses.dataclass
class Statistics:
    """Means and covariances of the pooled and of the spatial features. Where they are known, also
    the features of the single images: precision, recall and the Inception score need them."""

    network: str  # the name of the feature network
    count: int | None  # of images; None: the file does not say
    mu: torch.Tensor  # (D,) float64
    sigma: torch.Tensor  # (D, D)
    mu_s: torch.Tensor  # (S,)
    sigma_s: torch.Tensor  # (S, S)
    pooled: torch.Tensor | None = None  # (N, D) float32
    logits: torch.Tensor | None = None  # (N, classes)


@torch.no_grad()
def extract(source, network, batch_size=64, title="features"):
    """Runs all images of `source` (see `pictures.read`) through a feature network -> Statistics.

    Only the features stay in memory: 12 KB an image for Inception. `title` names the source on the
    progress bar. Raises ValueError for fewer than two images, and as `pictures.read` does.
    """
    total, images = pictures.read(source)
    if total < 2:
        raise ValueError(f"{total} images in {title}: statistics need two or more")
    device = next(network.parameters()).device
    moments, spatial_moments, kept = Moments(), Moments(), []
    with full_precision():
        for batch in pictures.batches(images, total, batch_size, title):
            pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).to(device)  # (B, 3, H, W)
            pooled, spatial, logits = (x if x is None else x.float().cpu() for x in network(pixels))
            moments.add(pooled)
            spatial_moments.add(spatial)
            kept.append((pooled, logits))
    pooled, logits = zip(*kept, strict=True)
    pooled, logits = torch.cat(pooled), None if logits[0] is None else torch.cat(logits)
    return Statistics(network.name, total, moments.mean, moments.covariance,
                      spatial_moments.mean, spatial_moments.covariance, pooled, logits)


def save_statistics(path, statistics):
    """Writes an npz that the ADM evaluator can read, with `network`, `images` (their number),
    `pooled` and `logits` besides."""
    arrays = {key: getattr(statistics, key) for key in ARRAYS}
    arrays = {key: array.numpy() for key, array in arrays.items() if array is not None}
    with command.replacing(path) as temporary:
        np.savez_compressed(temporary, network=statistics.network, images=statistics.count,
                            **arrays)


def load_statistics(path):
    """Reads an npz of `save_statistics` or of ADM's authors -> Statistics, or None if it has images
    only. Raises ValueError if it is damaged or incomplete."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an npz file, or not a whole one")
    try:
        with np.load(path, allow_pickle=False) as data:
            if "mu" not in data:
                return None
            arrays = {key: torch.from_numpy(data[key]) for key in ARRAYS if key in data}
            network = str(data["network"]) if "network" in data else ADM_NETWORK
            count = int(data["images"]) if "images" in data else None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a whole npz of statistics: {error}") from error
    missing = [key for key in ARRAYS[:4] if key not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return Statistics(network, count, **arrays)


def statistics_of(source, network, batch_size=64, title="features"):
    """Statistics of a set of images: passed on, if `source` is Statistics; read, if there is a file
    of them; else from `extract`. Raises ValueError if the file's are of another network, and as
    `extract` does."""
    if isinstance(source, Statistics):
        return source
    if not isinstance(source, str | Path):
        return extract(source, network, batch_size, title)
    path = Path(SHIPPED_STATISTICS.get((str(source), network.name), source))
    known = load_statistics(path) if path.suffix == ".npz" and path.is_file() else None
    if known is None:
        return extract(source, network, batch_size, title)
    if known.network != network.name:
        raise ValueError(f"{path} holds statistics of another network: of {known.network}, not of "
                         f"{network.name}; see --features and --resize")
    with zipfile.ZipFile(path) as archive:
        has_images = "arr_0.npy" in archive.namelist()
    if has_images:  # ADM's references: 10,000 images beside the statistics of a whole data set
        seen = extract(path, network, batch_size, title)
        known = dataclasses.replace(known, pooled=seen.pooled, logits=seen.logits)
    return known


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
    """`names`, by default all that the Statistics suffice for. Raises ValueError for others."""
    allowed = ["fid", "sfid"]
    allowed += ["is"] if samples.logits is not None else []
    if all(x.pooled is not None and len(x.pooled) > 3 for x in (samples, reference)):
        allowed += ["precision", "recall", "nearest"]
    names = allowed if names is None else names
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name}: use {', '.join(METRICS)}")
        if name not in allowed:
            needs = {"is": "images, not only statistics, and a network that predicts classes",
                     "clip": "captions: use clip_score"}
            images = "more than 3 images in each set, not only statistics"
            raise ValueError(f"{name} needs {needs.get(name, images)}")
    return names


def compare(samples, reference, metrics=None, device="cpu"):
    """The metrics of one set's Statistics against another's: {name: float}. `metrics` are their
    names, by default all that the two suffice for. `nearest` comes with `nearest_reference`, the
    second value of `nearest_distance`. Raises ValueError for Statistics of two networks, and for
    metrics that need more than them, as clip does."""
    if samples.network != reference.network:
        raise ValueError(f"features of {samples.network} and of {reference.network} cannot be "
                         "compared")
    metrics = choose_metrics(samples, reference, metrics)
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
    samples = statistics_of(samples, network, batch_size, "samples")
    reference = statistics_of(reference, network, batch_size, "reference")
    return compare(samples, reference, metrics, next(network.parameters()).device)


def usual_features(reference):
    """The feature network for a reference, by name: that of a shipped data set, that of statistics,
    else inception."""
    if isinstance(reference, str) and reference in pictures.NAMED:
        return reference.split("-")[0]  # digits-held-out: digits
    if isinstance(reference, str | Path) and Path(reference).suffix == ".npz":
        reference = load_statistics(reference) if Path(reference).is_file() else None
    name = reference.network if isinstance(reference, Statistics) else ""
    return {"digits classifier": "digits", "emoji encoder": "emoji"}.get(name, "inception")


# ------------------------------------------------------------------------------------------------
# The command


def read_arguments():
    """The flags, `metrics` as a list of names or None for all that are possible. What can be found
    wrong before any work is done is found here: raises ValueError, or OSError."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", help="a folder of images, an npz file, or digits, emoji, ...")
    parser.add_argument("--reference", default="digits", help="what the samples are compared with, "
                        "given in the same ways, or an npz of statistics (digits)")
    parser.add_argument("--metrics", help=f"a list of {','.join(METRICS)}; default: all possible")
    parser.add_argument("--features", help="inception, digits or emoji (as the reference needs)")
    parser.add_argument("--weights", help="Inception's weights, if not pytorch-fid's")
    parser.add_argument("--resize", default="tf1", choices=["tf1", "pytorch-fid"],
                        help="Inception's preprocessing (tf1)")
    parser.add_argument("--captions", help="a file with one caption a line, in the order of the "
                        "images' names, sorted as text (007.png before 010.png)")
    parser.add_argument("--clip-model", default="ViT-B-32",
                        help="a model of open_clip, or emoji for the shipped encoder (ViT-B-32)")
    parser.add_argument("--clip-pretrained", default="openai",
                        help="open_clip's tag of its weights, or a file (openai)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (64)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--save-stats", type=Path, help="write the samples' statistics, an npz")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise ValueError("--batch-size must be 1 or more")
    if args.metrics is not None:
        args.metrics = [name.strip() for name in args.metrics.split(",") if name.strip()]
        unknown = [name for name in args.metrics if name not in METRICS]
        if unknown or not args.metrics:
            raise ValueError(f"unknown metric {', '.join(unknown)}: use {', '.join(METRICS)}")
        if ("clip" in args.metrics) != bool(args.captions):
            raise ValueError("the CLIP score and --captions FILE go together")
    if args.save_stats:
        if args.save_stats.suffix != ".npz":
            raise ValueError(f"--save-stats takes a name that ends in .npz, not {args.save_stats}")
        command.check_writable(args.save_stats)
    args.device = models.find_device(args.device)
    for source in (args.samples, *([args.reference] if args.metrics != ["clip"] else [])):
        if not (source.endswith(".npz") and Path(source).is_file() and load_statistics(source)):
            pictures.read(source)
    return args


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
    names = args.metrics
    if args.captions:  # before the long work, as a mistake in the captions shows here
        total, images = pictures.read(args.samples)
        captions = shipped.read_lines(args.captions)
        if len(captions) != total or not total:
            raise ValueError(f"{args.captions} has {len(captions)} captions for {total} images")
        clip = features.load_clip(args.clip_model, args.clip_pretrained, args.device)

    values, networks, sizes = {}, {}, {}
    if names != ["clip"]:
        kind = args.features or usual_features(args.reference)
        network = features.load(kind, args.weights, args.device, args.resize)
        samples = statistics_of(args.samples, network, args.batch_size, "samples")
        if args.save_stats:
            save_statistics(args.save_stats, samples)
        reference = statistics_of(args.reference, network, args.batch_size, "reference")
        names = names and [name for name in names if name != "clip"]
        values = evaluate(samples, reference, names, network)
        networks = dict.fromkeys(values, network.name)
        sizes = {"images": samples.count, "reference": args.reference,
                 "reference_images": reference.count}
        if samples.count and samples.count <= len(samples.mu):
            print(f"note: {samples.count} images span fewer than the {len(samples.mu)} features; "
                  "FID is biased upwards, compare it at equal numbers only", file=sys.stderr)
    if args.captions:
        values["clip"] = clip_score(images, captions, clip, args.batch_size)
        networks["clip"] = f"open_clip {args.clip_model}, {args.clip_pretrained}"
        if args.clip_model == "emoji":
            networks["clip"] = clip[0].name
        sizes = {"images": total, **sizes}

    if args.json:
        about = {"samples": args.samples, **sizes, "values": values, "networks": networks}
        print(json.dumps(about))
    else:
        print(", ".join(f"{key.replace('_', ' ')} {'unknown' if value is None else value}"
                        for key, value in sizes.items()))
        print(table(values, networks))


if __name__ == "__main__":
    command.run(main)
