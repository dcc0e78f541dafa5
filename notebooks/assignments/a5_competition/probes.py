"""How the tests of assignment 5 call your functions where plain numbers are not enough. It runs in
the same process as student.py, which each function gets first."""

import time

import torch

import dit
import models
from samplers import Noise, denoise, make_sampler


def small_model(seed, steps, depth):
    """A DiT of 16 tokens and 2 x depth branches, with no gate at zero."""
    network = dit.DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=depth,
                      num_heads=2, num_classes=5)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return models.Model("small", network.eval().requires_grad_(False), "ddim", steps, 1.5)


class Images:
    """The images that a schedule is judged by: their noise, and the images without a cache."""

    def __init__(self, model, seed, count):
        noise = Noise(seed, range(count))
        self.model, self.x = model, noise.start(model.shape)
        self.condition = model.condition(noise.labels(model.network.num_classes))
        self.full = self.made()

    def made(self, cache=None):
        model = self.model
        return denoise(model.network, make_sampler(model.sampler, model.steps), self.x,
                       self.condition, model.guidance, cache)


def error_of(student, seed, steps, depth, count, schedule, full):
    model = small_model(seed, steps, depth)
    images = Images(model, seed, count)
    return student.error_of(model, schedule, images.x, images.condition, full)


def neighbours(student, schedule, seed, count):
    """That many neighbours of one schedule, and the schedule after it."""
    generator = torch.Generator().manual_seed(seed)
    return [[student.neighbour(schedule, generator) for _ in range(count)], schedule]


def search(student, seed, steps, depth, count, schedule, seconds):
    """-> the schedule found, the processor time that it took, and the first schedule after it."""
    images = Images(small_model(seed, steps, depth), seed, count)
    start = time.process_time()
    found = student.search(images.model, schedule, images.x, images.condition, seconds)
    return [found, time.process_time() - start, schedule]


def make_schedule(student, seed, steps, depth, seconds):
    """For a small model, or for digits without a seed. -> the schedule and the processor time."""
    digits = seed is None
    model = models.load("digits", device="cpu") if digits else small_model(seed, steps, depth)
    start = time.process_time()
    return [student.make_schedule(model, seconds), time.process_time() - start]
