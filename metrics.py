"""How good are these images? FID, sFID, Inception score, precision and recall, CLIP score, as the
ADM evaluator defines them (Dhariwal and Nichol 2021, appendix), from readable code.

    python sample.py --num-samples 2000 --batch-size 200 --out samples.npz
    python metrics.py samples.npz                    # against the shipped digits
    python metrics.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python metrics.py pictures/ --captions prompts.txt --metrics clip

Letters: N images, D features of the pooled layer, S of the spatial one, k neighbours.
"""

if __name__ == "__main__":
    import interrupt  # noqa: F401, before the slow imports

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
        self.n, self.mean, self.scatter = 0, 0.0, 0.0

    def add(self, x):
        """x (B, D), one more batch."""
        x = x.double()
        B, mean = len(x), x.mean(0)
        centred, delta = x - mean, mean - self.mean
        self.scatter = self.scatter + centred.T @ centred
        self.scatter += torch.outer(delta, delta) * (self.n * B / (self.n + B))
        self.mean = self.mean + delta * (B / (self.n + B))
        self.n += B

    @property
    def covariance(self):
        """(D, D), divided by N - 1."""
        return self.scatter / (self.n - 1)


def square_root(sigma):
    """A (D, rank) with sigma = A A^T, for a covariance matrix (D, D). Eigenvalues that are zero up
    to rounding are left out: with fewer images than features most are."""
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    kept = values > values[-1].abs() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The squared Frechet distance of two Gaussians (Heusel et al. 2017, equation 6):

        d^2 = |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr (sigma1 sigma2)^(1/2)

    With sigma1 = A A^T and sigma2 = B B^T the eigenvalues of sigma1 sigma2 are the squared singular
    values of A^T B, so the last trace is the sum of those: stable for singular matrices, where a
    matrix square root needs a ridge. mu (D,), sigma (D, D), arrays or tensors -> float.

    Raises ValueError for other shapes, or values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (
        torch.as_tensor(x, dtype=torch.float64) for x in (mu1, sigma1, mu2, sigma2)
    )
    D = len(mu1)
    shapes = [tuple(x.shape) for x in (mu1, sigma1, mu2, sigma2)]
    if shapes != [(D,), (D, D)] * 2:
        raise ValueError(f"means and covariances of shapes {shapes} do not go together")
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("means and covariances must be finite: were the images?")
    cross = torch.linalg.svdvals(square_root(sigma1).T @ square_root(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return distance.clamp(min=0).item()


# ------------------------------------------------------------------------------------------------
# Inception score


def inception_score(logits, split_size=5000):
    """exp E_x KL(p(y|x) || p(y)), the mean over splits (Salimans et al. 2016, section 4).

    logits (N, classes), in the order of the images; p(y) is the mean within a split of
    `split_size` images, of which the last may be smaller, as in the ADM evaluator -> float.
    """
    scores = []
    for part in logits.double().split(split_size):
        log_p = part.log_softmax(1)
        p = log_p.exp()
        log_mean = p.mean(0, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny).log()
        scores.append((p * (log_p - log_mean)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


# ------------------------------------------------------------------------------------------------
# Precision and recall

BLOCK = 2**26  # distances held at once: 256 MB


@contextlib.contextmanager
def full_precision():
    """No TF32 in here: its 10 bits are too few for distances."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def blocks(a, b):
    """|a_i - b_j|^2 in blocks of rows: yields the rows' slice and (rows, M), for a (N, D) and
    b (M, D), both centred near zero, or |a|^2 + |b|^2 - 2 a.b loses digits."""
    b_norm = b.square().sum(1)
    rows = max(1, BLOCK // len(b))
    for first in range(0, len(a), rows):
        part = a[first : first + rows]
        squared = torch.addmm(b_norm, part, b.T, alpha=-2)
        yield slice(first, first + rows), squared.add_(part.square().sum(1)[:, None]).clamp_(min=0)


def neighbour_radii(x, k):
    """The squared distance from each of x (N, D) to its k-th nearest other: (N,)."""
    radii = torch.empty(len(x), dtype=x.dtype, device=x.device)
    for rows, squared in blocks(x, x):
        radii[rows] = squared.topk(k + 1, largest=False).values[:, k]  # the nearest is itself
    return radii


def precision_recall(samples, reference, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 to 3): the share of
    samples that lie within the manifold of the reference, and of reference images within that of
    the samples. A manifold is the union of balls about its images, each as wide as the distance to
    the k-th nearest other.

    samples (N, D), reference (M, D) -> two floats. Raises ValueError for k or fewer images.
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
    and, to compare, from a reference image to the nearest other one. Copies have 0 for the first;
    fresh images have about the second. samples (N, D), reference (M, D) -> two floats."""
    with full_precision():
        centre = reference.mean(0)
        samples, reference = samples - centre, reference - centre
        nearest = torch.cat([squared.amin(1) for _, squared in blocks(samples, reference)])
        return nearest.sqrt().mean().item(), neighbour_radii(reference, 1).sqrt().mean().item()


# ------------------------------------------------------------------------------------------------
# CLIP score, and the error of one image to another


@torch.no_grad()
def clip_score(images, prompts, clip, batch_size=64):
    """100 max(cos(image, prompt), 0), the mean over pairs (Hessel et al. 2021, equation 1, with
    100 for its weight). images are N arrays uint8 (H, W, 3), prompts N strings, clip is what
    `features.load_clip` gives -> float. Raises ValueError if the numbers differ."""
    network, preprocess, tokenizer = clip
    device = next(network.parameters()).device
    pairs = zip(images, prompts, strict=True)
    scores = []
    with full_precision(), tqdm(total=len(prompts), unit="image", desc="CLIP", disable=None) as bar:
        while batch := list(itertools.islice(pairs, batch_size)):
            pixels = torch.stack([preprocess(Image.fromarray(image)) for image, _ in batch])
            tokens = tokenizer([prompt for _, prompt in batch])
            image = network.encode_image(pixels.to(device), normalize=True)  # (B, D), length 1
            text = network.encode_text(tokens.to(device), normalize=True)
            scores.append(100 * (image * text).sum(1).clamp(min=0).double().cpu())
            bar.update(len(batch))
    return torch.cat(scores).mean().item()


def paired_error(images, uncached):
    """How far images are from the ones made from the same noise without a cache: the mean squared
    error of pixels in [-1, 1], and SSIM (Wang et al. 2004, equation 13: Gaussian window of
    11 x 11 with deviation 1.5, K1 = 0.01, K2 = 0.03), the mean over pixels whose window is whole.

    Both uint8 (N, H, W, 3) -> two floats. Raises ValueError for unequal shapes or sides below 11.
    """
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
    """SSIM of two images (H, W, C) in [-1, 1], so with a range of 2."""
    def window(values):
        return gaussian_filter(values, (1.5, 1.5, 0), truncate=3.5)[5:-5, 5:-5]

    C1, C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mean_x, mean_y = window(x), window(y)
    var_x, var_y = window(x * x) - mean_x**2, window(y * y) - mean_y**2
    cov = window(x * y) - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + C1) * (2 * cov + C2)
    return (numerator / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))).mean()


# ------------------------------------------------------------------------------------------------
# What a network saw in a set of images


CHECKPOINTS = Path(__file__).parent / "checkpoints"
SHIPPED_STATISTICS = {  # (source, network): file
    ("digits", "digits classifier"): CHECKPOINTS / "digits_statistics.npz",
    ("digits-held-out", "digits classifier"): CHECKPOINTS / "digits_held_out_statistics.npz",
}
ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "pooled", "logits")
ADM_NETWORK = "Inception 2015-12-05, resize tf1"  # what a reference without a name was made with


@dataclasses.dataclass
class Statistics:
    """Means and covariances of the pooled and the spatial features; and, where they are known, the
    features of the single images, which precision, recall and the Inception score need."""

    network: str  # the name of the feature network
    images: int | None  # None: the file does not tell
    mu: torch.Tensor  # (D,) float64
    sigma: torch.Tensor  # (D, D)
    mu_s: torch.Tensor  # (S,)
    sigma_s: torch.Tensor  # (S, S)
    pooled: torch.Tensor | None = None  # (N, D) float32
    logits: torch.Tensor | None = None  # (N, classes)


@torch.no_grad()
def extract(source, network, batch_size=64, words="features"):
    """Runs all images of `source` (see `pictures.read`) through a feature network -> Statistics.

    Images are streamed; what is kept is the features, 12 KB an image for Inception.
    Raises ValueError for fewer than two images, and as `pictures.read` does.
    """
    total, images = pictures.read(source)
    if total < 2:
        raise ValueError(f"{total} images in {words}: statistics need two or more")
    device = next(network.parameters()).device
    moments, spatial_moments, kept = Moments(), Moments(), []
    with full_precision():
        for batch in pictures.batches(images, total, batch_size, words):
            pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).to(device)
            pooled, spatial, logits = (x if x is None else x.float().cpu() for x in network(pixels))
            moments.add(pooled)
            spatial_moments.add(spatial)
            kept.append((pooled, logits))
    pooled, logits = zip(*kept, strict=True)
    pooled, logits = torch.cat(pooled), None if logits[0] is None else torch.cat(logits)
    return Statistics(network.name, total, moments.mean, moments.covariance,
                      spatial_moments.mean, spatial_moments.covariance, pooled, logits)


def save_statistics(path, statistics):
    """Writes an npz as the ADM evaluator's references are, with `network`, `images`, `pooled`
    and `logits` besides."""
    arrays = {key: getattr(statistics, key) for key in ARRAYS}
    arrays = {key: array.numpy() for key, array in arrays.items() if array is not None}
    with command.replacing(path) as temporary:
        np.savez_compressed(
            temporary, network=statistics.network, images=statistics.images, **arrays
        )


def load_statistics(path):
    """Statistics from an npz that `save_statistics` or ADM's authors wrote; None if it holds images
    only. Raises ValueError if it is damaged."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a whole npz of statistics, nor any npz file")
    try:
        with np.load(path, allow_pickle=False) as data:
            if "mu" not in data:
                return None
            arrays = {key: torch.from_numpy(data[key]) for key in ARRAYS if key in data}
            network = str(data["network"]) if "network" in data else ADM_NETWORK
            images = int(data["images"]) if "images" in data else None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a whole npz of statistics: {error}") from error
    missing = [key for key in ARRAYS[:4] if key not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return Statistics(network, images, **arrays)


def statistics_of(source, network, batch_size=64, words="features"):
    """Statistics of a set of images, or the ones that a file holds. Where the file has images
    beside them, as ADM's references do, the features of these are kept too.

    Raises ValueError if the file's statistics are of another network, and as `extract` does.
    """
    if not isinstance(source, str | Path):
        return extract(source, network, batch_size, words)
    path = Path(SHIPPED_STATISTICS.get((str(source), network.name), source))
    known = load_statistics(path) if path.suffix == ".npz" and path.is_file() else None
    if known is None:
        return extract(source, network, batch_size, words)
    if known.network != network.name:
        raise ValueError(f"{path} holds statistics of another network: of {known.network}, not of "
                         f"{network.name}; see --features and --resize")
    with zipfile.ZipFile(path) as archive:
        has_images = "arr_0.npy" in archive.namelist()
    if has_images:
        seen = extract(path, network, batch_size, words)
        known = dataclasses.replace(known, pooled=seen.pooled, logits=seen.logits)
    return known


# ------------------------------------------------------------------------------------------------
# All of them


METRICS = {  # name: (as it is printed, what is better)
    "fid": ("FID", "lower"),
    "sfid": ("sFID", "lower"),
    "is": ("Inception score", "higher"),
    "precision": ("precision", "higher"),
    "recall": ("recall", "higher"),
    "nearest": ("nearest distance", "near"),
    "clip": ("CLIP score", "higher"),
}


def compare(samples, reference, metrics=None, device="cpu"):
    """The metrics, by name, of one set's Statistics against another's; by default all but clip
    that the two allow. Raises ValueError for one that they do not.

    `nearest` comes with `nearest_reference`, the second value of `nearest_distance`.
    """
    if samples.network != reference.network:
        raise ValueError(f"features of {samples.network} and of {reference.network} are not to be "
                         "compared")
    pairs = samples.pooled is not None and reference.pooled is not None
    pairs = pairs and min(len(samples.pooled), len(reference.pooled)) > 3
    allowed = ["fid", "sfid"]
    allowed += ["is"] if samples.logits is not None else []
    allowed += ["precision", "recall", "nearest"] if pairs else []
    metrics = allowed if metrics is None else metrics
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name}: use {', '.join(METRICS)}")
        if name not in allowed:
            more = ", and a network that tells classes" if name == "is" else ", more than 3 of them"
            raise ValueError(f"{name} needs the images, not statistics only{more}")
    values = {}
    if "fid" in metrics:
        values["fid"] = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
    if "sfid" in metrics:
        values["sfid"] = frechet_distance(
            samples.mu_s, samples.sigma_s, reference.mu_s, reference.sigma_s
        )
    if "is" in metrics:
        values["is"] = inception_score(samples.logits)
    if not {"precision", "recall", "nearest"}.isdisjoint(metrics):
        pooled = samples.pooled.to(device), reference.pooled.to(device)
    if not {"precision", "recall"}.isdisjoint(metrics):
        values["precision"], values["recall"] = precision_recall(*pooled)
    if "nearest" in metrics:
        values["nearest"], values["nearest_reference"] = nearest_distance(*pooled)
    return {name: value for name, value in values.items()
            if name in metrics or name == "nearest_reference"}


def evaluate(images, reference="digits", metrics=None, network=None, batch_size=64):
    """The metrics of images against a reference, by name (see `compare`).

    Both are anything that `pictures.read` takes, an npz of statistics, or Statistics (so that a
    reference is made once for many sets); `network` is a feature network (by default the
    reference's usual one). The CLIP score has a function of its own, `clip_score`, and so has the
    error to the images of the same noise without a cache, `paired_error`.
    Raises ValueError, FileNotFoundError, ConnectionError, with one line that says what to do.
    """
    if network is None:
        network = features.load(usual_features(reference))
    samples, reference = (
        source if isinstance(source, Statistics) else statistics_of(source, network, batch_size)
        for source in (images, reference)
    )
    return compare(samples, reference, metrics, next(network.parameters()).device)


def usual_features(reference):
    """The network for a reference: for a data set of ours its own, for statistics theirs, else
    Inception."""
    if isinstance(reference, str) and reference in pictures.NAMED:
        return reference.split("-")[0]
    if isinstance(reference, str | Path) and Path(reference).suffix == ".npz":
        reference = load_statistics(reference) if Path(reference).is_file() else None
    name = reference.network if isinstance(reference, Statistics) else ""
    return {"digits classifier": "digits", "emoji encoder": "emoji"}.get(name, "inception")


# ------------------------------------------------------------------------------------------------
# The command


def read_captions(path, total):
    """One caption a line, in the order of the images. Raises ValueError if the numbers differ."""
    captions = shipped.read_lines(path)
    if len(captions) != total or not total:
        raise ValueError(f"{path} has {len(captions)} captions for {total} images")
    return captions


def table(values, networks):
    """The terminal's table: a metric, its value, what is better and by which network."""
    lines = [f"{'metric':17}{'value':>9}  {'better':11}  network"]
    for name, value in values.items():
        if name in METRICS:
            title, better = METRICS[name]
            if name == "nearest":
                better += f" {values['nearest_reference']:.4f}"
            lines.append(f"{title:17}{value:9.4f}  {better:11}  {networks[name]}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", help="a folder of images, an npz, or digits-held-out and such")
    parser.add_argument("--reference", default="digits", help="the same (default: digits)")
    parser.add_argument("--metrics", help=f"some of {','.join(METRICS)}; default: all that can be")
    parser.add_argument("--features", help="inception, digits or emoji (as the reference needs)")
    parser.add_argument("--weights", help="Inception's weights, if not pytorch-fid's")
    parser.add_argument("--resize", default="tf1", choices=["tf1", "pytorch-fid"],
                        help="Inception's (tf1)")
    parser.add_argument("--captions", help="a caption a line, in the order of the images' names, "
                        "sorted as text (007.png before 010.png)")
    parser.add_argument("--clip-model", default="ViT-B-32",
                        help="of open_clip, or emoji, the shipped one (ViT-B-32)")
    parser.add_argument("--clip-pretrained", default="openai", help="its weights' tag (openai)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at once (64)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--save-stats", type=Path, help="write the samples' statistics, an npz")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise ValueError("--batch-size must be 1 or more")
    names = args.metrics
    if names is not None:
        names = [name.strip() for name in args.metrics.split(",") if name.strip()]
        unknown = [name for name in names if name not in METRICS]
        if unknown or not names:
            raise ValueError(f"unknown metric {', '.join(unknown)}: use {', '.join(METRICS)}")
    if names is not None and ("clip" in names) != bool(args.captions):
        raise ValueError("the CLIP score and --captions FILE go together")
    if args.save_stats:
        if args.save_stats.suffix != ".npz":
            raise ValueError(f"--save-stats takes a name that ends in .npz, not {args.save_stats}")
        command.check_writable(args.save_stats)
    device = models.find_device(args.device)
    # What can be found wrong before the work is found now.
    for source in (args.samples, *([args.reference] if names != ["clip"] else [])):
        if not (source.endswith(".npz") and Path(source).is_file() and load_statistics(source)):
            pictures.read(source)
    if args.captions:
        total, images = pictures.read(args.samples)
        captions = read_captions(args.captions, total)
        clip = features.load_clip(args.clip_model, args.clip_pretrained, device)

    values, networks, counts = {}, {}, {}
    if names != ["clip"]:
        kind = args.features or usual_features(args.reference)
        network = features.load(kind, args.weights, device, args.resize)
        samples = statistics_of(args.samples, network, args.batch_size, "samples")
        if args.save_stats:
            save_statistics(args.save_stats, samples)
        reference = statistics_of(args.reference, network, args.batch_size, "reference")
        names = names and [name for name in names if name != "clip"]
        values = compare(samples, reference, names, device)
        networks = dict.fromkeys(values, network.name)
        counts = {"images": samples.images, "reference": args.reference,
                  "reference_images": reference.images}
        if samples.images and samples.images <= len(samples.mu):
            print(f"note: {samples.images} images span fewer than the {len(samples.mu)} features; "
                  "FID is biased upwards, compare it at equal numbers only", file=sys.stderr)
    if args.captions:
        values["clip"] = clip_score(images, captions, clip, args.batch_size)
        networks["clip"] = f"open_clip {args.clip_model}, {args.clip_pretrained}"
        if args.clip_model == "emoji":
            networks["clip"] = clip[0].name
        counts = {"images": total, **counts}

    if args.json:
        about = {"samples": args.samples, **counts, "values": values, "networks": networks}
        print(json.dumps(about))
        return
    words = ", ".join(f"{key.replace('_', ' ')} {'unknown' if value is None else value}"
                      for key, value in counts.items())
    print(f"{words}\n{table(values, networks)}")


if __name__ == "__main__":
    command.run(main)
