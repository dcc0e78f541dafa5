"""The withheld numbers of assignment 4."""

SEEDS = (41, 42)
STEPS = 6
IMAGES = 3
TAU = 0.4
BRANCHES = (
    ("mlp 7", "attn 7", "mlp 2"),
    ("self 0", "cross 0", "mlp 0", "self 10", "cross 10", "mlp 10", "self 1"),
)
SAMPLERS = ("ddim", "ddim:1", "sa-solver")
HORIZONS = (1, 2, 4)
ROWS = ((1, 2, 3, 4, 5), (1, 5), (1, 2, 5))  # of 6 steps
# A pilot's values at one entry, its standard error, and the images needed for a relative error.
PILOTS = (
    ((1.0, 1.0, 4.0), 1.0, 0.2, 19),
    ((5.0, 5.0, 5.0), 0.0, 0.1, 1),
    ((0.0, 2.0, 0.0, 2.0, 1.0), 0.4472135954999579, 0.3, 12),
)
