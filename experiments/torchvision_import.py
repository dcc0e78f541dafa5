"""Makes `import torchvision` work beside the CPU build of PyTorch. open_clip imports it, and so do
the libraries that this project is compared with.

PyPI's torchvision is compiled against PyTorch's CUDA build. Beside the CPU build its compiled
operators do not load, and its import fails at the two whose shapes it registers. Nothing here uses
these two, so they are declared without code. Importing this module is enough; the tests and the
benchmarks that compare do so.
"""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    DECLARED = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
