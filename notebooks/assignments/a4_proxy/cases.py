"""The inputs of assignment 4's tests. Grading uses other numbers."""

SEEDS = (0, 1)
STEPS = 5
IMAGES = 2
TAU = 0.5
BRANCHES = (
    ("attn 0", "mlp 0", "attn 1", "mlp 1"),
    ("self 0", "cross 0", "mlp 0", "self 1", "cross 1", "mlp 1"),
)
SAMPLERS = ("ddim", "ddim:0.7", "dpm-solver++")
HORIZONS = (1, 2, 3)
ROWS = ((1, 2, 3, 4), (1, 4), (1, 3, 4))  # of 5 steps
# A pilot's values at one entry, its standard error, and the images needed for a relative error.
PILOTS = (
    ((1.0, 3.0), 1.0, 0.15, 23),
    ((1.0, 3.0), 1.0, 0.03, 556),
    ((2.0, 2.0, 5.0, 3.0), 0.7071067811865476, 0.1, 23),
)
