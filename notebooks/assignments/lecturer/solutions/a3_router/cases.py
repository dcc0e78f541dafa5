"""The withheld numbers of assignment 3."""

SEEDS = (31, 32)
TEMPERATURES = (0.25, 0.7, 3.0)
TAUS = (0.2, 0.6)
STEPS = 5
IMAGES = 3
BETA = 5e-3
SHAPES = ((10, 56), (7, 3))  # (T, K) of a schedule
CURS = (0.0, 0.21, 0.5, 0.85)
BUDGETS = (0.3, 2.5, 5.0)  # of 6
