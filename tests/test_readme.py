"""What README, docs/ and the shipped files claim is so."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import models
import router
import shipped
from samplers import ALPHA_BAR, Noise, denoise, make_sampler

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "RESULTS.md").read_text()
TEXTS = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
WRITTEN = "runs/", "samples"  # where the commands write to
PLACES = "checkpoints|data|docs|experiments|notebooks|tests"


def code_of(text):
    """The lines of fenced blocks and the pieces of inline code that begin with `python`, without
    their comments."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text,
                                             flags=re.MULTILINE | re.DOTALL))
    pieces = [re.sub(r"\s+#.*", "", piece) for piece in lines] + [" ".join(piece.split())
                                                                  for piece in inline]
    return [piece for piece in pieces if piece.startswith("python ")]


COMMANDS = [(match[1], match[2]) for text in TEXTS.values() for piece in code_of(text)
            if (match := re.match(r"python (?:-m )?([\w./]+)(.*)", piece))
            and match[1] != "experiments.NAME"]


def definitions(path):
    """{name: line} of a file's functions, classes and, as Class.method, methods."""
    kinds = ast.FunctionDef, ast.ClassDef
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, kinds):
            found[node.name] = node.lineno
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}": inner.lineno
                      for inner in node.body if isinstance(inner, kinds)}
    return found


# ------------------------------------------------------------------------------------------------
# What is named exists (how long README may be: test_size.py)


def test_the_first_command_comes_by_line_15():
    assert "make demo" in README.splitlines()[:15]


def test_the_map_points_at_the_definitions():
    """`file.py:LINE name`, like `cache.py:55 Cache.__call__`."""
    entries = re.findall(r"`([\w/]+\.py):(\d+) ([\w.]+)`", README)
    assert len(entries) >= 6
    wrong = {f"{file}:{line} {name}": f"line {definitions(ROOT / file).get(name)}"
             for file, line, name in entries
             if definitions(ROOT / file).get(name) != int(line)}
    assert not wrong


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_files_that_the_texts_name_exist(path):
    text = TEXTS[path]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)
             if not link.startswith(("http", "#"))]
    missing = [link for link in links if not (path.parent / link).exists()]
    files = re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|md|csv|txt))[`:]", text)
    files += re.findall(rf"\b((?:{PLACES})/[\w./-]*[\w/])", text)
    missing += [file for file in files if not file.startswith(WRITTEN)
                and not (ROOT / file).exists()]
    assert missing == []


def test_links_within_a_text_lead_to_a_heading():
    for path, text in TEXTS.items():
        headings = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
                    for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
        assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings, path.name


def test_every_file_of_docs_is_linked_from_readme():
    pages = {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")}
    assert pages <= set(re.findall(r"\]\((docs/[^)]+)\)", README))
    shown = {path.parent / link for path, text in TEXTS.items()
             for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)}
    assert {picture.resolve() for picture in ROOT.glob("docs/*.png")} == {
        picture.resolve() for picture in shown}


@pytest.mark.parametrize("name", sorted({name for name, _ in COMMANDS}))
def test_flags_that_the_texts_name_exist(name):
    module = name.removesuffix(".py").replace("/", ".")
    answer = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"--[\w-]+", answer))
    for other, flags in COMMANDS:
        if other == name:
            assert set(re.findall(r"--[\w-]+", flags)) <= known, flags


def test_targets_of_make_that_the_texts_name_exist():
    named = {target for text in TEXTS.values() for target in re.findall(r"`(?:PYTHON=\S+ )?make "
                                                                        r"([a-z]+)`", text)}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named and named <= targets


def test_git_ignores_what_the_commands_write():
    outputs = {out for _, flags in COMMANDS for out in re.findall(r"--out (\S+)", flags)}
    outputs |= {"compare.png", "samples.png", "runs/digits"}
    answer = subprocess.run(["git", "check-ignore", "--no-index", *sorted(outputs)], cwd=ROOT,
                            capture_output=True, text=True)
    if answer.returncode > 1:
        pytest.skip("not a clone by git")
    assert outputs - {"NAME"} <= set(answer.stdout.split())


def test_the_block_of_python_runs_and_prints_what_it_says(tmp_path):
    block = re.search(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[1]
    answer = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True,
                            text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert answer.stdout.strip() == re.search(r"# (\d.*reused)$", block, re.MULTILINE)[1]
    assert (tmp_path / "samples.png").stat().st_size > 1000


# ------------------------------------------------------------------------------------------------
# What is claimed holds


def table_after(text, heading):
    """The cells of the first table after a heading: a list of rows."""
    rows = re.search(r"^\|.*?\n\n", text[text.index(f"\n## {heading}") :], re.MULTILINE | re.DOTALL)
    return [[cell.strip() for cell in row.strip("|").split("|")]
            for row in rows[0].strip().splitlines()[2:]]


def test_the_tables_on_digits_are_the_shipped_ones():
    """README's and RESULTS' rows against checkpoints/table/digits-ddim-20.json."""
    stored = json.loads((ROOT / "checkpoints" / "table" / "digits-ddim-20.json").read_text())
    lines = stored["table"]
    rows = table_after(RESULTS, "Which method keeps the images best?")
    assert len(rows) == len(lines)
    for (_, cur, fid, *_, error, less), line in zip(rows, lines, strict=True):
        assert cur == f"{100 * line['cur'][0]:.1f} %" and less == f"{line['less'][0]:.2f} x"
        assert fid.split(" ")[0] == f"{line['fid'][0]:.2f}"
        assert error.split(" ")[0] == f"{1000 * line['error'][0]:.2f}"
    short = {tuple(cell.split(" ±")[0] for cell in (cur, fid, error, less))
             for _, cur, fid, *_, error, less in rows}
    ours = table_after(README, "What it finds")
    assert len(ours) == 6 and {tuple(row[1:]) for row in ours} <= short


def test_the_shipped_router_is_the_one_that_the_texts_tell_of():
    model = models.load("digits", device="cpu")
    file = router.load(model.router)
    file.check("digits", model.sampler, model.steps, len(model.network.branches))
    cur = router.cur(file.schedule())
    assert cur >= 0.3 and f"the shipped router | {100 * cur:.1f} %" in RESULTS
    assert f"{100 * cur:.1f} % reused" in README
    assert float(file.about["guidance"]) == model.guidance


def test_the_shipped_model_is_small_and_draws_digits():
    """Trained weights predict the noise in real digits; random ones do not."""
    assert (ROOT / "checkpoints" / "digits_dit.safetensors").stat().st_size < 12e6
    network = models.load("digits", device="cpu").network
    images, labels = shipped.digits("held-out")
    images, labels = images[::20] / 127.5 - 1, labels[::20]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((len(images),), 400)
    a = ALPHA_BAR[400]
    with torch.no_grad():
        eps = network(a**0.5 * images + (1 - a) ** 0.5 * noise, t, labels)[:, :1]
    assert (eps - noise).square().mean() < 0.05


def test_the_shipped_emoji_model_is_small_and_knows_its_captions():
    """Of 100 captions that nobody chose, at least 80 give an image among whose 3 nearest training
    images is the caption's own."""
    assert (ROOT / "checkpoints" / "emoji_pixart.safetensors").stat().st_size < 16e6
    model = models.load("emoji", device="cpu")
    prompts = shipped.emoji_prompts()[:100]
    noise = Noise(0, range(100))
    with sdpa_kernel(SDPBackend.MATH):
        drawn = denoise(model.network, make_sampler(model.sampler, model.steps),
                        noise.start(model.shape), model.condition(prompts), model.guidance)
    images, captions = shipped.emoji()
    distances = torch.cdist(drawn.clamp(-1, 1).flatten(1), images.flatten(1) / 127.5 - 1)
    own = distances[range(100), [captions.index(prompt) for prompt in prompts]]
    assert ((distances < own[:, None]).sum(1) < 3).sum() >= 80


def test_prompts_of_the_examples_are_captions_that_the_model_has_learnt():
    text = " ".join(flags for _, flags in COMMANDS if "--model emoji" in flags)
    prompts = re.findall(r'--prompt "([^"]+)"', text)
    assert prompts and set(prompts) <= set(shipped.emoji_prompts())
