"""Lets torchvision be imported, as open_clip and the libraries that we are compared with do.

PyPI's torchvision is compiled against PyTorch's CUDA build. Beside the CPU build its compiled
operators do not load, and its import fails on the two of them that it wants to know the shapes of.
Nothing here uses either, so they are declared, without code behind them. Importing this module does
it; the tests and the benchmarks that compare do so.
"""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    DECLARED = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
