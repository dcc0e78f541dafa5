import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import dit
import pixart
import samplers
from cache import Cache

SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])
VARIANTS = pytest.mark.parametrize(
    "changes, height, width",
    [
        ({}, 8, 8),
        (dict(micro_conditions=True, pe_interpolation=2.0), 6, 10),
        (dict(pe_interpolation=0.5, learn_sigma=False, in_channels=3, num_heads=4), 12, 4),
        (dict(patch_size=4, mlp_ratio=2.0), 8, 16),
    ],
)


def tiny_pixart(seed=0, **changes):
    """A frozen PixArt with 16 tokens, 7 caption tokens and 6 branches, of which every parameter is
    drawn N(0, 0.2^2): the tables and the output layer too, so that every branch acts."""
    sizes = dict(
        input_size=8, patch_size=2, in_channels=2, hidden_size=24, depth=2, num_heads=2,
        caption_channels=10, model_max_length=7,
    )
    generator = torch.Generator().manual_seed(seed)
    network = pixart.PixArt(**{**sizes, **changes})
    for weight in [*network.parameters(), *network.buffers()]:
        torch.nn.init.normal_(weight, std=0.2, generator=generator)
    return network.eval().requires_grad_(False)


def inputs(network, seed=0, height=8, width=8):
    """x, t (fractional), captions of 3, 7 and 1 tokens, their mask, picture sizes and ratios."""
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(3, network.in_channels, height, width, generator=generator)
    t = 999 * torch.rand(3, generator=generator)
    M = network.model_max_length
    y = torch.randn(3, M, network.caption_channels, generator=generator)
    mask = torch.arange(M) < torch.tensor([[3], [M], [1]])
    if not network.micro_conditions:
        return x, t, y, mask
    size = 1000 * torch.rand(3, 2, generator=generator)
    return x, t, y, mask, size, 2 * torch.rand(3, 1, generator=generator)


def relative_error(result, expected):
    return ((result - expected).norm() / expected.norm()).item()


# ------------------------------------------------------------------------------------------------
# The numbers, against an independent implementation


def diffusers_pixart(network):
    """diffusers' PixArt with the weights of ours, through the layout that it loads strictly."""
    D, heads = network.hidden_size, network.blocks[0].attn.num_heads
    other = PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=D // heads, cross_attention_dim=D,
        in_channels=network.in_channels, out_channels=network.out_channels,
        num_layers=len(network.blocks), sample_size=network.input_size,
        patch_size=network.patch_size, interpolation_scale=network.pe_interpolation,
        use_additional_conditions=network.micro_conditions,
        caption_channels=network.caption_channels,
    )
    if network.mlp_ratio != 4:  # a width that it has no argument for
        for block in other.transformer_blocks:
            block.ff.net[0].proj = torch.nn.Linear(D, int(D * network.mlp_ratio))
            block.ff.net[2] = torch.nn.Linear(int(D * network.mlp_ratio), D)
    other.load_state_dict(checkpoint.to_diffusers(network.state_dict(), network))
    return other.eval()


def diffusers_output(other, x, t, y, mask, size=None, ratio=None):
    extra = None if size is None else dict(resolution=size, aspect_ratio=ratio)
    return other(x, encoder_hidden_states=y, timestep=t, encoder_attention_mask=mask.long(),
                 added_cond_kwargs=extra).sample  # fmt: skip


@SEEDS
@VARIANTS
@torch.no_grad()
def test_equals_diffusers_with_the_same_weights(seed, changes, height, width):
    network = tiny_pixart(seed, **changes)
    args = inputs(network, seed, height, width)
    expected = diffusers_output(diffusers_pixart(network), *args)
    assert relative_error(network(*args), expected) < 1e-5


@VARIANTS
@torch.no_grad()
def test_equals_diffusers_in_float64(changes, height, width):
    """Tight enough to tell a norm's eps of 1e-6 from 1e-5. The sinusoids are float32 in both."""
    network = tiny_pixart(**changes)
    x, t, *rest = inputs(network, 0, height, width)
    args = x.double(), torch.tensor([0.0, 1.0, 2.0]), rest[0].double(), *rest[1:]
    expected = diffusers_output(diffusers_pixart(network).double(), *args)
    assert relative_error(network.double()(*args), expected) < 1e-7


@SEEDS
def test_padding_is_not_seen(seed):
    network = tiny_pixart(seed)
    x, t, y, mask = inputs(network, seed)
    expected = network(x, t, y, mask)
    assert torch.equal(network(x, t, torch.where(mask[..., None], y, 1e3), mask), expected)
    assert not torch.equal(network(x, t, y, mask | True), expected)
    for b, tokens in enumerate(mask.sum(1)):  # the caption cut at its end
        part = slice(b, b + 1)
        alone = network(x[part], t[part], y[part, :tokens], mask[part, :tokens])
        torch.testing.assert_close(alone, expected[part], rtol=0, atol=1e-5)


def test_positions_span_the_training_size_whatever_the_resolution():
    """Token (row, column) of h x w is at row * base / h / scale, column * base / w / scale."""
    network = tiny_pixart(pe_interpolation=2.0)  # trained on 4 x 4 tokens
    table = network.places(2, 16).view(2, 16, 24)
    assert table.dtype == torch.float32
    frequency = 10000.0 ** -(torch.arange(6, dtype=torch.float64) / 6)
    for row, column in ((0, 0), (1, 5), (1, 15)):
        expected = []
        for place in (column * 4 / 16 / 2, row * 4 / 2 / 2):
            expected += [(place * frequency).sin(), (place * frequency).cos()]
        torch.testing.assert_close(table[row, column].double(), torch.cat(expected), rtol=0,
                                   atol=1e-7)  # fmt: skip
    square = tiny_pixart().places(4, 4)
    assert torch.equal(square, dit.position_embedding(24, 4))


@SEEDS
def test_other_dtypes(seed):
    """The weights decide the arithmetic, x the dtype that comes out."""
    network = tiny_pixart(seed, micro_conditions=True)
    x, *rest = inputs(network, seed)
    expected = network(x, *rest)
    network.bfloat16()
    result = network(x, *rest)
    assert result.dtype == torch.float32 and network(x.bfloat16(), *rest).dtype == torch.bfloat16
    assert 1e-4 < relative_error(result, expected) < 0.1


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (3, 2, 8, 7), (3, 2, 9, 8), (2, 8, 8)])
def test_x_of_another_shape_raises(shape):
    network = tiny_pixart()
    _, t, y, mask = inputs(network)
    with pytest.raises(ValueError, match="x must be"):
        network(torch.zeros(shape), t, y, mask)


@pytest.mark.parametrize(
    "changes", [dict(input_size=9), dict(num_heads=5), dict(hidden_size=18), dict(patch_size=3),
                dict(micro_conditions=True, hidden_size=32)]
)  # fmt: skip
def test_sizes_that_do_not_divide_raise(changes):
    with pytest.raises(ValueError, match="multiple"):
        tiny_pixart(**changes)


# ------------------------------------------------------------------------------------------------
# The condition of a guided batch


def test_condition_is_the_captions_then_the_null_caption_with_the_same_masks():
    network = tiny_pixart()
    _, _, y, mask = inputs(network)
    both, masks = network.condition(y, mask.long())
    assert torch.equal(both[:3], y) and torch.equal(masks, torch.cat([mask, mask]))
    assert torch.equal(both[3:], network.y_embedder.y_embedding.expand(3, 7, 10))
    null = torch.randn(7, 10)
    assert torch.equal(network.condition(y, mask, null=null)[0][3:], null.expand(3, 7, 10))


def test_an_empty_prompt_is_the_null_caption():
    """So guidance does nothing to it, and no softmax is over nothing."""
    network = tiny_pixart()
    x, t, y, mask = inputs(network)
    y[1], mask[1] = 0, False
    both, masks = network.condition(y, mask)
    assert torch.equal(both[1], network.y_embedder.y_embedding) and torch.equal(both[1], both[4])
    assert masks[1].all() and masks[4].all() and torch.equal(masks[0], mask[0])
    output = network(torch.cat([x, x]), torch.cat([t, t]), both, masks)
    assert output.isfinite().all()
    torch.testing.assert_close(output[1], output[4], rtol=0, atol=1e-4)
    assert not torch.allclose(output[0], output[3], rtol=0, atol=1e-3)


def test_a_caption_of_which_nothing_is_seen_raises():
    network = tiny_pixart()
    _, _, y, mask = inputs(network)
    mask[1] = False
    with pytest.raises(ValueError, match="mask is all False"):
        network.condition(y, mask)


@pytest.mark.parametrize("size, expected", [
    (None, (64, 64, 1)), ((96, 32), (96, 32, 3)), ((768, 1344), (768, 1344, np.float32(0.57))),
    ((1344, 768), (1344, 768, 1.75)), ((64, 1024), (64, 1024, 0.25)), ((1024, 64), (1024, 64, 4)),
])  # fmt: skip
def test_micro_conditions_are_the_pictures_size_and_aspect_ratio(size, expected):
    """The ratio is the nearest of those of the official sampling (ASPECT_RATIO_1024_TEST)."""
    network = tiny_pixart(micro_conditions=True)
    x, t, y, mask, *_ = inputs(network)
    _, _, sizes, ratios = network.condition(y, mask, size)
    assert sizes.tolist() == [list(expected[:2])] * 6 and ratios.tolist() == [[expected[2]]] * 6
    assert len(tiny_pixart().condition(y, mask, size)) == 2


def test_the_ratios_are_those_of_diffusers():
    """An independent copy of the official table; their sides have these ratios, cut or rounded."""
    module = pytest.importorskip("diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha")
    table = module.ASPECT_RATIO_1024_BIN
    assert sorted(map(float, table)) == list(pixart.RATIOS)
    for ratio, (height, width) in table.items():
        assert abs(float(ratio) - height / width) < 0.01


@pytest.mark.parametrize(
    "y, mask, null", [((3, 6, 10), (3, 6), None), ((3, 7, 9), (3, 7), None),
                      ((3, 7, 10), (2, 7), None), ((3, 7, 10), (3, 7), (1, 7, 10))]
)  # fmt: skip
def test_a_condition_of_another_shape_raises(y, mask, null):
    null = null and torch.zeros(null)
    with pytest.raises(ValueError, match=r"captions must be \(B, M, channels\) = \(B, 7, 10\)"):
        tiny_pixart().condition(torch.zeros(y), torch.ones(mask), null=null)


# ------------------------------------------------------------------------------------------------
# The cache


@SEEDS
def test_a_cache_is_asked_once_for_each_branch_in_order(seed):
    """What it is offered is the output of the module itself, before the gate."""
    network = tiny_pixart(seed)
    made, offered = [], {}
    for block in network.blocks:
        for module in (block.attn, block.cross_attn, block.mlp):
            module.register_forward_hook(lambda module, args, output: made.append(output))

    def cache(k, branch):
        offered[k] = branch()
        return offered[k]

    args = inputs(network, seed)
    result = network(*args, cache=cache)
    assert network.branches == ["attn 0", "cross 0", "mlp 0", "attn 1", "cross 1", "mlp 1"]
    assert list(offered) == list(range(6)) and all(offered[k] is made[k] for k in range(6))
    assert torch.equal(result, network(*args))
    assert torch.equal(result, network(*args, cache=Cache(torch.ones(1, 6).bool()).start(0)))


@pytest.mark.parametrize("k", range(6))
def test_a_reused_branch_is_not_evaluated(k):
    """Nothing of it: neither its module nor its norm."""
    network = tiny_pixart()
    args = inputs(network)
    schedule = torch.ones(2, 6).bool()
    schedule[1, k] = False
    cache = Cache(schedule)
    network(*args, cache=cache.start(0))
    block, calls = network.blocks[k // 3], []
    module = (block.attn, block.cross_attn, block.mlp)[k % 3]
    norm = (block.norm1, block.norm1, block.norm2)[k % 3]
    for watched in (module, norm):
        watched.register_forward_hook(lambda module, *_: calls.append(module))
    other_t = args[1] / 2
    network(args[0], other_t, *args[2:], cache=cache.start(1))
    assert calls == ([norm] if k % 3 == 1 else [])
    assert cache.computed == [2 - (j == k) for j in range(6)]
    assert cache.reused == [int(j == k) for j in range(6)]


@SEEDS
def test_a_branch_is_gated_by_the_current_step_whatever_answers_for_it(seed):
    """x + gate1 answer1 + answer2 + gate2 answer3, the gates the third and the last of six."""
    block = tiny_pixart(seed).blocks[1]
    generator = torch.Generator().manual_seed(seed)
    x, *answers = torch.randn(4, 2, 16, 24, generator=generator)
    modulation = torch.randn(2, 6, 24, generator=generator)
    gates = (block.scale_shift_table + modulation)[:, :, None]
    result = block(x, None, None, modulation, lambda k, branch: answers[k - 3], 3)
    expected = x + gates[:, 2] * answers[0] + answers[1] + gates[:, 5] * answers[2]
    torch.testing.assert_close(result, expected)


# ------------------------------------------------------------------------------------------------
# Sizes and arithmetic


@VARIANTS
def test_flops_equal_the_counted(changes, height, width):
    network = tiny_pixart(**changes)
    args = [part[:1] for part in inputs(network, 0, height, width)]
    N = (height // network.patch_size) * (width // network.patch_size)
    tokens, y = torch.zeros(1, N, 24), torch.zeros(1, 7, 24)
    branches, rest = network.flops(height, width)

    def counted(function, *args):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            function(*args)
        return counter.get_total_flops()

    assert len(branches) == len(network.branches)
    assert counted(network, *args) == sum(branches) + rest
    for i, block in enumerate(network.blocks):
        assert counted(block.attn, tokens) == branches[3 * i]
        assert counted(block.cross_attn, tokens, y, args[3]) == branches[3 * i + 1]
        assert counted(block.mlp, tokens) == branches[3 * i + 2]
    assert network.flops(8, 8) == network.flops()


PUBLISHED = [name for name in pixart.SIZES if name != "emoji"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_weights_that_diffusers_has(name):
    """Every name and shape, at full size, and the count that the official code prints."""
    with torch.device("meta"):
        network = pixart.PixArt(**pixart.SIZES[name])
        other = PixArtTransformer2DModel(
            sample_size=network.input_size, caption_channels=4096,
            use_additional_conditions=name == "alpha1024",
        )
    ours = checkpoint.to_diffusers(network.state_dict(), network)
    theirs = other.state_dict()
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == (611_349_152 if name == "alpha1024" else 610_856_096)
    assert network.y_embedder.y_embedding.shape == (120 if "alpha" in name else 300, 4096)
    assert len(network.branches) == 84 and network.guidance_channels == 4


def test_the_emoji_model_is_small_enough_to_ship():
    network = pixart.PixArt(**pixart.SIZES["emoji"])
    assert sum(2 * value.numel() for value in network.state_dict().values()) < 15.9e6  # in float16
    assert network.places(4, 4).shape == (16, 256) and len(network.branches) == 18


@SEEDS
def test_a_network_that_predicts_v_says_which_noise_that_is(seed):
    """By the definition of v: of the eps that it names and of the x_0 that goes with it, v is what
    its last layer says, whole and fractional timesteps alike."""
    network, other = (tiny_pixart(seed, predict_v=flag) for flag in (True, False))
    x, t, *condition = inputs(network, seed)
    t[0] = 999
    eps, v = (each(x, t, *condition).double()[:, :2] for each in (network, other))
    low = t.long()
    upper = (low + 1).clamp(max=999)
    log = torch.from_numpy(np.log(samplers.ALPHA_BAR))
    a = torch.exp(torch.lerp(log[low], log[upper], (t - low).double()))[:, None, None, None]
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    assert relative_error(a.sqrt() * eps - (1 - a).sqrt() * x0, v) < 1e-4
    assert torch.equal(network(x, t, *condition)[:, 2:], other(x, t, *condition)[:, 2:])


def test_initialize_starts_with_no_output_but_a_caption_that_is_heard():
    network = pixart.initialize(tiny_pixart(micro_conditions=True))
    x, t, y, mask, *micro = inputs(network)
    assert torch.equal(network(x, t, y, mask, *micro), torch.zeros(3, 4, 8, 8))
    for weight, gain in (
        (network.y_embedder.y_proj.fc1.weight, 1), (network.blocks[1].cross_attn.proj.weight, 0.5),
        (network.blocks[0].attn.qkv.weight, 1), (network.x_embedder.proj.weight.flatten(1), 1),
    ):
        bound = gain * (6 / sum(weight.shape)) ** 0.5  # Xavier's uniform distribution
        assert 0.9 * bound < weight.abs().max() <= bound
    for linear in (network.t_block[1], network.csize_embedder.mlp[0], network.t_embedder.mlp[2]):
        assert linear.weight.std() == pytest.approx(0.02, rel=0.2)


# ------------------------------------------------------------------------------------------------
# Weights


def save(path, content):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize("name", ["official.pth", "without_pos_embed.pth", "bare.safetensors"])
def test_official_weights_are_read_as_they_were_written(tmp_path, name, micro):
    network = tiny_pixart(1, micro_conditions=micro)
    other = tiny_pixart(2, micro_conditions=micro)
    state = network.state_dict()
    content = dict(state)
    if "without" not in name:
        content["pos_embed"] = torch.zeros(1, 16, 24)  # the fixed one, which is computed here
    if name.endswith("pth"):
        content = {"state_dict": content}
    read = pixart.read_weights(save(tmp_path / name, content), other)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


@pytest.mark.parametrize("micro", [False, True])
def test_both_layouts_are_the_same_weights(tmp_path, micro):
    network = tiny_pixart(1, micro_conditions=micro)
    other = tiny_pixart(2, micro_conditions=micro)
    state = network.state_dict()
    theirs = checkpoint.to_diffusers(state, network)
    theirs["pos_embed.pos_embed"] = torch.zeros(1, 16, 24)
    read = pixart.read_weights(save(tmp_path / "w.safetensors", theirs), other)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in read if "y_embedding" not in key)
    other.load_state_dict(read)
    assert other.y_embedder.null is None  # the layout has no null caption
    assert network.y_embedder.null is network.y_embedder.y_embedding
    args = inputs(network)
    assert torch.equal(other(*args), network(*args))
    with pytest.raises(ValueError, match="no null caption"):
        other.condition(*args[2:4])
    given = network.y_embedder.y_embedding
    for result, expected in zip(other.condition(*args[2:4], null=given),
                                network.condition(*args[2:4]), strict=True):  # fmt: skip
        assert torch.equal(result, expected)


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_one_error_names_every_key_that_does_not_fit(tmp_path, layout):
    network = tiny_pixart()
    state = network.state_dict()
    if layout == "official":
        missing, misshapen = "t_block.1.bias", "blocks.1.cross_attn.kv_linear.weight"
    else:
        state = checkpoint.to_diffusers(state, network)
        missing, misshapen = "adaln_single.linear.bias", "transformer_blocks.1.attn2.to_k.weight"
    wanted = tuple(state[misshapen].shape)
    del state[missing]
    state[misshapen] = torch.zeros(3, 5)
    state["blocks.1.attn.sr.weight"] = torch.zeros(2)  # key-value compression: not published
    with pytest.raises(ValueError) as caught:
        pixart.read_weights(save(tmp_path / "w.pth", state), network)
    message = str(caught.value)
    for part in (f"missing {missing}", "unexpected blocks.1.attn.sr.weight",
                 f"{misshapen} is (3, 5), not {wanted}", str(tmp_path / "w.pth")):
        assert part in message
    assert message.count(";") == 2 and "\n" not in message


def test_the_weights_of_another_pixart_are_refused_in_one_clear_line(tmp_path):
    alpha, sigma = tiny_pixart(model_max_length=120), tiny_pixart(model_max_length=300)
    path = save(tmp_path / "alpha.pth", {"state_dict": alpha.state_dict()})
    with pytest.raises(ValueError, match=r"alpha\.pth is for captions of 120 tokens, this network "
                                         r"for 300 \(PixArt-alpha has 120, PixArt-Sigma 300\)$"):
        pixart.read_weights(path, sigma)
    micro = tiny_pixart(model_max_length=120, micro_conditions=True)
    with pytest.raises(ValueError, match="has no micro-conditions, unlike the network"):
        pixart.read_weights(path, micro)
    for state in (micro.state_dict(), checkpoint.to_diffusers(micro.state_dict(), micro)):
        with pytest.raises(ValueError, match="has micro-conditions, unlike the network"):
            pixart.read_weights(save(tmp_path / "1024.safetensors", state), alpha)


def test_a_dit_is_refused(tmp_path):
    network = dit.DiT(input_size=8, hidden_size=24, depth=1, num_heads=2)
    state = {"ema": network.state_dict()}
    with pytest.raises(ValueError, match="does not fit.*missing t_block.1.weight"):
        pixart.read_weights(save(tmp_path / "dit.pt", state), tiny_pixart())
