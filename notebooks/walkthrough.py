"""What the walkthrough notebooks share: the first cell's check, the style of the figures, and how
images are shown.

    import walkthrough

    walkthrough.begin()      # after this the repository's modules can be imported
"""

import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Okabe and Ito's colours, which colour-blind readers can distinguish; matplotlib's C0 to C5.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
INSTALL = ("in the repository's folder run `pip install -r requirements-dev.txt`, then open the "
           "notebook again by `jupyter lab notebooks`, with the same Python")


def missing_packages():
    """The packages that are not installed, of requirements.txt and matplotlib: a list of names."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    missing = []
    for name in [re.match(r"[\w-]+", line)[0] for line in lines] + ["matplotlib"]:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def begin():
    """Makes the repository's modules importable and sets the style of the figures. Every notebook
    calls it in its first cell. Raises FileNotFoundError outside of a clone, and ImportError if a
    package is missing."""
    if not (ROOT / "requirements.txt").is_file() or not (ROOT / "dit.py").is_file():
        raise FileNotFoundError("the notebooks run in a clone of the repository: clone it, and "
                                "open this notebook in its folder notebooks/")
    missing = missing_packages()
    if missing:
        raise ImportError(f"not installed: {', '.join(missing)}; {INSTALL}")
    sys.path.insert(0, str(ROOT))

    from matplotlib import pyplot as plt  # here, because only now it is known to be installed

    plt.rcParams.update({
        "figure.dpi": 80, "figure.constrained_layout.use": True, "font.size": 11,
        "axes.prop_cycle": plt.cycler(color=COLOURS), "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "image.cmap": "cividis",
    })


def strips(rows, columns=None):
    """Draws rows of images, one below the other. `rows` is {label of the row: images (n, C, H, W)
    in [-1, 1]}, `columns` a list of n labels, one above each column."""
    import numpy as np
    from matplotlib import pyplot as plt

    import pictures

    n = len(next(iter(rows.values())))
    side = min(0.95, 9 / n)  # inches per image
    figure, axes = plt.subplots(
        len(rows), squeeze=False, figsize=(n * side + 1.6, len(rows) * side + 0.4)
    )
    for (label, images), axis in zip(rows.items(), axes[:, 0], strict=True):
        pixels = pictures.to_pixels(images)  # (n, H, W, 3)
        pixels = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)  # a frame
        width = pixels.shape[2]
        axis.imshow(np.concatenate(list(pixels), axis=1))
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    if columns is not None:
        axes[0, 0].xaxis.tick_top()
        axes[0, 0].tick_params(length=0)
        axes[0, 0].set_xticks([(j + 0.5) * width for j in range(n)], columns)
    plt.show()
