"""Each metric against an independent implementation or a closed form, and the command."""

import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_fid.fid_score import calculate_frechet_distance
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from torch_fidelity.metric_isc import isc_features_to_metric
from torchmetrics.functional.image import structural_similarity_index_measure

import command
import feature_statistics
import features
import metrics
import pictures
import shipped

ROOT = Path(__file__).parent.parent


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def moments(x):
    return x.mean(0), torch.cov(x.T)


# ------------------------------------------------------------------------------------------------
# Frechet distance


def test_streamed_moments_equal_numpys_for_any_batch_size():
    x = 1000 + normal(500, 7) @ normal(7, 7, seed=1)  # far from zero, where naive sums lose digits
    for size in (1, 64, 500):
        stream = feature_statistics.Moments()
        for part in x.float().split(size):
            stream.add(part)
        exact = x.float().double().numpy()
        np.testing.assert_allclose(stream.mean, exact.mean(0), rtol=1e-13)
        np.testing.assert_allclose(stream.covariance, np.cov(exact, rowvar=False), rtol=1e-9)


def test_frechet_distance_of_gaussians_that_commute():
    """sigma1 and sigma2 share eigenvectors: d^2 = |mu1 - mu2|^2 + sum (sqrt a_i - sqrt b_i)^2."""
    Q, _ = torch.linalg.qr(normal(50, 50))
    a, b = normal(50, seed=1).square(), normal(50, seed=2).square()
    a[:20] = 0  # singular
    b[10:30] = 0
    mu1, mu2 = normal(50, seed=3), normal(50, seed=4)
    expected = (mu1 - mu2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    distance = metrics.frechet_distance(mu1, Q * a @ Q.T, mu2, Q * b @ Q.T)
    assert distance == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_in_one_dimension():
    """(mu1 - mu2)^2 + (s1 - s2)^2."""
    assert metrics.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(5)


@pytest.mark.parametrize(("n", "rel"), ((300, 1e-10), (20, 1e-4)))
def test_frechet_distance_against_pytorch_fid(n, rel):
    """With 20 images and 64 features the covariances are singular. Then pytorch-fid is the less
    exact one: it takes the root of their product."""
    first = moments(normal(n, 64) @ normal(64, 64, seed=1))
    second = moments(normal(n, 64, seed=2) + 0.5)
    expected = calculate_frechet_distance(*(x.numpy() for x in (*first, *second)))
    assert metrics.frechet_distance(*first, *second) == pytest.approx(expected, rel=rel)


def test_frechet_distance_to_itself_is_zero_with_fewer_images_than_features():
    mu, sigma = moments(normal(30, 200))
    assert metrics.frechet_distance(mu, sigma, mu, sigma) < 1e-10 * sigma.trace()


def test_frechet_distance_refuses_unequal_shapes_and_nan():
    with pytest.raises(ValueError, match="do not go together"):
        metrics.frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))
    for scalars in ([0.0, 1.0, 1.0, 2.0], [np.float64(0), np.array(1.0), np.float64(1), 2]):
        with pytest.raises(ValueError, match="do not go together"):
            metrics.frechet_distance(*scalars)
    with pytest.raises(ValueError, match="do not go together"):
        metrics.frechet_distance([], np.zeros((0, 0)), [], np.zeros((0, 0)))
    with pytest.raises(ValueError, match="must be real"):
        metrics.frechet_distance([1j], [[1]], [0], [[1]])
    with pytest.raises(ValueError, match="no covariance: it has the eigenvalue -1"):
        metrics.frechet_distance([0] * 2, torch.diag(torch.tensor([1, -1])), [0] * 2, torch.eye(2))
    with pytest.raises(ValueError, match="must be finite"):
        metrics.frechet_distance(torch.full((3,), torch.nan), torch.eye(3), [0] * 3, torch.eye(3))


# ------------------------------------------------------------------------------------------------
# Inception score, precision and recall, nearest distance


def test_inception_score_against_torch_fidelity():
    """In four splits, each shuffled by the same seed as ours; in one, in any order."""
    logits = normal(1000, 20) * 3
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    expected = isc_features_to_metric(logits[order], splits=4, shuffle=False)
    score = metrics.inception_score(logits.float(), split_size=250)
    assert score == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    whole = isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    assert metrics.inception_score(logits.float()) == pytest.approx(whole, rel=1e-6)


def certain(labels):
    """Logits of a network that is certain of each label."""
    return 1e3 * torch.nn.functional.one_hot(torch.as_tensor(labels)).double()


def test_inception_score_by_hand():
    """Certain predictions: exp of the entropy of the classes, so 5 if 5 are equally frequent. Equal
    predictions: 1."""
    assert metrics.inception_score(certain([0, 1, 2, 3, 4] * 4)) == pytest.approx(5)
    share = torch.tensor([2, 2, 1, 1, 1]) / 7
    entropy = -(share * share.log()).sum().item()
    score = metrics.inception_score(certain([0, 1, 2, 3, 4, 0, 1]), split_size=5)
    assert score == pytest.approx(np.exp(entropy))
    assert metrics.inception_score(torch.ones(9, 5)) == pytest.approx(1)


def test_the_order_of_the_images_does_not_halve_the_inception_score():
    """Ten classes, equally frequent, each certain: 10. In the order of the classes ADM's two splits
    of 5,000 have five classes each, so a score of 5."""
    labels = torch.arange(10).repeat_interleave(1000)
    assert metrics.inception_score(certain(labels)) == pytest.approx(10, abs=0.02)
    assert metrics.inception_score(certain(labels.view(10, 1000).T.flatten())) == pytest.approx(
        10, abs=0.02)


@pytest.mark.parametrize("more", (1, 50, 4999))
def test_a_small_rest_does_not_halve_the_inception_score(more):
    """5,001 images of ten classes: 10. ADM's last split, of one image, has a score of 1."""
    labels = torch.arange(5000 + more) % 10
    assert metrics.inception_score(certain(labels)) == pytest.approx(10, abs=0.01)


@pytest.mark.parametrize("logits", (torch.zeros(0, 5), torch.zeros(5),
                                    torch.full((4, 5), torch.nan)))
def test_inception_score_refuses(logits):
    with pytest.raises(ValueError, match="needs finite logits"):
        metrics.inception_score(logits)


@pytest.mark.parametrize("block", (2**26, 3000))
@pytest.mark.parametrize("k", (1, 3))
def test_precision_and_recall_against_scipy(monkeypatch, block, k):
    monkeypatch.setattr(metrics, "BLOCK", block)  # 3000 distances at a time: many blocks
    samples = (5 + normal(300, 8)).float()
    reference = (5.5 + 1.2 * normal(400, 8, seed=1)).float()
    distance = cdist(samples.double(), reference.double())
    radii = [cKDTree(x).query(x, k + 1)[0][:, k] for x in (samples.double(), reference.double())]
    expected = ((distance <= radii[1]).any(1).mean(), (radii[0] >= distance.T).any(1).mean())
    assert 0.1 < expected[0] < 0.95 and 0.1 < expected[1] < 0.95
    assert metrics.precision_recall(samples, reference, k) == expected


def test_precision_and_recall_of_a_set_with_itself_and_with_one_far_away():
    x = normal(100, 5).float()
    assert metrics.precision_recall(x, x) == (1, 1)
    assert metrics.precision_recall(x, x + 1e3) == (0, 0)
    half = torch.cat([x[:50], x[:50] + 1e3])  # half the samples far off, half of x not covered
    precision, recall = metrics.precision_recall(half, x)
    assert precision == 0.5 and recall > 0.5


def test_precision_needs_more_images_than_neighbours():
    with pytest.raises(ValueError, match="3 nearest neighbours need more than 3 images"):
        metrics.precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    for k in (0, -1):
        with pytest.raises(ValueError, match="and k is 1 or more"):
            metrics.precision_recall(torch.zeros(9, 2), torch.zeros(9, 2), k)


def test_nearest_distance_separates_copies_from_new_images():
    reference, new = normal(300, 6).float(), normal(200, 6, seed=1).float()
    tree = cKDTree(reference.double())
    to_reference, among_itself = tree.query(new.double())[0], tree.query(reference.double(), 2)[0]
    expected = to_reference.mean(), among_itself[:, 1].mean()
    assert metrics.nearest_distance(new, reference) == pytest.approx(expected, rel=1e-5)
    assert metrics.nearest_distance(new[:1], reference)[0] == pytest.approx(to_reference[0])


@pytest.mark.parametrize("block", (2**26, 3000))
def test_nearest_distance_of_copies_is_exactly_0(monkeypatch, block):
    """Far from zero, where |a|^2 + |b|^2 - 2 ab alone would leave 0.001 to 0.07. Of a set with a
    copy in it, that copy is the other's nearest."""
    monkeypatch.setattr(metrics, "BLOCK", block)  # 3000 distances at a time: many blocks
    reference = (50 + 5 * normal(300, 64)).float()
    assert metrics.nearest_distance(reference[:50], reference)[0] == 0
    assert metrics.nearest_distance(reference, reference[:2])[1] > 1
    assert metrics.nearest_distance(reference, torch.cat([reference, reference]))[1] == 0


@pytest.mark.parametrize("sizes", ((0, 5), (5, 1), (5, 0)))
def test_nearest_distance_refuses(sizes):
    with pytest.raises(ValueError, match="one sample and two reference images or more"):
        metrics.nearest_distance(*(torch.zeros(size, 3) for size in sizes))


def test_distances_do_not_use_tf32():
    torch.set_float32_matmul_precision("high")
    try:
        with metrics.full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


# ------------------------------------------------------------------------------------------------
# Pairs: images and images, images and captions


def test_paired_error_against_torchmetrics():
    """torchmetrics also counts windows that reach over the edge; the interior is the same."""
    images, uncached = random_images(3, 20, 24, 3), random_images(3, 20, 24, 3, seed=1)
    uncached[1] = images[1] // 2 + 30
    x, y = (torch.from_numpy(both).permute(0, 3, 1, 2).double() / 127.5 - 1
            for both in (images, uncached))
    mse, ssim = metrics.paired_error(images, uncached)
    assert mse == pytest.approx((x - y).square().mean().item(), rel=1e-12)
    _, full = structural_similarity_index_measure(x, y, data_range=2.0, return_full_image=True)
    assert ssim == pytest.approx(full[..., 5:-5, 5:-5].mean().item(), rel=1e-6)
    assert metrics.paired_error(images, images) == (0, pytest.approx(1))


@pytest.mark.parametrize("shapes", (
    ((2, 12, 12, 3), (3, 12, 12, 3)), ((2, 8, 12, 3),) * 2, ((0, 12, 12, 3),) * 2,
    ((12, 12, 3),) * 2,
))
def test_paired_error_refuses(shapes):
    with pytest.raises(ValueError, match="cannot pair images"):
        metrics.paired_error(*(np.zeros(shape, np.uint8) for shape in shapes))


def test_paired_error_takes_pixels_of_0_to_255_only():
    """Images in [-1, 1] would look equal."""
    images = random_images(2, 12, 12, 3)
    with pytest.raises(ValueError, match="cannot pair pixels of uint8 and float64: use uint8"):
        metrics.paired_error(images, images / 127.5 - 1)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A small CLIP with random weights, registered with open_clip -> its name, its file."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is in requirements.txt")
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-test.json").write_text(json.dumps({
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32,
                       "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "layers": 1, "width": 16,
                     "heads": 2},
    }))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    network = open_clip.create_model("tiny-test")
    torch.save(network.state_dict(), folder / "tiny.pt")
    return "tiny-test", folder / "tiny.pt"


def test_clip_score_against_open_clips_own_forward(tiny_clip):
    name, path = tiny_clip
    clip = features.load_clip(name, str(path))
    network, preprocess, tokenizer = clip
    images = random_images(5, 40, 40, 3)
    prompts = ["a dog", "two cats", "a red house", "the sea", ""]
    with torch.no_grad():
        image, text, _ = network(
            torch.stack([preprocess(Image.fromarray(x)) for x in images]), tokenizer(prompts)
        )
    cosines = torch.nn.functional.cosine_similarity(image, text)
    assert (cosines < 0).any() and (cosines > 0).any()
    for batch_size in (2, 64):
        score = metrics.clip_score(iter(images), prompts, clip, batch_size)
        assert score == pytest.approx(100 * cosines.clamp(min=0).mean().item(), rel=1e-5)
    with pytest.raises(ValueError):
        metrics.clip_score(images, prompts[:4], clip)
    with pytest.raises(ValueError, match="needs an image or more"):
        metrics.clip_score([], [], clip)


def test_captions_that_clip_cuts_are_told_once(tiny_clip):
    """CLIP's 77 tokens are 75 words of one token each, between a start and an end."""
    clip = features.load_clip(tiny_clip[0], str(tiny_clip[1]))
    images = random_images(4, 32, 32, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.clip_score(images, ["cat " * n for n in (1, 74, 75, 0)], clip)
    with pytest.warns(UserWarning) as seen:
        metrics.clip_score(images, ["cat " * n for n in (76, 75, 200, 1)], clip, batch_size=1)
    assert [str(one.message)[:70] for one in seen] == [
        "2 of 4 captions have more than 77 tokens, and CLIP sees no further: \"c"]


def test_openais_weights_get_the_activation_they_were_trained_with(tiny_clip, monkeypatch):
    """They are asked for by their tag, as by default."""
    import open_clip

    name, path = tiny_clip
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda model: ["openai"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *args: {"quick_gelu": True})
    asked = {}

    def create(*args, **kwargs):
        asked.update(kwargs)
        return torch.nn.Linear(1, 1), None, None

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    features.load_clip(name, "openai")
    assert asked == {"force_quick_gelu": True}


def test_a_file_that_is_no_clip(tiny_clip, tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="bad.pt holds no weights of tiny-test: "):
        features.load_clip(tiny_clip[0], str(tmp_path / "bad.pt"))


@pytest.mark.parametrize("change, message", (
    (lambda x: x.round().to(torch.int8), "is int8, not floating point"),
    (lambda x: x * torch.nan, "holds NaN or infinite"),
    (lambda x: x.to("meta"), ""),
    (lambda x: x.to_sparse(), ""),
))
def test_what_is_no_weight_of_clip(tiny_clip, tmp_path, change, message):
    """open_clip copies whole numbers and NaN into its network without a word."""
    state = torch.load(tiny_clip[1])
    state["text_projection"] = change(state["text_projection"])
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=f"bad.pt.*{message}") as caught:
        features.load_clip(tiny_clip[0], str(tmp_path / "bad.pt"))
    assert "\n" not in str(caught.value)


def test_weights_of_clip_that_give_no_numbers(tiny_clip, tmp_path):
    """Finite, but too large."""
    state = torch.load(tiny_clip[1])
    state["visual.proj"] = torch.full_like(state["visual.proj"], 3e38)
    torch.save(state, tmp_path / "large.pt")
    clip = features.load_clip(tiny_clip[0], str(tmp_path / "large.pt"))
    with pytest.raises(ValueError, match="CLIP's cosines are not finite: are its weights right"):
        metrics.clip_score(random_images(2, 32, 32, 3), ["a", "b"], clip)


def test_unknown_clip_names(tiny_clip):
    with pytest.raises(ValueError, match="unknown CLIP model ViT-Z"):
        features.load_clip("ViT-Z", "openai")
    with pytest.raises(ValueError, match="no weights laion0 of ViT-B-32: use openai, "):
        features.load_clip("ViT-B-32", "laion0")


# ------------------------------------------------------------------------------------------------
# Statistics and evaluate


@pytest.fixture
def digits():
    return features.load("digits")


def test_evaluate_on_the_held_out_digits(digits):
    """The shipped statistics are those of the shipped images, and every metric has a value that
    real digits should have."""
    held_out = np.stack(list(pictures.read("digits-held-out")[1]))
    values = metrics.evaluate(held_out)
    again = metrics.evaluate(held_out, metrics.extract("digits", digits), network=digits)
    for other in (again, metrics.evaluate("digits-held-out")):
        # The held-out digits are part of the reference: their nearest distance is 0 but for
        # rounding.
        assert other.pop("nearest") < 0.01
        assert {key: values[key] for key in other} == pytest.approx(other, rel=1e-4)
    assert values["fid"] < 0.2 and values["is"] > 9
    assert values["precision"] == 1 and 0.8 < values["recall"] < 1
    assert values["nearest"] < 0.01 < values["nearest_reference"]
    noise = metrics.evaluate(random_images(100, 28, 28, 3))
    assert noise["fid"] > 20 * values["fid"] and noise["sfid"] > 20 * values["sfid"]
    assert noise["precision"] < 0.1 and noise["nearest"] > noise["nearest_reference"]


def test_fid_of_a_network_against_torch_fidelity_and_numpy(digits):
    """From images to FID, against numpy's statistics and pytorch-fid's distance."""
    images, other = random_images(70, 28, 28, 3), random_images(80, 28, 28, 3, seed=1)
    pooled = [digits(torch.from_numpy(x).permute(0, 3, 1, 2))[0].double().numpy()
              for x in (images, other)]
    expected = calculate_frechet_distance(
        *(f(x) for x in pooled for f in (lambda x: x.mean(0), lambda x: np.cov(x, rowvar=False)))
    )
    values = metrics.evaluate(images, other, ["fid"], digits, batch_size=32)
    assert values.keys() == {"fid"} and values["fid"] == pytest.approx(expected, rel=1e-5)


def test_saved_statistics_serve_as_reference(digits, tmp_path):
    images, other = random_images(70, 28, 28, 3), random_images(80, 28, 28, 3, seed=1)
    statistics = metrics.extract(other, digits)
    metrics.save_statistics(tmp_path / "other.npz", statistics)
    expected = metrics.evaluate(images, other, network=digits)
    assert metrics.evaluate(images, tmp_path / "other.npz", network=digits) == expected
    assert metrics.evaluate(images, statistics, network=digits) == expected
    assert set(expected) == {"fid", "sfid", "is", "precision", "recall", "nearest",
                             "nearest_reference"}


def test_a_reference_in_adms_layout(digits, tmp_path, monkeypatch):
    """A file without the name of a network is Inception's. Precision and recall come from its
    images."""
    monkeypatch.setattr(digits, "name", feature_statistics.ADM_NETWORK, raising=False)
    images, other = random_images(70, 28, 28, 3), random_images(80, 28, 28, 3, seed=1)
    seen = metrics.extract(other, digits)
    known = {key: getattr(seen, key).numpy() for key in ("mu", "sigma", "mu_s", "sigma_s")}
    known["mu"] = known["mu"] + 1  # statistics of more images than arr_0, as in ADM's files
    np.savez(tmp_path / "adm.npz", **known, arr_0=other)
    values = metrics.evaluate(images, tmp_path / "adm.npz", network=digits)
    expected = metrics.evaluate(images, other, network=digits)
    assert values["precision"] == expected["precision"] and values["fid"] != expected["fid"]
    np.savez(tmp_path / "bare.npz", **known)
    bare = metrics.evaluate(images, tmp_path / "bare.npz", network=digits)
    assert bare == {key: values[key] for key in ("fid", "sfid", "is")}
    with pytest.raises(ValueError, match="recall needs more than 3 images in each set, not only"):
        metrics.evaluate(images, tmp_path / "bare.npz", ["recall"], digits)


def test_statistics_of_another_network_are_refused(digits, tmp_path):
    statistics = metrics.extract(random_images(5, 28, 28, 3), digits)
    statistics.network = "Inception 2015-12-05, resize pytorch-fid"
    metrics.save_statistics(tmp_path / "other.npz", statistics)
    with pytest.raises(ValueError, match="another network: of Inception 2015-12-05, resize pytorch-"
                                         "fid, not of digits classifier"):
        metrics.evaluate(random_images(5, 28, 28, 3), tmp_path / "other.npz", network=digits)


def test_statistics_of_two_networks_are_not_compared(digits):
    a = metrics.extract(random_images(5, 28, 28, 3), digits)
    b = dataclasses.replace(a, network="Inception 2015-12-05, resize tf1")
    message = "64 features of digits classifier and 64 features of Inception 2015"
    with pytest.raises(ValueError, match=message):
        metrics.compare(a, b)


def test_three_images_have_a_fid_but_no_precision(digits):
    values = metrics.evaluate(random_images(3, 28, 28, 3), network=digits)
    assert set(values) == {"fid", "sfid", "is"}


def test_statistics_name_the_network_they_need(digits, tmp_path):
    metrics.save_statistics(tmp_path / "a.npz", metrics.extract("digits-held-out", digits))
    assert metrics.usual_features(tmp_path / "a.npz") == "digits"
    assert metrics.usual_features(metrics.extract("emoji", features.load("emoji"))) == "emoji"
    assert metrics.usual_features("pictures") == "inception"


def test_damaged_statistics(digits, tmp_path):
    metrics.save_statistics(tmp_path / "a.npz", metrics.extract("digits-held-out", digits))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut.npz is not an npz file, or not a whole one"):
        metrics.load_statistics(tmp_path / "cut.npz")
    np.savez(tmp_path / "lacks.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="lacks.npz lacks sigma$"):
        metrics.load_statistics(tmp_path / "lacks.npz")


def test_one_image_is_too_few(digits):
    with pytest.raises(ValueError, match="1 images in features: statistics need two or more"):
        metrics.extract(random_images(1, 28, 28, 3), digits)


def test_a_reference_of_mu_and_sigma_only_serves_for_fid(digits, tmp_path):
    """As of pytorch-fid, TTUR and MAR. FID is that of the whole file; sFID is refused."""
    images, other = random_images(70, 28, 28, 3), random_images(80, 28, 28, 3, seed=1)
    whole = metrics.extract(other, digits)
    arrays = {"mu": whole.mu.numpy(), "sigma": whole.sigma.numpy()}
    np.savez(tmp_path / "named.npz", **arrays, network=digits.name)
    expected = metrics.evaluate(images, other, ["fid"], digits)
    assert metrics.evaluate(images, tmp_path / "named.npz", ["fid"], digits) == expected
    assert set(metrics.evaluate(images, tmp_path / "named.npz", None, digits)) == {"fid", "is"}
    with pytest.raises(ValueError, match="sfid needs mu_s and sigma_s"):
        metrics.evaluate(images, tmp_path / "named.npz", ["sfid"], digits)
    np.savez(tmp_path / "nameless.npz", **arrays)
    with pytest.warns(UserWarning, match="nameless.npz does not name its network: taken for"):
        assert metrics.evaluate(images, tmp_path / "nameless.npz", ["fid"], digits) == expected


def test_a_data_sets_name_is_looked_up_in_one_place(digits, tmp_path, monkeypatch):
    """A folder `digits` of the user's is refused by every entry, and taken as ./digits."""
    (tmp_path / "digits").mkdir()
    for j, image in enumerate(random_images(5, 28, 28)):
        Image.fromarray(image).save(tmp_path / "digits" / f"{j}.png")
    assert metrics.statistics_of("digits", digits).count == 5000
    monkeypatch.chdir(tmp_path)
    for refused in (lambda: metrics.usual_features("digits"), lambda: metrics.evaluate("digits"),
                    lambda: metrics.statistics_of("digits", digits)):
        with pytest.raises(ValueError, match="digits is a data set's name and a file or folder"):
            refused()
    for own in ("./digits", Path("digits")):
        assert metrics.usual_features(own) == "inception"
        assert metrics.statistics_of(own, digits).count == 5


# ------------------------------------------------------------------------------------------------
# The command


def run(monkeypatch, capsys, *args):
    """Runs the command in this process -> exit code, stdout, stderr."""
    monkeypatch.setattr("sys.argv", ["metrics.py", *map(str, args), "--device", "cpu"])
    code = 0
    try:
        command.run(metrics.main)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_the_command_end_to_end(tmp_path, monkeypatch, capsys):
    images = np.stack(list(pictures.read("digits-held-out")[1]))[::20]
    np.savez(tmp_path / "samples.npz", arr_0=images)
    stats = tmp_path / "stats.npz"
    code, out, err = run(monkeypatch, capsys, tmp_path / "samples.npz", "--save-stats", stats)
    assert code == 0 and "50 images span fewer than the 64 features" in err
    expected = metrics.evaluate(images)
    for name, value in expected.items():
        if name in metrics.METRICS:
            title, _ = metrics.METRICS[name]
            row = next(line for line in out.splitlines() if line.startswith(title))
            assert f" {value:.4f} " in row and row.endswith("digits classifier")
    assert f"near {expected['nearest_reference']:.4f}" in out
    _, out, _ = run(monkeypatch, capsys, stats, "--json", "--metrics", "fid,recall")
    answer = json.loads(out)
    assert answer["values"] == pytest.approx({k: expected[k] for k in ("fid", "recall")}, rel=1e-6)
    assert answer["images"] == 50 and answer["reference_images"] == 5000


def test_the_commands_clip_score(tmp_path, monkeypatch, capsys, tiny_clip):
    name, path = tiny_clip
    images = random_images(3, 32, 32, 3)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    (tmp_path / "captions.txt").write_text("a dog\na cat\nthe sea\n")
    flags = ["--metrics", "clip", "--clip-model", name, "--clip-pretrained", path]
    flags += ["--captions", tmp_path / "captions.txt"]
    code, out, _ = run(monkeypatch, capsys, tmp_path / "samples.npz", *flags)
    expected = metrics.clip_score(images, ["a dog", "a cat", "the sea"],
                                  features.load_clip(name, str(path)))
    assert code == 0 and f"{expected:.4f}" in out and f"open_clip {name}, {path}" in out
    (tmp_path / "captions.txt").write_text("a dog\n")
    code, _, err = run(monkeypatch, capsys, tmp_path / "samples.npz", *flags)
    assert code == 2 and "captions.txt has 1 captions for 3 images" in err


def test_metrics_of_emoji(tmp_path, monkeypatch, capsys):
    """Every metric but the Inception score, by the shipped encoder, without a download."""
    images, captions = (values[::9] for values in shipped.emoji())
    np.savez(tmp_path / "x.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    (tmp_path / "captions.txt").write_text("\n".join(captions) + "\n")
    flags = ["--reference", "emoji", "--clip-model", "emoji"]
    code, out, _ = run(monkeypatch, capsys, tmp_path / "x.npz", *flags, "--captions",
                       tmp_path / "captions.txt", "--json")
    answer = json.loads(out)
    assert code == 0 and set(answer["networks"].values()) == {"emoji encoder"}
    values = answer["values"]
    assert "is" not in values and values["precision"] == 1 and values["nearest"] < 0.01
    assert values["clip"] > 40
    (tmp_path / "captions.txt").write_text("\n".join(reversed(captions)) + "\n")
    _, out, _ = run(monkeypatch, capsys, tmp_path / "x.npz", *flags, "--metrics", "clip",
                    "--captions", tmp_path / "captions.txt", "--json")
    assert json.loads(out)["values"]["clip"] < 20
    code, _, err = run(monkeypatch, capsys, tmp_path / "x.npz", "--reference", "emoji", "--metrics",
                       "is")
    assert code == 2 and "is needs images, not only statistics, and a network that predicts" in err


@pytest.mark.parametrize(("args", "message"), (
    (["nothing"], "nothing is no folder of images, npz file or digits, digits-train"),
    (["digits", "--metrics", "clip"], "the CLIP score and --captions FILE go together"),
    (["digits", "--metrics", "kid"], "unknown metric kid: use fid, sfid, is, precision"),
    (["digits", "--features", "vgg"], "unknown features vgg: use inception, digits or emoji"),
    (["digits", "--reference", "digits-train", "--features", "inception"], "could not download"),
    (["digits", "--save-stats", "x.dat"], "--save-stats takes a name that ends in .npz, not x.dat"),
    (["digits", "--metrics", "fid, ,kid"], "unknown metric kid"),
    (["digits", "--reference", "nothing"], "nothing is no folder of images"),
    (["digits", "--batch-size", "0"], "--batch-size must be 1 or more"),
    (["digits", "--metrics", ","], "--metrics names none: use fid"),
    (["digits", "--features", ""], "argument --features: a name, not an empty one"),
    (["digits", "--metrics", ""], "argument --metrics: a name, not an empty one"),
    (["digits", "--clip-model", " "], "argument --clip-model: a name, not an empty one"),
    (["digits", "--unknown"], "unrecognized arguments: --unknown"),
    (["emoji", "--reference", "emoji", "--metrics", "is"], "is needs images, not only statistics"),
    (["emoji", "--features", "digits"], "the digits classifier takes 28 x 28 images, not 32 x 32"),
))
def test_mistakes_end_in_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # a folder without weights
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # and no connection
    code, _, err = run(monkeypatch, capsys, *args)
    assert code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1


@pytest.fixture
def small_sets(tmp_path, monkeypatch, digits):
    """In the current folder: s.npz with statistics, i.npz with 20 images, c.txt with captions."""
    monkeypatch.chdir(tmp_path)
    grey = np.repeat(random_images(20, 28, 28, 1), 3, axis=3)
    np.savez("i.npz", arr_0=grey)
    metrics.save_statistics("s.npz", metrics.extract(grey, digits))
    Path("c.txt").write_text("a\n" * 20)
    return tmp_path


@pytest.mark.parametrize("args", (
    ["s.npz", "--save-stats", "s.npz"],
    ["i.npz", "--save-stats", "./i.npz"],
    ["i.npz", "--reference", "s.npz", "--save-stats", "s.npz"],
    ["i.npz", "--captions", "c.npz", "--save-stats", "c.npz"],
    ["i.npz", "--weights", "w.npz", "--save-stats", "w.npz"],
))
def test_what_is_read_is_never_written(args, small_sets, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in small_sets.iterdir()}
    code, _, err = run(monkeypatch, capsys, *args)
    assert code == 2 and "is read, so it is not written" in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in small_sets.iterdir()} == before


def test_mistakes_are_found_before_the_work(small_sets, monkeypatch, capsys):
    """By statistics_of, which reads all images, no set was asked for; nothing is written."""
    with np.load("s.npz") as known:
        np.savez("nan.npz", **{**known, "mu_s": known["mu_s"] * np.nan})
        np.savez("other.npz", **{**known, "network": "another"})
    np.savez("three.npz", arr_0=np.zeros((3, 28, 28, 3), np.uint8))
    np.savez("one.npz", arr_0=np.zeros((1, 28, 28, 3), np.uint8))
    before = set(small_sets.iterdir())
    monkeypatch.setattr(metrics, "statistics_of", None)
    for args, message in (
        (["--reference", "nan.npz"], "nan.npz cannot be right: mu_s holds NaN"),
        (["--reference", "other.npz", "--features", "digits"], "other.npz holds statistics of an"),
        (["--reference", "three.npz", "--features", "digits", "--metrics", "recall"],
         "recall needs more than 3 images in each set"),
        (["--reference", "one.npz"], "1 images in one.npz: statistics need two or more"),
        (["--reference", "emoji", "--features", "digits"], "the digits classifier takes 28 x 28"),
        (["--captions", "c.txt", "--metrics", "clip"], "--save-stats out"),
    ):
        code, _, err = run(monkeypatch, capsys, "i.npz", "--save-stats", "new/x.npz", *args)
        assert code == 2 and message in err and err.count("\n") == 1
    assert set(small_sets.iterdir()) == before


def test_a_folder_with_strangers_has_one_warning(small_sets):
    """Though it is listed several times: a line for the folder, and one for the few images."""
    Path("f").mkdir()
    for j in range(5):
        Image.fromarray(random_images(28, 28, seed=j)).save(f"f/{j}.png")
    Path("f/a.doc").write_text("a letter")
    answer = subprocess.run([sys.executable, ROOT / "metrics.py", "f", "--device", "cpu"],
                            capture_output=True, text=True)
    lines = answer.stderr.splitlines()
    assert answer.returncode == 0 and len(lines) == 2
    assert lines[0] == "warning: left out of f: 1 .doc" and lines[1].startswith("note: 5 images")


def test_images_of_two_sizes_and_in_colour_are_told(small_sets, monkeypatch, capsys):
    """Inception enlarges all images to the same size; the classifier looks at one channel."""
    random = features.Inception()
    torch.save(random.state_dict(), "random.pth")
    np.savez("a.npz", arr_0=random_images(2, 40, 40, 3))
    np.savez("b.npz", arr_0=random_images(2, 40, 50, 3))
    flags = ["--features", "inception", "--weights", "random.pth", "--metrics", "fid"]
    with pytest.warns(UserWarning, match="samples are 40 x 40, the reference 40 x 50"):
        assert run(monkeypatch, capsys, "a.npz", "--reference", "b.npz", *flags)[0] == 0
    np.savez("a.npz", arr_0=random_images(5, 28, 28, 3))
    with pytest.warns(UserWarning, match="images in colour: the digits classifier looks at their"):
        assert run(monkeypatch, capsys, "a.npz", "--metrics", "fid")[0] == 0


def test_weights_of_clip_without_a_connection(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="could not get openai of ViT-B-32") as caught:
        features.load_clip("ViT-B-32", "openai")
    assert "\n" not in str(caught.value)


def test_the_file_runs_as_a_command():
    answer = subprocess.run([sys.executable, ROOT / "metrics.py", "digits", "--metrics", "kid"],
                            capture_output=True, text=True)
    assert answer.returncode == 2 and answer.stderr.startswith("error: unknown metric kid")
