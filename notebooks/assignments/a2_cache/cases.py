"""The inputs of assignment 2's tests. Grading uses other numbers."""

SEEDS = (0, 1)
SHAPES = ((2, 16, 32), (1, 5, 8))  # (B, N, D)
# Old and new values of an output, and the relative change.
CHANGES = (
    ((1.0, 3.0), (2.0, 3.0), 0.25),
    ((-4.0, 1.0, 1.0), (-4.0, 0.0, 1.0), 1 / 6),
)
# Branch 0's output at each step, the threshold, and the steps that compute the other branches.
SCRIPTS = (
    ((1.0, 1.05, 1.12, 1.13, 1.2), 0.1, (1, 0, 1, 0, 0)),
    ((2.0, 2.0, 3.0, 2.9, 2.0), 0.25, (1, 0, 1, 0, 1)),
    ((1.0, 1.0, 1.0), 0.0, (1, 0, 0)),
)
THRESHOLDS = (0.02, 0.1)
STEPS, BRANCHES = 7, 6
SIZES = ((100, 100, 100, 100, 100, 100), (5, 80, 1, 40, 3, 200))  # bytes of each branch's entry
TOKENS = (1, 4, 16)  # of 16
