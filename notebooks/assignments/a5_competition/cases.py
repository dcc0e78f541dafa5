"""The inputs of assignment 5's tests. Grading uses other numbers."""

SEEDS = (0, 1)
IMAGES = 3
SHAPES = ((20, 16), (5, 6), (7, 3))  # (T, K)
DEPTHS = ((6, 2), (5, 3))  # (T, blocks) of small networks
SECONDS = 0.6  # of processor time for a small network
DIGITS_SECONDS = 1.5
DIGITS_SEED = 100
