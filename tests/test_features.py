"""The feature networks, against pytorch-fid and torch-fidelity with the same random weights."""

import warnings

import pytest
import torch
from pytorch_fid.inception import fid_inception_v3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import features
import shipped
import text


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """The file of an Inception with random weights, drawn so that activations keep their size."""
    torch.manual_seed(0)
    network = features.Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def random_images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("size", ((32, 48), (299, 299), (320, 256)))
def test_tf1_features_against_torch_fidelity(inception, size):
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception))
    ours = features.load("inception", inception)
    images = random_images(2, 3, *size)
    with torch.no_grad():
        pooled, _, logits = ours(images)
        expected, expected_logits = theirs(images)
    assert relative(pooled, expected) < 1e-5
    assert relative(logits, expected_logits) < 1e-5


def test_pytorch_fid_features_against_pytorch_fid(inception, monkeypatch):
    """With its network and preprocessing. The spatial features come from a hook on the convolution
    that the 2015 graph calls mixed_6/conv."""
    monkeypatch.setattr("pytorch_fid.inception.load_state_dict_from_url",
                        lambda *args, **kwargs: torch.load(inception))
    network = fid_inception_v3().eval()
    seen = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *args: seen.append(args[2]))
    monkeypatch.setattr("pytorch_fid.inception.fid_inception_v3", lambda: network)
    from pytorch_fid.inception import InceptionV3

    ours = features.load("inception", inception, resize="pytorch-fid")
    images = random_images(2, 3, 40, 50)
    with torch.no_grad():
        pooled, spatial, _ = ours(images)
        expected = InceptionV3([3])(images / 255)[0][:, :, 0, 0]
    assert relative(pooled, expected) < 1e-5
    assert spatial.shape == (2, 17 * 17 * 7)
    assert relative(spatial, seen[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1)) < 1e-5


def test_the_two_resizes_differ(inception):
    images = random_images(1, 3, 40, 50)
    a = features.load("inception", inception).preprocess(images)
    b = features.load("inception", inception, resize="pytorch-fid").preprocess(images)
    assert a.shape == b.shape == (1, 3, 299, 299)
    assert (a - b).abs().max() > 0.1


def test_tf1_resize_reads_from_the_left_edge():
    """Output pixel i reads at i * in / out: doubling keeps the even pixels and repeats the last."""
    row = torch.tensor([0.0, 10.0, 40.0]).expand(1, 1, 3, 3)
    assert features.resize_tf1(row, 6)[0, 0, 0].tolist() == [0, 5, 10, 25, 40, 40]


@pytest.mark.parametrize("new", (False, True))
@pytest.mark.parametrize("counters", (False, True))
def test_weights_load_with_and_without_counters_of_batches(inception, tmp_path, counters, new):
    """Also in torch's format before 1.6, which pytorch-fid's file may have."""
    state = torch.load(inception)
    state = {k: v for k, v in state.items() if counters or not k.endswith("batches_tracked")}
    torch.save(state, tmp_path / "weights.pth", _use_new_zipfile_serialization=new)
    loaded = features.load("inception", tmp_path / "weights.pth").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_weights_that_do_not_fit(inception, tmp_path):
    state = torch.load(inception)
    bias = state.pop("fc.bias")
    torch.save(state, tmp_path / "lacks.pth")
    with pytest.raises(ValueError, match="does not fit this network: missing fc.bias$"):
        features.load("inception", tmp_path / "lacks.pth")
    torch.save(state | {"fc.bias": bias[:1000]}, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match=r"fc.bias is \(1000,\), not \(1008,\)"):
        features.load("inception", tmp_path / "shape.pth")
    (tmp_path / "cut.pth").write_bytes(inception.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        features.load("inception", tmp_path / "cut.pth")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        features.load("inception", tmp_path / "nothing.pth")


@pytest.mark.parametrize("change, message", (
    (lambda x: x.round().int(), "is int32, not floating point"),
    (lambda x: x > 0, "is bool, not floating point"),
    (lambda x: x * torch.nan, "holds NaN or infinite numbers"),
    (lambda x: x / 0, "holds NaN or infinite numbers"),
    (lambda x: x.to_sparse(), "is no ordinary tensor with data"),
    (lambda x: x.to("meta"), "is no ordinary tensor with data"),
    (lambda x: x.to(torch.complex64), "is complex64, not floating point"),
))
@pytest.mark.parametrize("name, tensor", (("digits", "fc.weight"), ("emoji", "text.weight"),
                                          ("inception", "Mixed_7c.branch1x1.conv.weight")))
def test_what_is_no_weight(inception, tmp_path, name, tensor, change, message):
    """Loading would copy whole numbers and NaN into the network without a word."""
    network = features.load(name, inception if name == "inception" else None)
    state = network.state_dict()
    torch.save({**state, tensor: change(state[tensor])}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=f"bad.pth: {tensor} {message}") as caught:
        features.load(name, tmp_path / "bad.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, side", (("digits", 28), ("emoji", 32), ("inception", 64)))
def test_sizes_are_those_of_the_features(inception, name, side):
    network = features.load(name, inception if name == "inception" else None)
    with torch.no_grad():
        seen = network(torch.zeros(2, 3, side, side, dtype=torch.uint8))
    assert network.sizes == tuple(None if x is None else x.shape[1] for x in seen)


def test_the_classifier_warns_of_colours():
    """It looks at red only. JPEG's small differences between channels are not colours."""
    images = torch.full((2, 3, 28, 28), 100, dtype=torch.uint8)
    images[1, 2] += 10
    network = features.load("digits")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(images)
    images[1, 2, 5, 5] = 0
    with pytest.warns(UserWarning, match="images in colour: the digits classifier looks at their"):
        network(images)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown features vgg: use inception, digits or emoji"):
        features.load("vgg")
    with pytest.raises(ValueError, match="unknown resize bicubic"):
        features.Inception("bicubic")


def test_the_shipped_classifier_classifies_held_out_digits():
    path = features.SHIPPED / "digits_classifier.safetensors"
    assert path.stat().st_size < 2e6
    network = features.load("digits")
    images, labels = shipped.digits("held-out")
    pooled, spatial, logits = network(images.expand(-1, 3, -1, -1))
    assert pooled.shape == (1000, 64) and spatial.shape == (1000, 196)
    assert (logits.argmax(1) == labels).double().mean() >= 0.98


def test_the_classifier_refuses_other_sizes():
    with pytest.raises(ValueError, match="takes 28 x 28 images, not 32 x 32"):
        features.load("digits")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_the_shipped_encoder_finds_the_caption_of_an_emoji():
    path = features.SHIPPED / "emoji_encoder.safetensors"
    assert path.stat().st_size < 2e6
    network, preprocess, tokenizer = features.load_clip("emoji")
    images, captions = shipped.emoji()
    pooled, spatial, logits = network(images[:50])
    assert pooled.shape == (50, 96) and spatial.shape == (50, 256) and logits is None
    image, caption = network.encode_image(images), network.encode_text(tokenizer(captions))
    assert torch.allclose(image.norm(dim=1), torch.ones(1026), atol=1e-5)
    first = (image @ caption.T).argmax(1) == torch.arange(1026)
    held_out = torch.arange(1026) % 10 == 0
    assert first[~held_out].double().mean() > 0.85
    among_themselves = (image[held_out] @ caption[held_out].T).argmax(1) == torch.arange(103)
    assert among_themselves.double().mean() > 0.1  # by chance 0.01


def test_a_captions_length_and_padding_do_not_matter_to_the_encoder():
    network = features.load("emoji")
    short, long = (text.hashed_words(["red apple"], tokens)[0] for tokens in (2, 12))
    assert torch.allclose(network.encode_text(short), network.encode_text(long), atol=1e-6)
    assert network.encode_text(text.hashed_words([""])[0]).isfinite().all()
    with pytest.raises(ValueError, match="takes 32 x 32 images, not 28 x 28"):
        network(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))
