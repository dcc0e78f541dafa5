import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import router
import uvit
from cache import Cache
from tests.small import tiny_uvit

SEEDS = pytest.mark.parametrize("seed", [0, 1])


def inputs(seed, network, batch=3):
    """x, t (fractional) and y, one of which is the null label."""
    generator = torch.Generator().manual_seed(100 + seed)
    size, channels = network.input_size, network.in_channels
    x = torch.randn(batch, channels, size, size, generator=generator, dtype=torch.float64)
    t = 1 + 999 * torch.rand(batch, generator=generator)
    y = torch.randint(5, (batch,), generator=generator)
    y[-1] = 5
    return x, t, y if network.label_emb is not None else None


# ------------------------------------------------------------------------------------------------
# The numbers, against an independent statement of the paper's network, image by image


def norm(x, weight, bias):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def attention(x, w, name, heads):
    """One image: x (N, D)."""
    q, k, v = (x @ w[f"{name}.qkv.weight"].T).chunk(3, dim=-1)
    d = x.shape[1] // heads
    outputs = []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        weights = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(d), dim=-1)
        outputs.append(weights @ v[:, part])
    return torch.cat(outputs, -1) @ w[f"{name}.proj.weight"].T + w[f"{name}.proj.bias"]


def block(x, w, name, heads, skip=None):
    if skip is not None:
        both = torch.cat([x, skip], -1)
        x = both @ w[f"{name}.skip_linear.weight"].T + w[f"{name}.skip_linear.bias"]
    x = x + attention(norm(x, w[f"{name}.norm1.weight"], w[f"{name}.norm1.bias"]), w,
                      f"{name}.attn", heads)
    hidden = norm(x, w[f"{name}.norm2.weight"], w[f"{name}.norm2.bias"])
    hidden = hidden @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"]
    hidden = hidden * torch.special.ndtr(hidden)  # the exact GELU
    return x + hidden @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"]


def predict(w, image, t, label, heads, P):
    """One image (C, H, H), float64 -> the noise in it."""
    C, H, _ = image.shape
    D = w["pos_embed"].shape[-1]
    # The official sinusoids are float32.
    frequency = torch.exp(-math.log(10000) * torch.arange(D // 2, dtype=torch.float32) / (D // 2))
    time = torch.cat([(t * frequency).cos(), (t * frequency).sin()]).double()
    if "time_embed.0.weight" in w:
        time = w["time_embed.0.weight"] @ time + w["time_embed.0.bias"]
        time = w["time_embed.2.weight"] @ (time * time.sigmoid()) + w["time_embed.2.bias"]
    tokens = [time] if label is None else [w["label_emb.weight"][label], time]
    extras = len(tokens)
    kernel = w["patch_embed.proj.weight"].reshape(D, -1)
    for row in range(H // P):
        for column in range(H // P):
            patch = image[:, row * P : (row + 1) * P, column * P : (column + 1) * P]
            tokens.append(kernel @ patch.reshape(-1) + w["patch_embed.proj.bias"])
    x = torch.stack(tokens) + w["pos_embed"][0]
    depth = sum(name.endswith("skip_linear.bias") for name in w)
    skips = []
    for i in range(depth):
        x = block(x, w, f"in_blocks.{i}", heads)
        skips.append(x)
    x = block(x, w, "mid_block", heads)
    for i in range(depth):
        x = block(x, w, f"out_blocks.{i}", heads, skips[depth - 1 - i])
    x = norm(x, w["norm.weight"], w["norm.bias"])
    x = (x @ w["decoder_pred.weight"].T + w["decoder_pred.bias"])[extras:]
    result = torch.zeros_like(image)
    for row in range(H // P):
        for column in range(H // P):
            for p in range(P):
                for q in range(P):
                    for c in range(C):
                        value = x[row * (H // P) + column, (p * P + q) * C + c]
                        result[c, row * P + p, column * P + q] = value
    if "final_layer.weight" in w:
        result = torch.nn.functional.conv2d(
            result[None], w["final_layer.weight"], w["final_layer.bias"], padding=1
        )[0]
    return result


@SEEDS
@pytest.mark.parametrize("changes", [
    {}, dict(conv=False, num_heads=4, patch_size=4, in_chans=3), dict(num_classes=-1, depth=2),
    dict(mlp_time_embed=True),
], ids=["convolution", "none", "no labels", "time MLP"])  # fmt: skip
@torch.no_grad()
def test_equals_the_paper_written_out(seed, changes):
    network = tiny_uvit(seed, **changes).double()
    x, t, y = inputs(seed, network)
    heads = network.mid_block.attn.num_heads
    expected = torch.stack([
        predict(network.state_dict(), x[j], t[j], None if y is None else y[j], heads,
                network.patch_size)
        for j in range(len(x))
    ])
    assert (network(x, t, y) - expected).norm() / expected.norm() < 1e-12


@torch.no_grad()
def test_numbers_enter_and_leave_in_the_dtype_of_x():
    network = tiny_uvit()
    x, t, y = inputs(0, network)
    assert network(x, t, y).dtype == torch.float64
    assert network.bfloat16()(x.float(), t, y).dtype == torch.float32


# ------------------------------------------------------------------------------------------------
# The published networks


def published_names(depth, conv):
    """The keys of the official files, as their table has them."""
    names = {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "label_emb.weight",
             "norm.weight", "norm.bias", "decoder_pred.weight", "decoder_pred.bias"}
    if conv:
        names |= {"final_layer.weight", "final_layer.bias"}
    half = range(depth // 2)
    blocks = [*(f"in_blocks.{i}" for i in half), "mid_block", *(f"out_blocks.{i}" for i in half)]
    for name in blocks:
        names |= {f"{name}.attn.qkv.weight"}
        names |= {f"{name}.{part}.{end}" for end in ("weight", "bias") for part in (
            "norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")}
    return names | {f"out_blocks.{i}.skip_linear.{end}" for i in half for end in ("weight", "bias")}


def test_the_published_network():
    with torch.device("meta"):
        network = uvit.UViT(**uvit.SIZES["H/2"])
    state = network.state_dict()
    assert state.keys() == published_names(28, conv=False) and len(state) == 355
    assert sum(value.numel() for value in state.values()) == 500_832_016
    assert len(network.branches) == 58
    branches, rest = network.flops()
    assert round((sum(branches) + rest) / 2e9, 2) == 133.20


@pytest.mark.parametrize("name, millions", [
    ("S/2 cifar10", 44), ("M/4 imagenet64", 131), ("L/2", 287), ("H/4", 501),
])
def test_sizes_of_the_papers_table(name, millions):
    with torch.device("meta"):
        network = uvit.UViT(**uvit.SIZES[name])
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions


@pytest.mark.parametrize("changes", [{}, dict(conv=False), dict(num_classes=-1),
                                     dict(mlp_time_embed=True)])
def test_flops_are_those_that_torch_counts(changes):
    network = tiny_uvit(**changes)
    x, t, y = inputs(0, network, batch=1)
    with (FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH),
          torch.no_grad()):  # the fused attention of the CPU is not counted
        network(x, t, None if y is None else y[:1])
    branches, rest = network.flops()
    assert sum(branches) + rest == counter.get_total_flops()


# ------------------------------------------------------------------------------------------------
# Branches


@torch.no_grad()
def test_branches_are_asked_for_in_order_and_are_all_that_a_cache_holds():
    network, asked = tiny_uvit(), []
    x, t, y = inputs(0, network)

    def cache(k, branch):
        asked.append(k)
        return branch()

    assert torch.equal(network(x, t, y, cache), network(x, t, y))
    assert asked == list(range(len(network.branches))) == list(range(10))


@torch.no_grad()
def test_a_step_that_reuses_all_branches_still_has_todays_skips():
    """It is a network without attention and MLPs, on constants: linear in the embeddings."""
    network = tiny_uvit()
    schedule = router.none(2, 10)
    schedule[1] = False
    cache = Cache(schedule)
    x, t, y = inputs(0, network)
    first = network(x, t, y, cache.start(0))
    kept = {k: output for k, ((_, output),) in cache.kept.items()}
    other = torch.randn_like(x)
    second = network(other, t, y, cache.start(1))
    assert cache.computed == [1] * 10 and not torch.allclose(first, second)

    tokens = network.patch_embed(other.float())
    time = uvit.timestep_embedding(t, 32)[:, None]
    tokens = torch.cat([network.label_emb(y)[:, None], time, tokens], 1) + network.pos_embed
    skips = []
    for i in range(5):
        if i > 2:
            joint = network.out_blocks[i - 3].skip_linear
            tokens = joint(torch.cat([tokens, skips.pop()], -1))
        tokens = tokens + kept[2 * i] + kept[2 * i + 1]
        skips += [tokens] if i < 2 else []
    assert torch.allclose(network.head(tokens, other), second, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Files and bad input


def test_weights_load_by_their_own_names(tmp_path):
    network, other = tiny_uvit(), tiny_uvit(seed=1)
    torch.save({f"module.{key}": value for key, value in network.state_dict().items()},
               tmp_path / "huge.pth")
    other.load_state_dict(uvit.read_weights(tmp_path / "huge.pth", other))
    x, t, y = inputs(0, network)
    assert torch.equal(network(x, t, y), other(x, t, y))


@pytest.mark.parametrize("change, words", [
    (lambda state: state.pop("mid_block.norm1.bias"), "missing mid_block.norm1.bias"),
    (lambda state: state.update({"patch_embed.proj.weight": torch.zeros(32, 2, 4, 4)}),
     "patch_embed.proj.weight is"),
    (lambda state: state.update({"pos_embed": torch.zeros(1, 2 + 64, 32)}), "66 tokens"),
    (lambda state: state.update({"pos_embed.proj.weight": torch.zeros(1)}), "unexpected"),
    (lambda state: state["norm.bias"].fill_(math.nan), "NaN"),
])
def test_other_weights_are_refused(tmp_path, change, words):
    network = tiny_uvit()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=words):
        uvit.read_weights(tmp_path / "weights.pth", network)


@pytest.mark.parametrize("changes", [dict(img_size=9), dict(num_heads=3), dict(depth=3)])
def test_sizes_that_do_not_divide_are_refused(changes):
    with pytest.raises(ValueError, match="must be a multiple"):
        tiny_uvit(**changes)


def test_shapes_and_labels_that_do_not_exist_are_refused():
    network = tiny_uvit()
    with pytest.raises(ValueError, match=r"must be \(B, C, H, W\) = \(B, 2, 8, 8\)"):
        network(torch.zeros(1, 2, 8, 4), torch.ones(1), torch.zeros(1, dtype=torch.long))
    assert network.condition([0, 4])[0].tolist() == [0, 4, 5, 5]
    with pytest.raises(ValueError, match="from 0 to 4"):
        network.condition([5])
    with pytest.raises(ValueError, match="labels"):
        tiny_uvit(num_classes=-1).condition([0])


# ------------------------------------------------------------------------------------------------
# Learning-to-Cache's routers


def test_learning_to_caches_router_takes_its_codes_decisions(tmp_path):
    """Evaluations in its order: of step s the start, by row s if s > 0, then the middle, whole."""
    generator = torch.Generator().manual_seed(0)
    rows = {f"{i}.prob": 4 * torch.randn(6, generator=generator) for i in range(8)}
    torch.save(rows, tmp_path / "dpm8_router.pth")
    file = router.load(tmp_path / "dpm8_router.pth")
    expected = []
    for s in range(4):
        expected.append(torch.sigmoid(rows[f"{s}.prob"]) > 0.9 if s > 0 else torch.ones(6).bool())
        expected.append(torch.ones(6).bool())
    assert torch.equal(file.schedule(), torch.stack(expected)) and file.tau == 0.9
    file.check("uvit256", "dpm-solver-2s", 8, 6)
    with pytest.raises(ValueError, match="cannot be used"):
        file.check("dit256", "ddim", 8, 6)


@pytest.mark.parametrize("rows", [
    {"0.prob": torch.zeros(4), "2.prob": torch.zeros(4)},
    {f"{i}.prob": torch.zeros(4) for i in range(7)},  # two evaluations a step
    {f"{i}.prob": torch.zeros(4, dtype=torch.int64) for i in range(8)},
])
def test_rows_that_are_no_router_are_refused(tmp_path, rows):
    torch.save(rows, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="is not a router file"):
        checkpoint.read_official_router(tmp_path / "a.pt")
