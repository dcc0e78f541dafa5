"""One step of our networks against the same ones in diffusers, with equal random weights and input,
in turn.

    python -m experiments.benchmark_networks --depth 28      # XL/2, 8 GB by calculation
    python -m experiments.benchmark_networks --depth 2 --dtype bfloat16

A step is a batch of two rows, with the label or caption and without, as guidance asks for. What is
printed is diffusers' time / ours, the median over the rounds: above 1 ours is faster; bar 0.97.
The outputs of DiT differ because diffusers embeds its timesteps with other frequencies.
"""

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import statistics
import time
from functools import partial

import torch

import checkpoint
import command
import dit
import experiments.torchvision_import  # noqa: F401, for diffusers
import pixart
from experiments.benchmark import in_turn, median_ratio, random_condition, random_model

XL = dict(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
          patch_size=2, sample_size=32)


def networks(kind, depth, dtype, device="cpu"):
    """Our network and diffusers' with its weights. Raises ValueError if diffusers is not
    installed."""
    try:
        from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"diffusers cannot be imported ({command.one_line(error)}): install "
                         "requirements-dev.txt") from error
    if kind == "DiT-XL/2":
        network = random_model({**dit.SIZES["XL/2"], "depth": depth, "input_size": 32}).network
        theirs = DiTTransformer2DModel(**XL, num_layers=depth)
    else:
        sizes = {**pixart.SIZES["alpha256"], "depth": depth}
        network = random_model(sizes, pixart.PixArt).network
        theirs = PixArtTransformer2DModel(**XL, num_layers=depth, cross_attention_dim=1152,
                                          caption_channels=4096, use_additional_conditions=False)
    state = checkpoint.to_diffusers(network.state_dict(), network)
    theirs.load_state_dict(state, strict=False)  # it makes its position embedding itself
    return (network.to(device, dtype),
            theirs.eval().requires_grad_(False).to(device, dtype))


def pair(kind, depth, dtype, device="cpu"):
    """The same two, each as a function without arguments. Raises ValueError as `networks` does."""
    network, theirs = networks(kind, depth, dtype, device)
    condition = random_condition(network, 1)
    x, t = torch.randn(2, 4, 32, 32).to(device, dtype), torch.full((2,), 500, device=device)
    if kind == "DiT-XL/2":
        return lambda: network(x, t, *condition), lambda: theirs(x, t, *condition).sample
    y, mask = condition[0].to(dtype), condition[1]
    return (lambda: network(x, t, y, mask),
            lambda: theirs(x, y, t, encoder_attention_mask=mask.to(dtype),
                           added_cond_kwargs={"resolution": None, "aspect_ratio": None}).sample)


def seconds(step, device="cpu"):
    """The seconds that a function without arguments takes, without gradients."""
    command.synchronize(device)
    start = time.perf_counter()
    with torch.no_grad():
        step()
    command.synchronize(device)
    return time.perf_counter() - start


def main():
    parser = command.Parser(__doc__)
    parser.add_argument("--depth", type=int, default=8, help="blocks (8; XL has 28)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    args = parser.parse_args()
    if args.repeats < 1 or not 1 <= args.depth <= 1000:
        raise ValueError("--repeats must be 1 or more, --depth 1 to 1000")

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}")
    for kind in ("DiT-XL/2", "PixArt-XL/2"):
        ours, theirs = pair(kind, args.depth, getattr(torch, args.dtype))
        with torch.no_grad():
            difference = ((ours() - theirs()).norm() / theirs().norm()).item()
        measures = {"ours": partial(seconds, ours), "theirs": partial(seconds, theirs)}
        times = in_turn(measures, args.repeats)
        print(f"{kind}, {args.depth} blocks: ours {statistics.median(times['ours']):.3f} s, "
              f"diffusers {statistics.median(times['theirs']):.3f} s, "
              f"{median_ratio(times['theirs'], times['ours']):.3f} x its speed; "
              f"outputs differ by {difference:.1e}")


if __name__ == "__main__":
    command.run(main)
