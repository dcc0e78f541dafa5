"""What the walkthrough notebooks share: the check in their first cell, and how they show images.

    import walkthrough

    walkthrough.begin()      # from here on the repository's own modules can be imported
"""

import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Okabe and Ito's colours, which colour-blind readers tell apart; matplotlib calls them C0 to C5.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
INSTALL = ("in the repository's folder run `pip install -r requirements-dev.txt`, then open the "
           "notebook again by `jupyter lab notebooks`, with the same Python")


def missing_packages():
    """Which of the packages in requirements.txt, and of what the notebooks need besides, are not
    installed: a list of names."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    missing = []
    for name in [re.match(r"[\w-]+", line)[0] for line in lines] + ["matplotlib"]:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def begin():
    """The first cell: makes the repository's modules importable and sets the style of the figures.
    Raises FileNotFoundError outside of a clone, ImportError, which says what to do, if a package
    is missing."""
    if not (ROOT / "requirements.txt").is_file() or not (ROOT / "dit.py").is_file():
        raise FileNotFoundError("the notebooks run in a clone of the repository: clone it, and "
                                "open this notebook in its folder notebooks/")
    missing = missing_packages()
    if missing:
        raise ImportError(f"not installed: {', '.join(missing)}; {INSTALL}")
    sys.path.insert(0, str(ROOT))

    from matplotlib import pyplot as plt  # only now known to be there

    plt.rcParams.update({
        "figure.dpi": 80, "figure.constrained_layout.use": True, "font.size": 11,
        "axes.prop_cycle": plt.cycler(color=COLOURS), "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "image.cmap": "cividis",
    })


def strips(rows, columns=None):
    """Draws rows of images, one below the other. `rows` is {words before the row: images
    (n, C, H, W) in [-1, 1]}, `columns` a list of n words to stand above the images."""
    import numpy as np
    from matplotlib import pyplot as plt

    import pictures

    n = len(next(iter(rows.values())))
    side = min(0.95, 9 / n)  # of an image, in inches
    figure, axes = plt.subplots(
        len(rows), squeeze=False, figsize=(n * side + 1.6, len(rows) * side + 0.4)
    )
    for (words, images), axis in zip(rows.items(), axes[:, 0], strict=True):
        pixels = pictures.to_pixels(images)  # (n, H, W, 3)
        pixels = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        width = pixels.shape[2]
        axis.imshow(np.concatenate(list(pixels), axis=1))
        axis.set_ylabel(words, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    if columns is not None:
        axes[0, 0].xaxis.tick_top()
        axes[0, 0].tick_params(length=0)
        axes[0, 0].set_xticks([(j + 0.5) * width for j in range(n)], columns)
    plt.show()
