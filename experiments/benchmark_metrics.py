"""Time and memory of the metrics. Weights and features are random, as only the shapes matter.

    python -m experiments.benchmark_metrics              # about a minute on one core

extraction   Inception features of equal images, ours and torch-fidelity's in turn: our speed as a
             multiple of theirs; goal: at least 0.97
neighbours   precision and recall of 10,000 x 10,000 images with 2048 features: seconds and peak
             memory; goal: at most 4 GB
"""

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import tempfile
import time
from pathlib import Path

import torch

import command
import experiments.torchvision_import  # noqa: F401, for torch-fidelity
import features
import metrics
from experiments.benchmark import in_turn, median_ratio


def benchmark_extraction(repeats, batch_size=8):
    """Prints images per second of both, and our speed as a multiple of torch-fidelity's, medians
    over `repeats` rounds. Raises ValueError if torch-fidelity is not installed."""
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
    images = torch.randint(0, 256, (batch_size, 3, 256, 256), dtype=torch.uint8)

    def seconds(network):
        start = time.perf_counter()
        with torch.no_grad():
            network(images)
        return time.perf_counter() - start

    times = in_turn({"ours": lambda: seconds(ours), "theirs": lambda: seconds(theirs)}, repeats)
    for name, values in times.items():
        print(f"extraction, {name:7}{batch_size / sorted(values)[len(values) // 2]:7.2f} images/s")
    print(f"extraction, ours / torch-fidelity {median_ratio(times['theirs'], times['ours']):.2f} x")


def benchmark_neighbours(N=10_000, D=2048):
    """Prints the seconds of precision and recall for N samples and N reference images with D
    features, and the peak memory of the process."""
    samples, reference = torch.randn(2, N, D).unbind()
    start = time.perf_counter()
    metrics.precision_recall(samples, reference)
    seconds, peak = time.perf_counter() - start, command.peak_memory("cpu")
    print(f"neighbours, {N} x {N} x {D}: {seconds:.1f} s, "
          f"{peak / 1e9:.2f} GB at the peak, Python and the features included")


def main():
    parser = command.Parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    args = parser.parse_args()
    if args.repeats < 1:
        raise ValueError(f"--repeats must be 1 or more, not {args.repeats}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    benchmark_neighbours()  # first, as it reports the peak of the whole process
    benchmark_extraction(args.repeats)


if __name__ == "__main__":
    command.run(main)
