import argparse
import contextlib
import math
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import dit
import pixart
from tests.small import tiny_dit

SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


def inputs(seed, batch=3, network=None):
    """x, t (fractional) and y, one of which is the null label."""
    generator = torch.Generator().manual_seed(100 + seed)
    size = network.input_size if network else 8
    channels = network.in_channels if network else 2
    x = torch.randn(batch, channels, size, size, generator=generator)
    t = 999 * torch.rand(batch, generator=generator)
    y = torch.randint(5, (batch,), generator=generator)
    y[-1] = 5
    return x, t, y


def relative_error(result, expected):
    return ((result - expected).norm() / expected.norm()).item()


# ------------------------------------------------------------------------------------------------
# The numbers, against an independent implementation


def diffusers_layout(state, depth):
    """Official names -> the names of diffusers, which repeats the embedders in every block."""
    new = {f"pos_embed.proj.{end}": state[f"x_embedder.proj.{end}"] for end in ("weight", "bias")}
    for i in range(depth):
        old, to = f"blocks.{i}.", f"transformer_blocks.{i}."
        new[to + "norm1.emb.class_embedder.embedding_table.weight"] = state[
            "y_embedder.embedding_table.weight"
        ]
        for end in ("weight", "bias"):
            embedder = to + "norm1.emb.timestep_embedder."
            new[f"{embedder}linear_1.{end}"] = state[f"t_embedder.mlp.0.{end}"]
            new[f"{embedder}linear_2.{end}"] = state[f"t_embedder.mlp.2.{end}"]
            new[f"{to}norm1.linear.{end}"] = state[f"{old}adaLN_modulation.1.{end}"]
            parts = state[f"{old}attn.qkv.{end}"].chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                new[f"{to}attn1.to_{letter}.{end}"] = part
            new[f"{to}attn1.to_out.0.{end}"] = state[f"{old}attn.proj.{end}"]
            new[f"{to}ff.net.0.proj.{end}"] = state[f"{old}mlp.fc1.{end}"]
            new[f"{to}ff.net.2.{end}"] = state[f"{old}mlp.fc2.{end}"]
    for end in ("weight", "bias"):
        new[f"proj_out_1.{end}"] = state[f"final_layer.adaLN_modulation.1.{end}"]
        new[f"proj_out_2.{end}"] = state[f"final_layer.linear.{end}"]
    return new


def diffusers_dit(network):
    """diffusers' DiT with the weights of ours. Two constants of it differ from the official code:
    the eps of the second norm (1e-5) and the frequency shift (1). They are set to the official."""
    depth, heads = len(network.blocks), network.blocks[0].attn.num_heads
    other = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=network.pos_embed.shape[-1] // heads,
        in_channels=network.in_channels, out_channels=network.out_channels, num_layers=depth,
        sample_size=network.input_size, patch_size=network.patch_size,
        num_embeds_ada_norm=network.num_classes, norm_eps=1e-6,
    )
    other.load_state_dict(diffusers_layout(network.state_dict(), depth))
    for block in other.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return other.eval()


@SEEDS
@pytest.mark.parametrize(
    "changes", [{}, dict(learn_sigma=False, in_channels=3, patch_size=4, num_heads=4)]
)
@torch.no_grad()
def test_equals_diffusers_with_the_same_weights(seed, changes):
    network = tiny_dit(seed, **changes)
    x, t, y = inputs(seed, network=network)
    expected = diffusers_dit(network)(x, timestep=t, class_labels=y).sample
    assert relative_error(network(x, t, y), expected) < 1e-5


@SEEDS
@torch.no_grad()
def test_equals_diffusers_in_float64(seed):
    """Tight enough to tell a norm's eps of 1e-6 from 1e-5. The sinusoids are float32 in both, and
    agree at small t only."""
    network = tiny_dit(seed)
    x, _, y = inputs(seed)
    t = torch.tensor([0.0, 1.0, 2.0])
    expected = diffusers_dit(network).double()(x.double(), timestep=t, class_labels=y).sample
    assert relative_error(network.double()(x.double(), t, y), expected) < 1e-7


def test_position_embedding_formula():
    """Token (row, column): sines then cosines of the column, then of the row."""
    size, side = 16, 5
    table = dit.position_embedding(size, side)
    assert table.shape == (side * side, size) and table.dtype == torch.float32
    for row in range(side):
        for column in range(side):
            expected = [
                wave(place / 10000 ** (j / (size // 4)))
                for place in (column, row) for wave in (np.sin, np.cos) for j in range(size // 4)
            ]
            np.testing.assert_allclose(table[row * side + column], expected, atol=1e-7)


@pytest.mark.parametrize("name", ("dit", "pixart"))
def test_no_float64_off_the_cpu(name):
    """Apple's GPUs have none. Here the device meta stands for them."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for part in result if isinstance(result, tuple | list) else [result]:
                if isinstance(part, torch.Tensor) and part.device.type != "cpu":
                    assert part.dtype != torch.float64
            return result

    sizes = dict(input_size=8, hidden_size=24, depth=1, num_heads=2)
    with torch.device("meta"), Watch():
        x, t = torch.empty(2, 4, 8, 8), torch.empty(2)
        if name == "dit":
            output = dit.DiT(**sizes)(x, t, torch.zeros(2, dtype=torch.long))
        else:
            network = pixart.PixArt(**sizes, caption_channels=16)
            mask = torch.empty(2, 120, dtype=torch.bool)
            output = network(x, t, torch.empty(2, 120, 16), mask)
    assert output.shape == (2, 8, 8, 8)


def test_timestep_embedding_formula_also_at_fractional_t():
    t = torch.tensor([0.0, 0.25, 53.0, 499.5, 999.0])
    frequency = np.exp(-np.log(10000) * np.arange(128) / 128)
    angle = t.double().numpy()[:, None] * frequency
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    table = dit.timestep_embedding(t, 256)
    assert table.shape == (5, 256) and table.dtype == torch.float32
    np.testing.assert_allclose(table, expected, atol=2e-4)  # float32 angles up to 999
    assert torch.equal(dit.timestep_embedding(t.long(), 256)[2], table[2])


@SEEDS
def test_output_is_continuous_in_t(seed):
    """Between two whole timesteps the output moves as its derivative says, without a jump."""
    network = tiny_dit(seed).double()
    x, t, y = (part[:1] for part in inputs(seed))

    def output(shift):
        return network(x.double(), t.double() + shift, y)

    step = (output(1e-2) - output(0)).norm()
    assert 1e-6 < step < 1e-1 * output(0).norm()
    # Half the distance, half the change; a network that rounds t would not move, or jump.
    assert relative_error(2 * (output(5e-3) - output(0)), output(1e-2) - output(0)) < 2e-2


# ------------------------------------------------------------------------------------------------
# Shapes and sizes


def test_documented_shapes():
    network = tiny_dit()
    x, t, y = inputs(0)
    assert network(x, t, y).shape == (3, 4, 8, 8)
    assert tiny_dit(learn_sigma=False)(x, t, y).shape == (3, 2, 8, 8)
    assert network.x_embedder(x).shape == (3, 16, 32)
    assert network.t_embedder(t).shape == network.y_embedder(y).shape == (3, 32)
    assert network.pos_embed.shape == (1, 16, 32)
    assert network.blocks[0](torch.zeros(3, 16, 32), torch.zeros(3, 32)).shape == (3, 16, 32)
    assert network.final_layer(torch.zeros(3, 16, 32), torch.zeros(3, 32)).shape == (3, 16, 16)
    assert network.guidance_channels == 2
    assert tiny_dit(in_channels=4).guidance_channels == 3


def test_condition_is_the_labels_then_the_null_label():
    network = tiny_dit()
    (labels,) = network.condition([3, 0, 4])
    assert labels.tolist() == [3, 0, 4, 5, 5, 5]
    assert torch.equal(network.condition(torch.tensor([3, 0, 4]))[0], labels)


def test_unpatchify_undoes_cutting_into_patches():
    """Token n holds patch (n // side, n % side), its numbers in the order p, q, channel."""
    network = tiny_dit()
    image = torch.arange(2 * 4 * 8 * 8.0).view(2, 4, 8, 8)
    patches = [
        image[:, :, 2 * row + p, 2 * column + q]  # (B, C_out)
        for row in range(4) for column in range(4) for p in range(2) for q in range(2)
    ]
    assert torch.equal(network.unpatchify(torch.cat(patches, 1).view(2, 16, 16)), image)


# Table 4 of the paper: millions of parameters, and "Gflops", which are multiply-adds.
PAPER = {
    "S/8": (33, 0.36), "S/4": (33, 1.41), "S/2": (33, 6.06),
    "B/8": (131, 1.42), "B/4": (130, 5.56), "B/2": (130, 23.01),
    "L/8": (459, 5.01), "L/4": (458, 19.70), "L/2": (458, 80.71),
    "XL/8": (676, 7.39), "XL/4": (675, 29.05), "XL/2": (675, 118.64),
}  # fmt: skip


def test_the_sizes_are_the_published_ones():
    assert set(dit.SIZES) == {*PAPER, "digits"}


@pytest.mark.parametrize("name", PAPER)
def test_size_has_the_published_parameters_and_arithmetic(name):
    with torch.device("meta"):
        network = dit.DiT(**dit.SIZES[name])
    parameters = sum(parameter.numel() for parameter in network.parameters())
    branches, rest = network.flops()
    assert round(parameters / 1e6) == PAPER[name][0]
    assert (sum(branches) + rest) / 2e9 == pytest.approx(PAPER[name][1], rel=1e-3, abs=0.005)
    sizes = dit.SIZES[name]
    assert sizes["hidden_size"] / sizes["num_heads"] == (72 if "XL" in name else 64)  # table 1
    if name == "XL/2":  # the official count; its fixed pos_embed is a parameter there
        assert parameters + network.pos_embed.numel() == 675_129_632


@pytest.mark.parametrize(
    "changes", [dict(input_size=9), dict(num_heads=3), dict(hidden_size=34), dict(patch_size=3)]
)
def test_sizes_that_do_not_divide_raise(changes):
    with pytest.raises(ValueError, match="multiple"):
        tiny_dit(**changes)


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (3, 2, 16, 16), (3, 2, 8, 4), (2, 8, 8)])
def test_x_of_another_shape_raises(shape):
    _, t, y = inputs(0)
    with pytest.raises(ValueError, match="x must be"):
        tiny_dit()(torch.zeros(shape), t, y)


@pytest.mark.parametrize("labels", [[0, 5], [-1], [1, 2, 1000]])
def test_labels_out_of_range_raise(labels):
    with pytest.raises(ValueError, match="from 0 to 4"):
        tiny_dit().condition(labels)


# ------------------------------------------------------------------------------------------------
# Behaviour of the network


@SEEDS
def test_an_image_does_not_depend_on_its_batch(seed):
    network = tiny_dit(seed)
    x, t, y = inputs(seed, batch=6)
    whole = network(x, t, y)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    for rows in [order, order[:4], *order.split(1)]:
        part = network(x[rows], t[rows], y[rows])
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-5)


@SEEDS
def test_other_dtypes(seed):
    """The weights decide the arithmetic, x the dtype that comes out."""
    network = tiny_dit(seed)
    x, t, y = inputs(seed)
    expected = network(x, t, y)
    assert network(x.double(), t, y).dtype == torch.float64
    network.bfloat16()
    result = network(x, t, y)
    assert result.dtype == torch.float32
    assert 1e-4 < relative_error(result, expected) < 0.1  # it really computed in 8 bits of mantissa
    assert network(x.bfloat16(), t, y).dtype == torch.bfloat16


@SEEDS
def test_a_branch_is_gated_by_the_current_step_whatever_answers_for_it(seed):
    """x + gate1 * answer1 + gate2 * answer2, the gates being the third and the last of six."""
    block = tiny_dit(seed).blocks[1]
    generator = torch.Generator().manual_seed(seed)
    x, answer, other = torch.randn(3, 2, 16, 32, generator=generator)
    c = torch.randn(2, 32, generator=generator)
    gates = block.adaLN_modulation(c).view(2, 6, 1, 32)
    result = block(x, c, lambda k, branch: {7: answer, 8: other}[k], 7)
    torch.testing.assert_close(result, x + gates[:, 2] * answer + gates[:, 5] * other)


@SEEDS
def test_a_cache_is_asked_once_for_each_branch_in_order(seed):
    """What it is offered is the output of the attention or the MLP itself, before the gate."""
    network = tiny_dit(seed)
    made, offered = [], {}
    for block in network.blocks:
        for module in (block.attn, block.mlp):
            module.register_forward_hook(lambda module, args, output: made.append(output))

    def cache(k, branch):
        offered[k] = branch()
        return offered[k]

    x, t, y = inputs(seed)
    result = network(x, t, y, cache=cache)
    assert network.branches == ["attn 0", "mlp 0", "attn 1", "mlp 1", "attn 2", "mlp 2"]
    assert list(offered) == list(range(6))
    assert all(offered[k] is made[k] for k in range(6))
    assert torch.equal(result, network(x, t, y))


def test_initialize_makes_every_block_the_identity_and_the_output_zero():
    network = dit.initialize(tiny_dit())
    x, t, y = inputs(0)
    assert torch.equal(network(x, t, y), torch.zeros(3, 4, 8, 8))
    tokens, c = network.x_embedder(x), network.t_embedder(t) + network.y_embedder(y)
    assert torch.equal(network.blocks[0](tokens, c), tokens)
    for weight in (network.blocks[0].attn.qkv.weight, network.x_embedder.proj.weight.flatten(1)):
        bound = (6 / sum(weight.shape)) ** 0.5  # Xavier's uniform distribution
        assert 0.95 * bound < weight.abs().max() <= bound
    for table in (network.y_embedder.embedding_table, network.t_embedder.mlp[0]):
        assert table.weight.std() == pytest.approx(0.02, rel=0.2)


# ------------------------------------------------------------------------------------------------
# Arithmetic


@pytest.mark.parametrize(
    "changes",
    [{}, dict(patch_size=4, mlp_ratio=2.0), dict(learn_sigma=False, depth=2, hidden_size=64)],
)
def test_flops_equal_the_counted(changes):
    network = tiny_dit(**changes)
    x, t, y = inputs(0, batch=1)
    tokens = torch.zeros_like(network.pos_embed)
    branches, rest = network.flops()

    def counted(function, *args):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            function(*args)
        return counter.get_total_flops()

    assert len(branches) == len(network.branches)
    assert counted(network, x, t, y) == sum(branches) + rest
    for i, block in enumerate(network.blocks):
        assert counted(block.attn, tokens) == branches[2 * i]
        assert counted(block.mlp, tokens) == branches[2 * i + 1]


# ------------------------------------------------------------------------------------------------
# Weights


def save(path, content):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "bare.pt", "ema.pt"])
def test_weights_are_read_as_they_were_written(tmp_path, name):
    network, other = tiny_dit(1), tiny_dit(2)
    state = network.state_dict()
    # A training checkpoint has the average under `ema`, beside a model that is not to be read.
    content = {"ema": state, "model": other.state_dict(), "steps": 7} if name == "ema.pt" else state
    read = dit.read_weights(save(tmp_path / name, content), other)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)
    other.load_state_dict(read)
    assert torch.equal(other(*inputs(0)), network(*inputs(0)))


@SEEDS
def test_the_layout_of_diffusers_is_written_and_read(tmp_path, seed):
    """`diffusers_layout` above, by which diffusers' own network gives our output, is the oracle."""
    network, other = tiny_dit(seed), tiny_dit(seed + 1)
    state = network.state_dict()
    theirs = checkpoint.to_diffusers(state, network)
    expected = diffusers_layout(state, len(network.blocks))
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[key], expected[key]) for key in theirs)
    read = dit.read_weights(save(tmp_path / "w.safetensors", theirs), other)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)
    other.load_state_dict(read)
    assert torch.equal(other(*inputs(seed)), network(*inputs(seed)))


def test_the_full_size_layout_has_the_names_and_shapes_of_diffusers():
    with torch.device("meta"):
        network = dit.DiT(**dit.SIZES["XL/2"])
        other = DiTTransformer2DModel(sample_size=32, out_channels=8)
    theirs = other.state_dict()
    ours = checkpoint.to_diffusers(network.state_dict(), network)
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }


def test_what_does_not_fit_in_the_layout_of_diffusers_is_named_as_in_the_file(tmp_path):
    network = tiny_dit()
    whole = checkpoint.to_diffusers(network.state_dict(), network)
    state = dict(whole)
    del state["transformer_blocks.1.attn1.to_k.bias"]
    state.update({"proj_out_1.weight": torch.zeros(3), "proj_out.weight": torch.zeros(1)})
    with pytest.raises(ValueError) as caught:
        dit.read_weights(save(tmp_path / "w.pt", state), network)
    assert str(caught.value).endswith(
        "missing transformer_blocks.1.attn1.to_k.bias; unexpected proj_out.weight; "
        "proj_out_1.weight is (3,), not (64, 32)"
    )
    name = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    whole[name] = whole[name] + 1
    with pytest.raises(ValueError, match=f"{name} is not the same in every block"):
        dit.read_weights(save(tmp_path / "w.pt", whole), network)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_one_error_names_every_key_that_does_not_fit(tmp_path, name):
    network = tiny_dit()
    state = network.state_dict()
    del state["x_embedder.proj.bias"], state["pos_embed"]
    state["blocks.1.mlp.fc1.weight"] = torch.zeros(3, 7)
    state["blocks.1.mlp.fc1.bias"] = torch.zeros(4)
    state.update({"blocks.9.attn.proj.bias": torch.zeros(1), "step": torch.zeros(2)})
    with pytest.raises(ValueError) as caught:
        dit.read_weights(save(tmp_path / name, state), network)
    message = str(caught.value)
    for part in (
        str(tmp_path / name), "missing pos_embed, x_embedder.proj.bias;",
        "unexpected blocks.9.attn.proj.bias, step;",
        "blocks.1.mlp.fc1.weight is (3, 7), not (128, 32)",
        "blocks.1.mlp.fc1.bias is (4,), not (128,)",
    ):
        assert part in message
    assert message.count(";") == 2


def test_the_error_about_another_network_is_short(tmp_path):
    """Of 340 keys that are missing three are named; the line fits a terminal."""
    path = save(tmp_path / "w.pt", {"weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"missing \S+, \S+, \S+ and \d+ more; unexp") as caught:
        dit.read_weights(path, tiny_dit())
    assert len(str(caught.value)) < 400


PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "model.", "net.",
            "model.diffusion_model.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_wrappers_put_before_the_names_is_taken_off(tmp_path, prefix):
    network = tiny_dit()
    state = network.state_dict()
    named = {prefix + key: value for key, value in state.items()}
    for content in (named, {"model": named, "epoch": 3}):
        read = dit.read_weights(save(tmp_path / "w.pt", content), network)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)


def test_a_checkpoint_of_dits_own_training_gives_its_average(tmp_path):
    """`ema` beside `model`, `opt` and `args`, a Namespace; what else it names is said, not run."""
    network = tiny_dit()
    ema = {key: value + 1 for key, value in network.state_dict().items()}
    content = {"model": network.state_dict(), "ema": ema, "opt": {"state": {}},
               "args": argparse.Namespace(model="DiT-XL/2", epochs=1400)}
    read = dit.read_weights(save(tmp_path / "w.pt", content), network)
    assert all(torch.equal(read[key], ema[key]) for key in ema)
    with pytest.raises(ValueError, match=r"numpy\.dtype.*use a \.safetensors file"):
        dit.read_weights(save(tmp_path / "n.pt", {**content, "loss": np.float64(1)}), network)


def litema(state):
    """The names that Stable Diffusion's trainer gives its average: "model.", without the dots, and
    without the embedding, which is not trained."""
    last = {f"model.{key}": value for key, value in state.items()}
    average = {f"model_ema.{key.replace('.', '')}": value + 1 for key, value in state.items()
               if key != "pos_embed"}
    return {**last, **average, "model_ema.decay": torch.ones(()),
            "model_ema.num_updates": torch.tensor(3)}


BESIDE = {  # files with averaged weights, 1 above the last ones
    "ema": lambda last, average: {"model": last, "ema": average},
    "state_dict_ema": lambda last, average: {"state_dict": last, "state_dict_ema": average,
                                             "epoch": 3},
    "ema_state_dict": lambda last, average: {
        "state_dict": last, "ema_state_dict": {f"module.{k}": v for k, v in average.items()}},
    "model_ema": lambda last, average: {"module": last, "model_ema": average},
    "model_ema.": lambda last, average: {"state_dict": litema(last)},
    "ema_model.": lambda last, average: {
        **{f"model.{k}": v for k, v in last.items()}, "step": torch.tensor(3),
        **{f"ema_model.{k}": v for k, v in average.items()}},
    "ema.": lambda last, average: {
        **{f"net.{k}": v for k, v in last.items()}, **{f"ema.{k}": v for k, v in average.items()}},
}


@pytest.mark.parametrize("name", BESIDE)
def test_averaged_weights_come_before_the_last_ones_in_one_line(tmp_path, name):
    network = tiny_dit()
    last = network.state_dict()
    average = {key: value + (key != "pos_embed") for key, value in last.items()}
    path = save(tmp_path / "w.pt", BESIDE[name](last, average))
    with pytest.warns(UserWarning) as told:
        read = dit.read_weights(path, network)
    assert read.keys() == last.keys()
    assert all(torch.equal(read[key], average[key]) for key in average)
    (line,) = [str(warning.message) for warning in told]
    assert f"holds averaged weights, `{name}`, beside the last ones: the averaged are used" in line


def test_an_average_that_is_not_whole_is_refused(tmp_path):
    """The last weights do not fill it up."""
    network = tiny_dit()
    content = litema(network.state_dict())
    del content["model_ema.blocks1attnprojbias"]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="missing blocks.1.attn.proj.b"):
        dit.read_weights(save(tmp_path / "w.safetensors", content), network)


@pytest.mark.parametrize("change, words", (
    (lambda x: x.to(torch.int8), "is int8, not floating point"),
    (lambda x: x > 0, "is bool, not floating point"),
    (lambda x: x.to(torch.complex64), "is complex64, not floating point"),
    (lambda x: x * math.nan, "holds NaN or infinite numbers"),
    (lambda x: x.to_sparse(), "is no ordinary tensor"),
    (lambda x: x.to("meta"), "is no ordinary tensor"),
    (lambda x: (448 * x / x.abs().max()).to(torch.float8_e4m3fn), "fills the range of float8_e4m3"),
    (lambda x: (57344 * x / x.abs().max()).to(torch.float8_e5m2), "fills the range of float8_e5m2"),
))
def test_what_is_no_weight_is_refused_by_name(tmp_path, change, words):
    network = tiny_dit()
    state = network.state_dict()
    state["blocks.0.mlp.fc2.weight"] = change(state["blocks.0.mlp.fc2.weight"])
    with pytest.raises(ValueError, match=f"w.pt: blocks.0.mlp.fc2.weight {words}"):
        dit.read_weights(save(tmp_path / "w.pt", state), network)


def test_weights_rounded_to_float8_load_as_they_are(tmp_path):
    """Without a scale nothing is lost but the rounding. Scales in the file are not read."""
    network = tiny_dit()
    state = {key: x.to(torch.float8_e4m3fn) for key, x in network.state_dict().items()}
    network.load_state_dict(dit.read_weights(save(tmp_path / "w.safetensors", state), network))
    assert all(torch.equal(x, state[key].float()) for key, x in network.state_dict().items())
    state["blocks.0.mlp.fc2.weight_scale"] = torch.ones(())
    with pytest.raises(ValueError, match="unexpected blocks.0.mlp.fc2.weight_scale"):
        dit.read_weights(save(tmp_path / "w.safetensors", state), network)


def test_weights_of_another_resolution_are_refused(tmp_path):
    """Official files of one size say their number of tokens, diffusers' config.json the side."""
    large, network = tiny_dit(input_size=16), tiny_dit()
    with pytest.raises(ValueError, match="64 tokens, this network for 16: .* another resolution"):
        dit.read_weights(save(tmp_path / "w.pt", large.state_dict()), network)
    path = save(tmp_path / "w.safetensors", checkpoint.to_diffusers(large.state_dict(), large))
    (tmp_path / "config.json").write_text('{"sample_size": 16, "patch_size": 2}')
    with pytest.raises(ValueError, match="sides of 16, by its config.json, this network for 8"):
        dit.read_weights(path, network)
    assert dit.read_weights(path, large).keys() == large.state_dict().keys()
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="config.json is not diffusers' config.json"):
        dit.read_weights(path, large)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_truncated_file_raises(tmp_path, name, share):
    path = save(tmp_path / name, tiny_dit().state_dict())
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=f"{name} is not a whole checkpoint"):
        dit.read_weights(path, tiny_dit())


@pytest.mark.parametrize("cut", [0, 2, 100, 1000])
def test_a_damaged_pickle_in_a_whole_archive_raises(tmp_path, cut):
    path, whole = tmp_path / "w.pt", save(tmp_path / "whole.pt", tiny_dit().state_dict())
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[: cut if name.endswith("data.pkl") else None])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        dit.read_weights(path, tiny_dit())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w"])
def test_a_text_file_raises(tmp_path, name):
    (tmp_path / name).write_text("<html>404: Not Found</html>\n" * 20)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        dit.read_weights(tmp_path / name, tiny_dit())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "."])
def test_a_missing_file_raises(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no weights"):
        dit.read_weights(tmp_path / name, tiny_dit())


class Code:
    """Pickles as a call: reading it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, writer):
    path, trace = tmp_path / "w.pt", tmp_path / "trace"
    content = {**tiny_dit().state_dict(), "extra": Code(trace)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        dit.read_weights(path, tiny_dit())
    assert not trace.exists()
    with contextlib.suppress(Exception):  # the trap works: a reader that trusts it does run it
        torch.load(path, weights_only=False) if writer == "torch" else pickle.loads(
            path.read_bytes()
        )
    assert trace.exists()


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.zeros(3), 5, None, {"ema": torch.zeros(3)}, {"ema": [1]}, {"ema": None},
     {1: torch.zeros(1)}, {"pos_embed": 3}],
    ids=str,
)  # fmt: skip
def test_another_content_raises(tmp_path, content):
    with pytest.raises(ValueError, match=r"w\.pt"):
        dit.read_weights(save(tmp_path / "w.pt", content), tiny_dit())
