"""Commands whose work two processes share, on the CPU, beside the same commands in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distributed
import sample
import train_stepwise
import training
from tests.small import digits_weights, tiny_model

ROOT = Path(__file__).parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def call(*words, processes=1):
    """Runs a command of this project -> exit code, stdout, stderr."""
    start = [*TORCHRUN, str(processes)] if processes > 1 else []
    answer = subprocess.run([sys.executable, *start, *map(str, words)], cwd=ROOT, text=True,
                            capture_output=True, timeout=300,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    return answer.returncode, answer.stdout, answer.stderr


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return digits_weights(tmp_path_factory.mktemp("weights"))


def flags(weights, out, *more):
    return ["train_stepwise.py", "--weights", weights, "--device", "cpu", "--steps", 3,
            "--batch-size", 5, "--micro-batch", 2, "--lambda-every", 3, "--beta", 1e-5, "--out",
            out, *more]


def log_of(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_the_router_of_several_processes_is_that_of_one_to_the_last_bit(weights, tmp_path):
    """Three chunks, of which the last is smaller. What one process began, two go on with."""
    one, three = tmp_path / "one", tmp_path / "three"
    code, stdout, stderr = call(*flags(weights, one, "--iterations", 6))
    assert code == 0, stderr
    assert stdout.count("wrote ") == 1 and " processes" not in stderr
    for words, processes in ((flags(weights, one, "--iterations", 9, "--resume"), 2),
                             (flags(weights, three, "--iterations", 9), 3)):
        code, stdout, stderr = call(*words, processes=processes)
        assert code == 0, stderr
        assert stdout.count("wrote ") == stderr.count(f"{processes} processes") == 1
    assert log_of(one) == log_of(three) and len(log_of(one)) == 3
    name = "router.safetensors"
    assert (one / name).read_bytes() == (three / name).read_bytes()


def test_the_images_and_metrics_of_two_processes_are_those_of_one(tmp_path):
    words = ["sample.py", "--device", "cpu", "--schedule", "fora:2", "--steps", 3,
             "--num-samples", 7, "--batch-size", 2, "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    for out, processes in ((one, 1), (two, 2)):
        code, _, stderr = call(*words, out, processes=processes)
        assert code == 0, stderr
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir()) and len(names) == 9
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)

    values = []
    for processes in (1, 2):
        code, stdout, stderr = call("metrics.py", two, "--device", "cpu", "--batch-size", 2,
                                    "--json", processes=processes)
        assert code == 0, stderr
        values.append(json.loads(stdout)["values"])
    assert values[0].keys() == values[1].keys() and len(values[0]) > 5
    for key, value in values[0].items():
        assert values[1][key] == pytest.approx(value, rel=1e-12)


def test_what_cannot_be_shared_is_one_line(tmp_path):
    code, _, stderr = call("search.py", "--speedup", 2, "--out", tmp_path / "out", processes=2)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code != 0 and len(errors) == 1 and "start it by python, not torchrun" in errors[0]
    assert not list(tmp_path.iterdir())


DIES = """
import os
import train_stepwise, command, training

record = training.Run.record
def dies(self, *args):
    if os.environ["RANK"] == "1" and self.done == 0:
        os._exit(7)
    record(self, *args)
training.Run.record = dies
command.run(train_stepwise.main, several=True)
"""


def test_nobody_waits_for_a_process_that_died_and_the_run_goes_on_later(weights, tmp_path):
    """Rank 1 ends without a word after the first of two trajectories."""
    out, script = tmp_path / "out", tmp_path / "dies.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + DIES)
    code, _, _ = call(script, *flags(weights, out, "--iterations", 6)[1:], processes=2)
    assert code != 0 and not (out / "results.json").exists()
    code, _, stderr = call(*flags(weights, out, "--iterations", 6, "--resume"))
    assert code == 0, stderr
    assert call(*flags(weights, tmp_path / "whole", "--iterations", 6))[0] == 0
    assert log_of(out) == log_of(tmp_path / "whole")


def test_one_process_needs_nothing_of_it():
    part = torch.arange(6.0).reshape(3, 2)
    assert distributed.together(part, 3) is part
    assert distributed.mine(4) == range(4) and distributed.join("cpu") == "cpu"
    assert (distributed.rank(), distributed.size()) == (0, 1)
    with pytest.raises(ValueError, match="1 processes for 0 images"):
        distributed.check_enough(0, "images")
    distributed.wait()


def test_several_processes_fill_a_folder_and_each_a_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(ValueError, match="several processes fill a folder"):
        sample.choose_out(tmp_path / "a.png", False, False)
    with pytest.raises(ValueError, match="several processes fill a folder"):
        sample.choose_out(None, False, False)
    assert sample.choose_out(tmp_path / "a", False, False) == tmp_path / "a"
    monkeypatch.setattr(sys, "argv", ["sample.py", "--num-samples", "20", "--device", "cpu",
                                      "--out", str(tmp_path / "a")])
    with pytest.raises(ValueError, match="2 processes for 1 batches of images: use a smaller"):
        sample.main()
    with pytest.raises(ValueError, match="2 processes for 1 chunks of a batch: use a smaller"):
        train_stepwise.train(tiny_model(), {**training.PUBLISHED, "sampler": "ddim", "steps": 4,
                                            "guidance": 1.5, "tau": 0.1, "objective": "iepo",
                                            "forecast": 0, "batch_size": 8}, tmp_path / "run")


@pytest.mark.parametrize("device, more, message", (
    ("cpu", {"WORLD_SIZE": "4"}, "4 processes, not all started by torchrun on this machine"),
    ("cuda:1", {}, "several processes need --device cuda"),
    ("mps", {}, "several processes need --device cuda"),
    ("cuda", {}, "2 processes need as many GPUs"),
))
def test_what_cannot_be_joined_is_refused(monkeypatch, device, more, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **more}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.join(device)


def test_shares_are_dealt_out_and_put_together_in_order(monkeypatch):
    """Three ranks, one after another, with a sum that is taken here."""
    rows, shares = [], []
    monkeypatch.setattr(distributed, "size", lambda: 3)
    monkeypatch.setattr(distributed.distributed, "all_reduce", rows.append)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.mine(8, group=2))
        distributed.together(torch.tensor(shares[-1]), 8, group=2)
    assert shares == [[0, 1, 6, 7], [2, 3], [4, 5]]
    assert sum(rows).tolist() == list(range(8))
