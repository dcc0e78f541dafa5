"""Models by name: what is loaded, how it is left, and the download of official weights, here from
a server on this machine."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import command
import dit
import hub
import models
import pixart
import router as routers
import text
import uvit
import vae
from cache import Cache
from samplers import DDIM, Noise, denoise

from .small import tiny_dit, tiny_model, tiny_uvit

TINY = dict(hidden_size=32, depth=2, num_heads=2, patch_size=8)  # in place of XL/2's sizes


def random_network(seed, **sizes):
    """A DiT whose parameters are all drawn N(0, 0.05^2)."""
    network = dit.DiT(**sizes)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A network of the digits size, and its weights' file."""
    network = random_network(0, **dit.SIZES["digits"])
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_file(network.state_dict(), path)
    return network, path


@pytest.fixture
def tiny_xl(tmp_path, monkeypatch):
    """dit256 made small: a network of its kind, and its weights' file, as the official one is."""
    monkeypatch.setitem(dit.SIZES, "XL/2", TINY)
    network = random_network(1, **TINY, input_size=32)
    path = tmp_path / "DiT-XL-2-256x256.pt"
    torch.save(network.state_dict(), path)
    return network, path


# ------------------------------------------------------------------------------------------------
# Loading


def test_digits_has_the_files_parameters_bitwise(digits):
    network, path = digits
    model = models.load("digits", weights=path, device="cpu")
    loaded, expected = model.network.state_dict(), network.state_dict()
    assert loaded.keys() == expected.keys()
    for key in expected:
        assert torch.equal(loaded[key], expected[key]), key


def test_what_digits_is_used_with(digits):
    model = models.load("digits", weights=str(digits[1]), device="cpu")
    assert (model.name, model.sampler, model.steps) == ("digits", "ddim", 20)
    assert model.guidance > 1
    assert model.autoencoder is None and model.text is None
    assert model.shape == (1, 28, 28)
    assert model.device == torch.device("cpu")
    assert model.router == models.SHIPPED / "digits_router.safetensors"
    assert model.network.num_classes == 10


def test_a_model_is_frozen_and_in_eval_mode(digits, tiny_xl):
    for name, (_, path) in (("digits", digits), ("dit256", tiny_xl)):
        network = models.load(name, weights=path, device="cpu").network
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bf16", "fp16", torch.bfloat16, None])
def test_dtype_is_that_of_every_parameter_and_buffer(digits, dtype):
    network, path = digits
    model = models.load("digits", weights=path, device="cpu", dtype=dtype)
    wanted = {"bf16": "bfloat16", "fp16": "float16", None: "float32"}.get(dtype, str(dtype))
    wanted = getattr(torch, wanted.split(".")[-1])
    loaded = model.network.state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {wanted}
    for key, tensor in network.state_dict().items():
        assert torch.equal(loaded[key], tensor.to(wanted)), key


def test_a_bfloat16_network_answers_in_the_dtype_of_its_input(digits):
    network, path = digits
    model = models.load("digits", weights=path, device="cpu", dtype="bfloat16")
    x = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([500]), torch.tensor([3])
    exact, rounded = network(x, t, y), model.network(x, t, y)
    assert rounded.dtype == torch.float32
    difference = (rounded - exact).norm() / exact.norm()
    assert 0 < difference < 0.05  # bfloat16 keeps 8 bits


def test_unknown_names_are_refused_with_those_that_exist(digits):
    with pytest.raises(ValueError, match="unknown model sdxl: use digits, emoji, dit256, "):
        models.load("sdxl")
    with pytest.raises(ValueError, match="unknown dtype int8: use float32, bfloat16 or float16"):
        models.load("digits", weights=digits[1], dtype="int8")
    for device in ("gpu", "cpu:1", "", "cuda" if not torch.cuda.is_available() else "tpu"):
        with pytest.raises(ValueError, match=f"no device {device} here"):
            models.load("digits", weights=digits[1], device=device)


@pytest.mark.parametrize("gpus, apple, there", [
    (0, False, ["cpu"]),
    (1, False, ["cuda", "cuda:0", "cpu"]),
    (2, False, ["cuda", "cuda:0", "cuda:1", "cpu"]),
    (0, True, ["mps", "cpu"]),
    (1, True, ["cuda", "cuda:0", "mps", "cpu"]),
])
def test_a_device_is_one_that_is_there(monkeypatch, gpus, apple, there):
    """By default it is the first of cuda, mps, cpu."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: max(gpus, 1))  # 1: a broken driver
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    assert models.find_device() == there[0]
    for name in ("cuda", "cuda:0", "cuda:1", "cuda:7", "mps", "cpu", "mps:1", "cuda:", "xpu", ""):
        if name in there:
            assert models.find_device(name) == name
        else:
            with pytest.raises(ValueError) as caught:
                models.find_device(name)
            words = f"no device {name} here: torch finds only {', '.join(there)}"
            assert str(caught.value) == words


def test_weights_that_are_missing_or_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*nothing\.safetensors"):
        models.load("digits", weights=tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        models.load("digits", weights=tmp_path)
    save_file(tiny_dit().state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="this network") as caught:
        models.load("digits", weights=tmp_path / "other.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {"pos_embed": 3}, {"ema": [1]}])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt"):
        models.load("digits", weights=tmp_path / "other.pt")


# ------------------------------------------------------------------------------------------------
# dit256, which is built without memory


def test_dit256_has_real_tensors_everywhere(tiny_xl):
    network, path = tiny_xl
    model = models.load("dit256", weights=path, device="cpu")
    loaded, expected = model.network.state_dict(), network.state_dict()
    assert loaded.keys() == expected.keys()
    tensors = [*model.network.parameters(), *model.network.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    for key in expected:
        assert torch.equal(loaded[key], expected[key]), key
    assert torch.equal(model.network.pos_embed[0], dit.position_embedding(32, 4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dit256_computes_what_an_ordinarily_built_network_does(tiny_xl, dtype):
    network, path = tiny_xl
    model = models.load("dit256", weights=path, device="cpu", dtype=dtype)
    network.to(getattr(torch, dtype))
    x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([999, 5]), torch.tensor([1, 1000])
    assert torch.equal(model.network(x, t, y), network(x, t, y))


def test_what_dit256_is_used_with(tiny_xl):
    model = models.load("dit256", weights=tiny_xl[1], device="cpu")
    assert (model.name, model.sampler, model.steps, model.guidance) == ("dit256", "ddim", 20, 1.5)
    assert model.autoencoder == "stabilityai/sd-vae-ft-ema" and model.scale == 0.18215
    assert model.shape == (4, 32, 32)
    assert model.network.num_classes == 1000
    assert model.router is None


@pytest.mark.parametrize(("size", "tokens"), ((256, 256), (512, 1024)))
def test_dit_really_is_the_xl_network_on_latents(tmp_path, monkeypatch, size, tokens):
    asked = []
    monkeypatch.setattr(dit, "read_weights", lambda path, network: asked.append(network) or {})
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **flags: None)
    models.official_dit(tmp_path / "weights.pt", size)
    (network,) = asked
    assert len(network.blocks) == 28
    assert network.pos_embed.shape == (1, tokens, 1152)
    assert all(parameter.is_meta for parameter in network.parameters())  # no 2.7 GB here


# ------------------------------------------------------------------------------------------------
# Downloads


class Server:
    """A server on this machine with one file, that notes what it is asked."""

    def __init__(self, body, missing=0, announce=True):
        """Keeps the last `missing` bytes of `body` to itself; `announce`: says its length."""
        self.requests = requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                requests.append(f"{self.command} {self.path}")
                found = self.path == "/models/weights.pt"
                self.send_response(200 if found else 404)
                if found and announce:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                return found

            def do_GET(self):
                if self.do_HEAD():
                    self.wfile.write(body[: len(body) - missing])

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/models/weights.pt"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty torch cache: -> the folder that downloads land in."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "torch" / "hub" / "checkpoints"


def assert_helpful(error, url, cache):
    """The error is one line with the file's name, where to get it and where to put it."""
    name = url.rsplit("/", 1)[1]
    text = str(error)
    assert "\n" not in text
    assert f"could not download {name}" in text
    assert url in text
    assert str(cache / name) in text
    assert "--weights" in text


def assert_nothing_left(cache):
    assert not cache.exists() or list(cache.iterdir()) == []


def test_a_download_lands_whole_in_the_cache_and_happens_once(cache):
    body = bytes(range(256)) * 1000
    with Server(body) as server:
        path = command.download(server.url)
        assert path == cache / "weights.pt"
        assert path.read_bytes() == body
        assert server.requests == ["HEAD /models/weights.pt", "GET /models/weights.pt"]
        assert command.download(server.url) == path
        assert len(server.requests) == 2  # the second call asked nothing
    assert [file.name for file in cache.iterdir()] == ["weights.pt"]
    assert command.download(server.url) == path  # not even that there is a server


@pytest.mark.parametrize("missing", [1, 100_000, 256_000])
def test_a_truncated_download_is_refused_and_leaves_nothing(cache, missing):
    with Server(bytes(256_000), missing) as server:
        with pytest.raises(ConnectionError) as caught:
            command.download(server.url)
        assert_helpful(caught.value, server.url, cache)
        assert_nothing_left(cache)


def test_after_a_truncated_download_the_next_call_tries_again(cache):
    with Server(bytes(1000), missing=10) as server, pytest.raises(ConnectionError):
        command.download(server.url)
    with Server(bytes(1000)) as server:
        assert command.download(server.url).stat().st_size == 1000


def test_a_file_that_the_server_does_not_have(cache):
    with Server(b"") as server:
        url = server.url.replace("weights", "nothing")
        with pytest.raises(ConnectionError, match="404") as caught:
            command.download(url)
        assert_helpful(caught.value, url, cache)
        assert_nothing_left(cache)


def test_a_server_that_does_not_say_the_size(cache):
    with Server(bytes(1000), announce=False) as server:
        with pytest.raises(ConnectionError) as caught:
            command.download(server.url)
        assert_helpful(caught.value, server.url, cache)
        assert_nothing_left(cache)


def test_a_refused_connection(cache):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/models/weights.pt"
        with pytest.raises(ConnectionError, match="refused") as caught:  # bound but not listening
            command.download(url)
    assert_helpful(caught.value, url, cache)
    assert_nothing_left(cache)


def test_something_that_is_no_web_server(cache):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        url = f"http://127.0.0.1:{other.getsockname()[1]}/models/weights.pt"

        def answer():
            connection, _ = other.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"what?\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(ConnectionError) as caught:
            command.download(url)
        thread.join()
    assert_helpful(caught.value, url, cache)
    assert_nothing_left(cache)


def test_dit256_without_weights_downloads_the_official_ones(tiny_xl, monkeypatch):
    network, path = tiny_xl
    asked = []
    monkeypatch.setattr(command, "download", lambda url: asked.append(url) or path)
    loaded = models.load("dit256", device="cpu").network.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in network.state_dict().items())
    assert asked == ["https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt"]


# ------------------------------------------------------------------------------------------------
# Text to image


TINY_PIXART = dict(hidden_size=24, depth=2, num_heads=2, patch_size=2, caption_channels=16)


@pytest.mark.parametrize("name", models.PIXART)
def test_pixart_by_name(name, tmp_path, monkeypatch):
    """Every published one: its size in latents, caption length, micro-conditions, autoencoder, and
    the whole network's names and shapes, without its 2.4 GB."""
    asked = []
    monkeypatch.setattr(models, "hugging_face", lambda *args: asked.append(args))
    monkeypatch.setattr(pixart, "read_weights", lambda path, network: network.state_dict())
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args: self)  # from the meta device
    model = models.load(name, device="cpu")
    alpha, side = name.startswith("pixart"), int(name.removeprefix("pixart").removeprefix("sigma"))
    assert model.pixels == (side, side) and model.shape == (4, side // 8, side // 8)
    assert model.network.model_max_length == (120 if alpha else 300)
    assert model.network.micro_conditions == (name == "pixart1024")
    assert (model.autoencoder, model.scale) == (
        ("stabilityai/sd-vae-ft-ema", 0.18215) if alpha else ("stabilityai/sdxl-vae", 0.13025)
    )
    assert (model.sampler, model.steps, model.guidance) == ("dpm-solver++", 20, 4.5)
    assert len(model.network.branches) == 84 and model.text == "t5"
    repository, file = asked[0]
    assert repository == f"PixArt-alpha/PixArt-{'alpha' if alpha else 'Sigma'}"
    assert file.startswith("PixArt-XL-2-" if alpha else "PixArt-Sigma-XL-2-")
    assert model.clean == alpha
    assert not models.load(name, device="cpu", raw_captions=True).clean


@pytest.mark.parametrize("name", ["digits", "emoji", "dit256"])
def test_raw_captions_are_for_t5(name):
    """Refused before a download."""
    with pytest.raises(ValueError, match=f"models that read captions by T5, not for {name}"):
        models.load(name, raw_captions=True)


@pytest.mark.parametrize("clean", [False, True])
def test_captions_are_cleaned_where_the_model_says_so(clean, monkeypatch):
    network = pixart.PixArt(input_size=8, **TINY_PIXART, model_max_length=6)
    model = models.Model("tiny", network, "ddim", 20, 4.5, text="t5", clean=clean)
    asked = []

    def encode_each(prompts, **kwargs):
        asked.append(kwargs["clean"])
        return [torch.ones(2, 16)] * len(prompts)

    monkeypatch.setattr(text, "encode_each", encode_each)
    model.prepare(["a dog"])
    monkeypatch.setattr(text, "encode", lambda prompts, **kwargs: asked.append(kwargs["clean"]))
    model.encode(["a dog"])
    assert asked == [clean, clean]


def test_kept_features_of_another_width_are_refused_before_the_work(monkeypatch):
    network = pixart.PixArt(input_size=8, **TINY_PIXART, model_max_length=6)
    model = models.Model("tiny", network, "ddim", 20, 4.5, text="t5")
    monkeypatch.setattr(text, "encode_each", lambda *args, **kwargs: [torch.ones(2, 15)])
    with pytest.raises(ValueError, match="features of 15 channels, tiny reads 16"):
        model.prepare(["a dog"])


def test_prompts_that_are_no_text_are_refused_before_the_work():
    network = pixart.PixArt(input_size=8, **TINY_PIXART, model_max_length=6)
    with pytest.raises(ValueError, match="not a text in UTF-8"):
        models.Model("tiny", network, "ddim", 20, 4.5, text="hashed").prepare(["a dog", "\udc80"])


@pytest.mark.parametrize("written, name", [
    (None, "float32"), ("float32", "float32"), ("fp32", "float32"), (torch.float32, "float32"),
    ("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("BF16", "bfloat16"), ("fp16", "float16"),
    (torch.float16, "float16"), ("torch.float16", "float16"),
])  # fmt: skip
def test_a_dtype_has_one_name(written, name):
    assert models.dtype_name(written) == name


@pytest.mark.parametrize("written", ["", " ", "float64", "int8", "half", "float", "nan"])
def test_other_dtypes_are_refused(written):
    with pytest.raises(ValueError, match="use float32, bfloat16 or float16"):
        models.dtype_name(written)


def test_pictures_of_another_size():
    network = pixart.PixArt(input_size=8, **TINY_PIXART)
    model = models.Model("tiny", network, "ddim", 20, 4.5, text="t5", autoencoder="x/y")
    assert model.shape == (4, 8, 8) and model.pixels == (64, 64)
    model.resize(width=96)
    assert model.shape == (4, 8, 12) and model.pixels == (64, 96)
    with pytest.raises(ValueError, match="height and width must be multiples of 16, not 60, 96"):
        model.resize(60)
    label = models.Model("tiny", tiny_dit(), "ddim", 20, 1.5)
    with pytest.raises(ValueError, match="makes pictures of 8 x 8 pixels only"):
        label.resize(16, 16)


def test_conditions_from_prompts_and_from_labels():
    network = pixart.PixArt(input_size=8, **TINY_PIXART, model_max_length=6)
    model = models.Model("tiny", network, "ddim", 20, 4.5, text="hashed")
    y, mask = model.condition(["a red apple", ""])
    features, expected = text.hashed_words(["a red apple"], 6, 16)
    null = network.y_embedder.y_embedding
    assert torch.equal(y[0], features[0]) and torch.equal(mask[0], expected[0])
    assert all(torch.equal(y[row], null) for row in (1, 2, 3))
    assert mask.sum(1).tolist() == [3, 6, 3, 6]  # the null half sees as many tokens
    label = models.Model("tiny", tiny_dit(), "ddim", 20, 1.5)
    (labels,) = label.condition([1, 0])
    assert labels.tolist() == [1, 0, *[label.network.num_classes] * 2]


def test_weights_without_a_null_caption_get_t5s(monkeypatch):
    network = pixart.PixArt(input_size=8, **TINY_PIXART, model_max_length=6)
    network.y_embedder.y_embedding.fill_(torch.nan)  # as the layout of diffusers leaves it
    model = models.Model("tiny", network, "ddim", 20, 4.5, text="t5")
    asked = []

    def read(prompts, max_length, **kwargs):
        asked.append((prompts, max_length))
        return torch.ones(1, 6, 16), torch.ones(1, 6, dtype=torch.bool)

    monkeypatch.setattr(text, "encode", read)
    monkeypatch.setattr(text, "encode_each", read)
    monkeypatch.setattr(text, "null_caption", lambda **kwargs: 2 * torch.ones(6, 16))
    model.prepare(["a dog"])
    y, _ = model.condition(["a dog"])
    assert asked == [(["a dog"], 6)] * 2
    assert (y[0] == 1).all() and (y[1] == 2).all()


def test_a_pipelines_own_text_encoder_is_asked(tmp_path, monkeypatch):
    network = pixart.PixArt(input_size=8, **TINY_PIXART, model_max_length=6)
    network.y_embedder.y_embedding.fill_(torch.nan)
    model = models.Model("tiny", network, "ddim", 20, 4.5, text="t5", folder=tmp_path)
    asked = []
    for name in ("encode", "encode_each", "null_caption"):
        monkeypatch.setattr(text, name, lambda *args, model, **kwargs: asked.append(model) or [])
    for place in (text.T5_XXL, tmp_path):
        model.prepare(["a dog"])
        model.encode(["a dog"])
        assert asked == [place] * 3
        asked.clear()
        (tmp_path / "text_encoder").mkdir(exist_ok=True)


def test_micro_conditions_are_told_the_pictures_size():
    network = pixart.PixArt(input_size=8, **TINY_PIXART, model_max_length=6, micro_conditions=True)
    model = models.Model("tiny", network, "ddim", 20, 4.5, text="hashed", autoencoder="x/y")
    model.resize(64, 128)
    _, _, size, ratio = model.condition(["a dog"])
    assert size.tolist() == [[64, 128]] * 2 and ratio.tolist() == [[0.5]] * 2


def test_an_autoencoder_by_file_and_without_a_network(tmp_path, monkeypatch):
    tiny = vae.Autoencoder(channels=32, multipliers=(1, 1), res_blocks=1)
    save_file(tiny.state_dict(), tmp_path / "vae.safetensors")
    make = vae.Autoencoder
    monkeypatch.setattr(
        vae, "Autoencoder", lambda: make(channels=32, multipliers=(1, 1), res_blocks=1)
    )
    network = tiny_dit().to(torch.float16)
    model = models.Model("tiny", network, "ddim", 20, 1.5, autoencoder="stabilityai/sdxl-vae")
    loaded = models.load_autoencoder(model, tmp_path / "vae.safetensors")
    assert next(loaded.parameters()).dtype == torch.bfloat16
    assert torch.equal(loaded.post_quant_conv.weight, tiny.post_quant_conv.weight.bfloat16())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="could not download diffusion_pytorch_model.safe"
                                              "tensors of stabilityai/sdxl-vae") as caught:
        models.load_autoencoder(model)
    assert "\n" not in str(caught.value) and "--vae" in str(caught.value)


def test_only_a_gpu_computes_in_tf32():
    before = torch.get_float32_matmul_precision()
    models.choose_kernels("cpu")
    assert torch.get_float32_matmul_precision() == before
    models.choose_kernels("cuda:1")
    assert torch.get_float32_matmul_precision() == "high"


def test_a_u_vit_is_loaded_from_a_file_and_says_so_without(tmp_path, monkeypatch):
    tiny = tiny_uvit()
    torch.save(tiny.state_dict(), tmp_path / "huge.pth")
    sizes = dict(img_size=8, patch_size=2, in_chans=2, embed_dim=32, depth=4, num_heads=2,
                 num_classes=6, conv=True)
    monkeypatch.setitem(uvit.SIZES, "H/4", sizes)
    model = models.load("uvit512", tmp_path / "huge.pth", "cpu")
    assert (model.sampler, model.steps, model.guidance) == ("dpm-solver-2s", 20, 1.7)
    assert model.autoencoder == "stabilityai/sd-vae-ft-ema" and model.scale == 0.18215
    x, condition = torch.randn(1, 2, 8, 8), model.condition([3])
    assert torch.equal(model.network(x, torch.ones(1), condition[0][:1]),
                       tiny(x, torch.ones(1), torch.tensor([3])))
    with pytest.raises(FileNotFoundError, match="imagenet512_uvit_huge.pth by hand"):
        models.load("uvit512")


def test_compiled_branches_need_one_graph_of_each_kind_whatever_the_schedule():
    """The backend `eager` counts the graphs and compiles nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, cache = tiny_model(), Cache(routers.random(4, 6, 0.4))
    x, condition = Noise(0, range(2)).start(model.shape), model.condition([0, 1])
    plain = denoise(model.network, DDIM(4), x, condition, 1.5, cache)
    models.compile_branches(model.network, "eager")
    assert torch.equal(denoise(model.network, DDIM(4), x, condition, 1.5, cache), plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    denoise(model.network, DDIM(4), x, condition, 1.5, Cache(routers.fora(4, 6, 2)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_loading_a_model_leaves_the_kernels_alone():
    def chosen():
        return torch.get_float32_matmul_precision(), torch.backends.cuda.flash_sdp_enabled()

    before = chosen()
    models.load("digits", device="cpu")
    assert chosen() == before


# ------------------------------------------------------------------------------------------------
# Hugging Face


DOWNLOAD = ("import sys, time; start = time.time()\n"
            "import hub, command\n"
            "def main():\n"
            "    try: hub.download('stabilityai/sd-vae-ft-ema', 'config.json')\n"
            "    finally: print(time.time() - start)\n"
            "command.run(main)")


def download_with(tmp_path, **variables):
    """A download in a process of its own -> its lines on stderr. It ends with exit code 2."""
    clean = {key: value for key, value in os.environ.items()
             if not key.lower().endswith("_proxy") and not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", DOWNLOAD], env={**clean, "HF_HOME": str(tmp_path), **variables},
        capture_output=True, text=True, cwd=Path(models.__file__).parent,
    )
    assert done.returncode == 2 and float(done.stdout) < 20, done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize("variables, reason, advice", [
    (dict(ALL_PROXY="socks5://127.0.0.1:9"), "socks", "unset ALL_PROXY"),
    (dict(HTTPS_PROXY="http://127.0.0.1:9"), "", "check the proxy in HTTPS_PROXY"),
    (dict(HF_ENDPOINT="mirror.invalid"), "mirror.invalid", "check HF_ENDPOINT"),
    (dict(HF_ENDPOINT="https://mirror.invalid"), "", "check HF_ENDPOINT"),
    (dict(HF_ENDPOINT="http://127.0.0.1:9"), "refused", "check HF_ENDPOINT"),
    (dict(HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
])  # fmt: skip
def test_a_hub_that_cannot_be_reached(tmp_path, variables, reason, advice):
    """One line within 20 s that keeps the reason and gives the advice that fits it."""
    (line,) = download_with(tmp_path, **variables)
    assert reason in line.lower() or reason in line
    assert advice in line and "name it (--weights" in line and len(line) < 700


@pytest.mark.parametrize("code", [503, None])
def test_an_outage_of_the_hub(tmp_path, code):
    """A server of this machine that is out of service, or that never answers."""
    class Out(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            if code is None:
                time.sleep(14)
            self.send_response(code or 200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Out)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (line,) = download_with(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    assert ("503" if code else "timed out") in line


def test_what_is_in_the_cache_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--a--b"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("0" * 40) / "w.bin").write_bytes(b"weights")
    monkeypatch.setattr(hub, "probe", None)
    assert Path(models.hugging_face("a/b", "w.bin")).read_bytes() == b"weights"


# ------------------------------------------------------------------------------------------------
# What is known before the weights are there


@pytest.mark.parametrize("name", models.MODELS)
def test_an_outline_is_the_model_without_weights(name, monkeypatch):
    """And `--help` says the defaults that it brings."""
    for module, attribute in ((command, "download"), (models, "hugging_face")):
        monkeypatch.setattr(module, attribute, lambda *args: pytest.fail(f"asked for {args}"))
    for module in (dit, pixart, uvit):
        monkeypatch.setattr(module, "read_weights", lambda *args: pytest.fail(f"read {args}"))
    model = models.outline(name)
    assert model.name == name and len(model.network.branches) > 0 and min(model.pixels) > 0
    parser = command.Parser("")
    command.add_model_flags(parser)
    helps = {action.dest: action.help for action in parser._actions}
    assert helps["steps"].endswith(f"({model.steps})") and name in helps["model"]
    for key in ("sampler", "guidance"):
        told = dict(part.split(": ") for part in helps[key].rpartition("(")[2][:-1].split("; "))
        (value,) = [value for names, value in told.items()
                    if name.startswith(tuple(names.split(", ")))]
        assert value == f"{getattr(model, key)}".removesuffix(".0"), key
