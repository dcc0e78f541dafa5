"""The inputs of assignment 3's tests. Grading uses other numbers."""

SEEDS = (0, 1)
TEMPERATURES = (0.3, 1.0, 2.0)
TAUS = (0.1, 0.5)
STEPS = 4
IMAGES = 2
BETA = 1e-3
SHAPES = ((20, 16), (5, 6))  # (T, K) of a schedule
CURS = (0.0, 0.3, 0.5, 0.77)
BUDGETS = (0.5, 3.0, 5.5)  # of 6
