"""What the metrics compare: the means, covariances and single features of a set of images, from the
images themselves or from an npz file.

    statistics = feature_statistics.extract("my_folder/", features.load("digits"))
    feature_statistics.save_statistics("statistics.npz", statistics)
    statistics = feature_statistics.load_statistics("statistics.npz")

Notation: N images, B images of a batch, D pooled and S spatial features of an image.
"""

import contextlib
import dataclasses
import functools
import math
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

import command
import distributed
import features
import pictures

# ------------------------------------------------------------------------------------------------
# From images


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


class Moments:
    """Mean and covariance of a stream of vectors, in float64 on the CPU (Chan, Golub and LeVeque
    1979)."""

    def __init__(self):
        self.n, self.mean, self.scatter = 0, 0.0, 0.0  # scatter = sum (x - mean) (x - mean)^T

    def add(self, x):
        """Adds a batch x (B, D)."""
        x = x.cpu().double()
        mean = x.mean(0)
        centred = x - mean
        self._merge(len(x), mean, centred.T @ centred)

    def _merge(self, n, mean, scatter):
        """Adds n vectors of this mean and scatter."""
        delta, share = mean - self.mean, n / (self.n + n)
        # The two scatters are about two means: the last term moves both to the common mean.
        self.scatter = self.scatter + scatter + torch.outer(delta, delta) * (self.n * share)
        self.mean = self.mean + delta * share
        self.n += n

    def of_all_processes(self):
        """-> the moments of what all processes added, each to its own."""
        n = torch.tensor([self.n])
        parts = (distributed.together(part[None], distributed.size())
                 for part in (n, self.mean, self.scatter))
        total = Moments()
        for n, mean, scatter in zip(*parts, strict=True):
            total._merge(n.item(), mean, scatter)
        return total

    @property
    def covariance(self):
        """(D, D), divided by n - 1."""
        return self.scatter / (self.n - 1)


@dataclasses.dataclass
class Statistics:
    """Means and covariances of the pooled and of the spatial features. Where they are known, also
    the features of the single images: precision, recall and the Inception score need them."""

    network: str | None  # the name of the feature network; None: the file does not say
    count: int | None  # of images; None: the file does not say
    mu: torch.Tensor  # (D,) float64
    sigma: torch.Tensor  # (D, D)
    mu_s: torch.Tensor | None = None  # (S,); None: not known, so there is no sFID
    sigma_s: torch.Tensor | None = None  # (S, S)
    pooled: torch.Tensor | None = None  # (N, D) float32
    logits: torch.Tensor | None = None  # (N, classes)
    images: Path | None = None  # an npz whose images, arr_0, are not looked at yet


def look(batch, network):
    """uint8 (B, H, W, 3) -> the network's pooled (B, D), spatial (B, S) and logits (B, classes) or
    None, float32 on the CPU. Raises ValueError if they are not finite, and for images without
    pixels."""
    if not batch.size:
        raise ValueError(f"images of {' x '.join(map(str, batch.shape[1:3]))} pixels")
    pixels = torch.from_numpy(batch).permute(0, 3, 1, 2)  # (B, 3, H, W)
    pixels = pixels.to(next(network.parameters()).device)
    with full_precision(), torch.no_grad():
        seen = [x if x is None else x.float().cpu() for x in network(pixels)]
    if not all(x is None or x.isfinite().all() for x in seen):
        raise ValueError(f"features of {network.name} are not finite: are its weights right?")
    return seen


def extract(source, network, batch_size=64, title="features"):
    """Runs all images of `source` (see `pictures.read`) through a feature network -> Statistics.
    Several processes share the images.

    Only the features stay in memory: 12 KB an image for Inception. `title` names the source on the
    progress bar. Raises ValueError for fewer than two images, and as `pictures.read` does.
    """
    mine = functools.partial(distributed.mine, group=batch_size)
    total, images = pictures.read(source, mine)
    if total < 2:
        raise ValueError(f"{total} images in {title}: statistics need two or more")
    distributed.check_enough(math.ceil(total / batch_size),
                             f"batches of {title}: use a smaller --batch-size")
    moments, spatial_moments, kept = Moments(), Moments(), []
    for batch in pictures.batches(images, len(mine(total)), batch_size, title):
        pooled, spatial, logits = look(batch, network)
        moments.add(pooled)
        spatial_moments.add(spatial)
        kept.append((pooled, logits))
    pooled, logits = zip(*kept, strict=True)
    pooled, logits = (None if parts[0] is None else
                      distributed.together(torch.cat(parts), total, batch_size)
                      for parts in (pooled, logits))
    moments, spatial_moments = moments.of_all_processes(), spatial_moments.of_all_processes()
    return Statistics(network.name, total, moments.mean, moments.covariance,
                      spatial_moments.mean, spatial_moments.covariance, pooled, logits)


# ------------------------------------------------------------------------------------------------
# In files

ARRAYS = {"mu": 1, "sigma": 2, "mu_s": 1, "sigma_s": 2, "pooled": 2, "logits": 2}  # dimensions
ADM_NETWORK = "Inception 2015-12-05, resize tf1"  # ADM's files do not name their network
WIDEST = 8192  # features of an image: four times Inception's, whose covariance takes 34 MB
LARGEST = 1e15  # in a feature: its square is far from float32's end


def save_statistics(path, statistics):
    """Writes an npz that the ADM evaluator can read, with `network`, `images` (their number),
    `pooled` and `logits` besides. What is not known is left out."""
    arrays = {key: getattr(statistics, key) for key in ARRAYS}
    arrays = {key: array.numpy() for key, array in arrays.items() if array is not None}
    about = {"network": statistics.network, "images": statistics.count}
    about = {key: value for key, value in about.items() if value is not None}
    with command.replacing(path) as temporary:
        np.savez_compressed(temporary, **about, **arrays)


def load_statistics(path):
    """Reads an npz of `save_statistics`, of ADM's authors, or of others with `mu` and `sigma` only
    -> Statistics, or None if it has images only. Raises ValueError, which names the file, if it is
    damaged or incomplete, or holds what cannot be statistics."""
    command.check_ordinary(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an npz file, or not a whole one")
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            if "mu" not in names:
                return None
            arrays = {key: read_array(archive, key)
                      for key in (*ARRAYS, "network", "images") if key in names}
    except Exception as error:  # encrypted, compressed oddly, damaged: it fails in many ways
        reason = command.one_line(error)[:200] or type(error).__name__
        raise ValueError(f"{path} is not a whole npz of statistics: {reason}") from error
    try:
        about = read_about(arrays.pop("network", None), arrays.pop("images", None),
                           "mu_s" in arrays)
        check_arrays(arrays, about[1])
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    return Statistics(*about, **tensors, images=Path(path) if "arr_0" in names else None)


def read_array(archive, key):
    """One array of an npz: statistics as floats of the machine's own kind, the rest as it is. No
    code is run. Raises ValueError, or whatever a damaged file makes the readers raise."""
    with archive.open(f"{key}.npy") as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
        if stream.read(1):  # only at its end is an entry's check sum looked at
            raise ValueError(f"{key} is longer than it says")
    if key not in ARRAYS:
        return array
    if array.dtype.kind != "f" or array.ndim != ARRAYS[key] or not array.size:
        raise ValueError(f"{key} must be floating point of {ARRAYS[key]} dimensions, not "
                         f"{array.dtype} {array.shape}")
    with np.errstate(over="ignore"):  # infinite then, which is refused
        return np.ascontiguousarray(array, np.float32 if key in ("pooled", "logits") else float)


def read_about(network, count, has_spatial):
    """The arrays `network` and `images` of a file, None where it has none -> the network's name and
    the number of images, or None. Raises ValueError for what is no name and no number."""
    if network is None:
        network = ADM_NETWORK if has_spatial else None
    elif network.dtype.kind != "U" or network.ndim or not str(network).strip():
        raise ValueError("does not name its network: `network` is not a string")
    else:
        network = str(network)
    if count is not None and (count.dtype.kind not in "iu" or count.ndim or count < 2):
        raise ValueError("does not number its images: `images` is not a whole number from 2 on")
    return network, None if count is None else int(count)


def check_arrays(arrays, count):
    """Raises ValueError for arrays that are not the statistics of one set, by name, of `count`
    images (None: unknown)."""
    pairs = [("mu", "sigma")] + [("mu_s", "sigma_s")] * ("mu_s" in arrays or "sigma_s" in arrays)
    missing = [key for pair in pairs for key in pair if key not in arrays]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    for key, array in arrays.items():
        if not np.isfinite(array).all() or np.abs(array).max() > LARGEST:
            raise ValueError(f"cannot be right: {key} holds NaN, infinite or huge numbers")
    for mean, covariance in pairs:
        D, sigma = len(arrays[mean]), arrays[covariance]
        if sigma.shape != (D, D) or D > WIDEST:
            raise ValueError(f"cannot be right: {covariance} is {sigma.shape} for {D} features "
                             f"({WIDEST} at most)")
        if not may_be_covariance(sigma):
            raise ValueError(f"cannot be right: {covariance} is no covariance, as it is not "
                             "symmetric, or |s_ij|^2 is over s_ii s_jj")
    rows = {key: len(arrays[key]) for key in ("pooled", "logits") if key in arrays}
    if len(set(rows.values())) > 1 or (count is not None and max(rows.values(), default=0) > count):
        numbers = ", ".join(f"{value} {key}" for key, value in rows.items())
        raise ValueError(f"cannot be right: {numbers}, of {count or 'unknown'} images")
    if "pooled" in arrays and arrays["pooled"].shape[1] != len(arrays["mu"]):
        raise ValueError(f"cannot be right: pooled is {arrays['pooled'].shape} for "
                         f"{len(arrays['mu'])} features")


def may_be_covariance(sigma):
    """Whether sigma (D, D) is symmetric and |s_ij|^2 <= s_ii s_jj, up to rounding: what can be seen
    without its eigenvalues, which take seconds."""
    variances, largest = np.diag(sigma), np.abs(sigma).max()
    if variances.min() < 0 or np.abs(sigma - sigma.T).max() > 1e-3 * largest:
        return False
    deviations = np.sqrt(variances)
    return (np.abs(sigma) <= 1.001 * np.outer(deviations, deviations) + 1e-6 * largest).all()


# ------------------------------------------------------------------------------------------------
# From either

SHIPPED_STATISTICS = {  # (source, network): file
    ("digits", "digits classifier"): features.SHIPPED / "digits_statistics.npz",
    ("digits-held-out", "digits classifier"): features.SHIPPED / "digits_held_out_statistics.npz",
}


def known(source):
    """Statistics, if `source` is Statistics or a file of them; else None. No image is looked at.
    Raises ValueError as `load_statistics` does."""
    if isinstance(source, Statistics):
        return source
    if not isinstance(source, str | Path) or pictures.is_named(source):
        return None
    path = Path(source)
    return load_statistics(path) if path.suffix == ".npz" and path.is_file() else None


def of_network(statistics, network, title):
    """Statistics, checked to be of a network and with its name. Raises ValueError if they are of
    another; warns if the file does not name one."""
    if statistics.network not in (None, network.name):
        raise ValueError(f"{title} holds statistics of another network: of {statistics.network}, "
                         f"not of {network.name}; see --features and --resize")
    widths = [None if x is None else x.shape[-1]
              for x in (statistics.mu, statistics.mu_s, statistics.logits)]
    wrong = [f"{width}, not {needed}" for width, needed in zip(widths, network.sizes, strict=True)
             if width not in (None, needed)]
    if wrong:
        raise ValueError(f"{title} holds statistics of another network than {network.name}: the "
                         f"number of features is {'; '.join(wrong)}")
    if statistics.network is None:
        warnings.warn(f"{title} does not name its network: taken for {network.name}; FID is wrong "
                      "if its preprocessing was another (see --resize)", stacklevel=3)
    return dataclasses.replace(statistics, network=network.name)


def statistics_of(source, network, batch_size=64, title="features"):
    """Statistics of a set of images: passed on, if `source` is Statistics; read, if there is a file
    of them; else from `extract`. Raises ValueError if they are of another network, and as `extract`
    does."""
    if isinstance(source, str) and pictures.is_named(source):
        file = SHIPPED_STATISTICS.get((source, network.name))
        return load_statistics(file) if file else extract(source, network, batch_size, title)
    statistics = known(source)
    if statistics is None:
        return extract(source, network, batch_size, title)
    where = title if source is statistics else source
    statistics = of_network(statistics, network, statistics.images or where)
    if statistics.images:  # ADM's references: 10,000 images beside the statistics of a whole set
        seen = extract(statistics.images, network, batch_size, title)
        statistics = dataclasses.replace(statistics, pooled=seen.pooled, logits=seen.logits,
                                         images=None)
    return statistics


def able(source, network=None):
    """The metrics that a set of images can take part in: a list of names. `source` is Statistics,
    or images for `pictures.read` and the network that is to look at them; no image is read."""
    if isinstance(source, Statistics):
        total = 0 if source.pooled is None else len(source.pooled)
        spatial, classes = source.mu_s is not None, source.logits is not None
        source = source.images  # not looked at yet, or None
    else:
        total, spatial, classes = 0, True, False
    if source is not None and network:
        total, classes = pictures.read(source)[0], network.sizes[2] is not None
    names = ["fid", *["sfid"] * spatial, *["is"] * classes]
    return names + ["precision", "recall", "nearest"] * (total > 3)
