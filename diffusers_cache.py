"""A router in a pipeline of the library diffusers: its transformer then reuses branches as ours do.

    pipe = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256")     # or a pipeline of PixArt
    cache = apply_router_cache(pipe.transformer, "router.safetensors")
    images = pipe([207, 360], num_inference_steps=20).images        # T of the router
    print(cache.cur)                                                # counted
    remove_router_cache(pipe.transformer)

A block of diffusers multiplies the outputs of its modules `attn1`, `attn2` (PixArt) and `ff` by
their gates afterwards, so that they are what our networks hand to the cache. A hook on each module
asks `cache.Cache`, which calls the module or not. (Unlike ours, a block computes its norms and
modulation also for a branch that is reused.) `enable_cache` of diffusers cannot do this: the
transformers of DiT and PixArt do not have it.

The decisions are those of our own sampling, the images are the pipeline's: diffusers guides all
four channels, where the official DiT guides three; its schedulers have timesteps of their own (at
T = 20 DDIM goes 950, 900, ..., 0, not 999, 946, ..., 0); and its DiT embeds timesteps a little
differently. Which scheduler takes the steps cannot be seen here: use the router's own kind.

When does a trajectory begin? A hook on the transformer sees its forward passes only, so the rule
is: when the timestep is not below the last one, when the shape of the batch has changed, or when
the last pass failed. Then the step is 0 and the cache empty. Every other pass is the next step.

And if the pipeline makes another number of steps than T? Step i has to be within 1.5 strides, of
1000 / T timesteps, of where row i was trained, and there is no step T: otherwise ValueError. So a
number that is quite different fails within the first steps, and one that is too large by the end.
One that is too small by one or two can pass, as schedulers differ by as much among themselves: then
the next trajectory begins with a warning that the last was interrupted, or too short.

Notation: T steps, K branches, t the timestep.
"""

import inspect
import warnings

import torch
from diffusers.hooks import HookRegistry, ModelHook

import checkpoint
import layout
import models
import router
from cache import Cache
from samplers import make_sampler

NAME = "router_cache"  # of every hook
BRANCHES = {  # the class of a transformer: the modules of a block, in the order in which they run
    "DiTTransformer2DModel": ("attn1", "ff"),
    "PixArtTransformer2DModel": ("attn1", "attn2", "ff"),
}

# ------------------------------------------------------------------------------------------------
# Hooks


class StepHook(ModelHook):
    """On the transformer: tells the cache which step a forward pass is. `timesteps`, a list of T,
    are those that the router was trained for."""

    def __init__(self, cache, timesteps, path):
        super().__init__()
        self.cache, self.timesteps, self.path = cache, timesteps, path
        self.last = None  # timestep and shape of the last pass; None: it failed, or there is none
        self.next = None  # the branch that has to run next

    def pre_forward(self, module, *args, **kwargs):
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        t, shape = torch.as_tensor(given["timestep"]).flatten(), tuple(given["hidden_states"].shape)
        if (t != t[0]).any():
            raise ValueError(f"the images of a batch are at different timesteps: {t.tolist()}")
        self.now, last, self.last = (t[0].item(), shape), self.last, None
        self.cache.start(self.step(last))
        self.next = 0
        return args, kwargs

    def step(self, last):
        """Which step the pass `now` is, if `last` was before it. Raises ValueError if the pipeline
        is not on the router's way."""
        T, (t, shape) = len(self.timesteps), self.now
        begins = last is None or t >= last[0] or shape != last[1]
        if begins and last is not None and self.cache.step < T - 1:
            warnings.warn(f"the last trajectory ended after {self.cache.step + 1} of {T} steps: if "
                          f"it was not interrupted, use num_inference_steps={T}", stacklevel=2)
        i = 0 if begins else self.cache.step + 1
        if i == T:
            raise ValueError(f"{self.path} is a router of T = {T} steps, and the pipeline makes "
                             f"more: use num_inference_steps={T}")
        if abs(t - self.timesteps[i]) > 1500 / T:
            raise ValueError(f"{self.path}: step {i} of T = {T} is at timestep {t:g}, far from "
                             f"{self.timesteps[i]:g}: use num_inference_steps={T}, a scheduler "
                             'with timestep_spacing="trailing", and one batch all the way')
        return i

    def branch(self, k, compute):
        """The output of branch k. Raises ValueError unless every branch is asked once, in order."""
        if k != self.next:
            raise ValueError(f"branch {k} runs where {self.next} should: the cache needs a whole "
                             "pass of the transformer, without chunks (disable_forward_chunking)")
        self.next += 1
        return self.cache(k, compute)

    def post_forward(self, module, output):
        self.last, self.next = self.now, None
        return output


class BranchHook(ModelHook):
    """On the module of branch k: runs it only where the cache says so."""

    def __init__(self, k, steps):
        super().__init__()
        self.k, self.steps = k, steps

    def new_forward(self, module, *args, **kwargs):
        return self.steps.branch(self.k, lambda: self.fn_ref.original_forward(*args, **kwargs))


# ------------------------------------------------------------------------------------------------
# To apply and to remove it


def branch_modules(transformer):
    """The K modules whose outputs are kept, in execution order. Raises ValueError for a
    transformer of another class."""
    kind = type(transformer).__name__
    if kind not in BRANCHES:
        raise ValueError(f"the cache is for the transformer of a pipeline, {' or '.join(BRANCHES)},"
                         f" not for a {kind}")
    return [getattr(block, name) for block in transformer.transformer_blocks
            for name in BRANCHES[kind]]


def check_router(file, transformer, branches):
    """Raises ValueError if a router (router.RouterFile) says that it is for another model than this
    transformer of K = `branches`. One that does not name its model may belong to any, and at
    512 x 512 PixArt-alpha and Sigma are the same network here."""
    K, name = file.logits.shape[1], file.about["model"]
    if branches != K:
        raise ValueError(f"{file.path} is a router of {name} with K = {K} branches, this "
                         f"transformer has {branches}")
    if name == checkpoint.UNNAMED:
        return
    about = {**transformer.config, "_class_name": type(transformer).__name__}
    # Of a PixArt; its config may leave it to the network.
    about["use_additional_conditions"] = getattr(transformer, "use_additional_conditions", None)
    problems = layout.differences(about, models.bare_network(name))
    if problems:
        raise ValueError(f"{file.path} is a router of {name}, and this transformer is another: "
                         + layout.few("", problems))


def apply_router_cache(transformer, path):
    """From now on the transformer of a pipeline reuses branches as the router file `path` says, at
    its own tau and in its order of forecast. -> the cache, whose `computed`, `reused` and `cur`
    count what happens.

    Raises ValueError for a transformer of another class, a router of another model, or one that has
    a cache already; FileNotFoundError as `router.load`. Later, a pass of the transformer raises
    ValueError if the pipeline leaves the router's way (see above).
    """
    modules = branch_modules(transformer)
    file = router.load(path)
    check_router(file, transformer, len(modules))
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    if registry.get_hook(NAME):
        raise ValueError("this transformer has a router already: remove_router_cache first")
    cache = Cache(file.schedule(), file.forecast)
    timesteps = make_sampler(file.about["sampler"], cache.steps).timesteps
    steps = StepHook(cache, timesteps, file.path)
    registry.register_hook(steps, NAME)
    for k, module in enumerate(modules):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(BranchHook(k, steps), NAME)
    return cache


def remove_router_cache(transformer):
    """Takes the hooks away: the transformer computes everything again. Does nothing without them.
    Raises ValueError for a transformer of another class."""
    for module in [transformer, *branch_modules(transformer)]:
        HookRegistry.check_if_exists_or_initialize(module).remove_hook(NAME, recurse=False)
