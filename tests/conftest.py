"""The oracles import torchvision, which does not load beside every build of PyTorch."""

import experiments.torchvision_import  # noqa: F401
