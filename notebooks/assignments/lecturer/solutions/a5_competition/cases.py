"""The withheld numbers of assignment 5."""

SEEDS = (51, 52)
IMAGES = 2
SHAPES = ((20, 16), (9, 4), (3, 5))  # (T, K)
DEPTHS = ((8, 2), (7, 3))  # (T, blocks) of small networks
SECONDS = 0.7  # of processor time for a small network
DIGITS_SECONDS = 1.5
DIGITS_SEED = 200
