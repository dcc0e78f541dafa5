"""Time and memory of the metrics, random weights and features: only the shapes matter.

    python -m experiments.benchmark_metrics              # about a minute on one core

extraction   Inception's features of the same images, ours and torch-fidelity's, in turn; bar 0.97
neighbours   precision and recall at 10,000 x 10,000 x 2048: seconds and peak memory, bar 4 GB
"""

if __name__ == "__main__":
    import interrupt  # noqa: F401, before the slow imports

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

import command
import experiments.torchvision_import  # noqa: F401, for torch-fidelity
import features
import metrics
from experiments.benchmark import in_turn, median_ratio


def benchmark_extraction(repeats, images=8):
    """Prints our speed as a multiple of torch-fidelity's, medians over rounds."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"torch_fidelity cannot be imported ({error}): install "
                         "requirements-dev.txt") from error
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inception.pth"
        torch.save(features.Inception().state_dict(), path)
        theirs = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
        ours = features.load("inception", path)
    pixels = torch.randint(0, 256, (images, 3, 256, 256), dtype=torch.uint8)

    def seconds(network):
        start = time.perf_counter()
        with torch.no_grad():
            network(pixels)
        return time.perf_counter() - start

    times = in_turn({"ours": lambda: seconds(ours), "theirs": lambda: seconds(theirs)}, repeats)
    for name, values in times.items():
        print(f"extraction, {name:7}{images / sorted(values)[len(values) // 2]:7.2f} images/s")
    print(f"extraction, ours / torch-fidelity {median_ratio(times['theirs'], times['ours']):.2f} x")


def benchmark_neighbours(images=10_000, size=2048):
    """Prints the seconds of precision and recall, and the process's memory at its peak."""
    samples, reference = torch.randn(2, images, size).unbind()
    start = time.perf_counter()
    metrics.precision_recall(samples, reference)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
    print(f"neighbours, {images} x {images} x {size}: {time.perf_counter() - start:.1f} s, "
          f"{peak:.2f} GB at the peak, Python and the features included")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    args = parser.parse_args()
    if args.repeats < 1:
        raise ValueError(f"--repeats must be 1 or more, not {args.repeats}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    benchmark_neighbours()
    benchmark_extraction(args.repeats)


if __name__ == "__main__":
    command.run(main)
