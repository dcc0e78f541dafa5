"""The inputs of assignment 1's tests. Grading uses other numbers."""

SEEDS = (0, 1)
SHAPES = ((2, 1, 4, 4), (1, 3, 2, 5))  # (B, C, H, W)
LEVELS = ((0.02, 0.1), (0.3, 0.8), (0.9, 1.0))  # alpha_bar before and after a step
STEPS = (5, 20)  # T of the samplers to compare with
ETAS = (0.3, 0.8)
DATA = ((0.7, 0.5), (-0.2, 1.5))  # mean and deviation of Gaussian data
ORDERS = (1, 2, 3)
ENDS = ((4e-5, 0.999),)  # alpha_bar at both ends of a trajectory
COUNTS = (10, 20, 40)
