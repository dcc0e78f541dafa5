"""Files that are written whole or not at all, and errors that end in one line."""

import argparse
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import command
import text


def names(folder):
    """Everything in a folder, hidden files too."""
    return sorted(os.listdir(folder))


# The kinds of fault that are tested here, and where the right value comes from: a file is written
# whole or not at all (bytes), what is no ordinary file is neither replaced nor read (a FIFO would
# hang), what killed processes left is cleared and what running ones have is not (their number), one
# process at a time works in a folder (two processes), every mistake is one line and exit code 2.
# ------------------------------------------------------------------------------------------------
# Files


def test_what_is_no_ordinary_file_is_neither_replaced_nor_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(OSError, match="not an ordinary file"), command.replacing(path):
            pass
        with pytest.raises(OSError, match="not an ordinary file"):
            command.check_writable(path)
        with pytest.raises(OSError, match="not an ordinary file"):
            command.load_state(path)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert not Path("/dev/null").is_file()


def test_what_killed_processes_left_is_cleared(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()  # its number belongs to nobody now
    gone, mine = f".a.png.{child.pid}.part.png", f".b.png.{os.getpid()}.part.png"
    others = (".hidden", "a.part", f"a.png.{child.pid}.part.png")
    for name in (gone, mine, *others):
        (tmp_path / name).touch()
    command.check_writable(tmp_path / "new")
    assert names(tmp_path) == sorted([mine, *others])


def test_a_folder_is_locked_for_other_processes_only_while_it_is_used(tmp_path):
    code = f"import command\nwith command.locked({str(tmp_path)!r}): pass"

    def other():
        return subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent,
                              capture_output=True, text=True)

    with command.locked(tmp_path):
        answer = other()
        assert answer.returncode and "in use by another process" in answer.stderr
    assert other().returncode == 0
    assert names(tmp_path) == []


def test_what_is_read_is_not_written(tmp_path):
    command.check_not_read("a.png", None, "b.png")
    with pytest.raises(ValueError, match="a.png is read, so it is not written"):
        command.check_not_read(tmp_path / "x" / ".." / "a.png", tmp_path / "a.png")
    (tmp_path / "loop").symlink_to("loop")
    command.check_not_read("a.png", tmp_path / "loop")  # reading it says what is wrong


def test_replacing_makes_folders_and_shows_the_file_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    with command.replacing(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent  # else the move to `path` could not be at once
        assert temporary.suffix == path.suffix  # numpy and Pillow go by it
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["file.txt"]


def test_replacing_overwrites(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with command.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [None, "old"])
def test_replacing_leaves_everything_as_it_was_after_an_exception(tmp_path, error, old):
    path = tmp_path / "file.txt"
    if old:
        path.write_text(old)
    with pytest.raises(error), command.replacing(path) as temporary:
        temporary.write_text("half")
        raise error("in the middle")
    assert names(tmp_path) == (["file.txt"] if old else [])
    assert not old or path.read_text() == old


@pytest.mark.parametrize("function", ["write_bytes", "replace"])
def test_save_state_on_a_full_disk_keeps_the_old_state(tmp_path, monkeypatch, function):
    path = tmp_path / "state.pt"
    command.save_state(path, {"step": 1})

    def full(file, *args):
        if function == "write_bytes":
            with open(file, "wb") as opened:
                opened.write(args[0][:10])
        raise OSError(28, "No space left on device")

    owner = command.Path if function == "write_bytes" else command.os
    monkeypatch.setattr(owner, function, full)
    with pytest.raises(OSError, match="No space left"):
        command.save_state(path, {"step": 2})
    assert command.load_state(path) == {"step": 1}
    assert names(tmp_path) == ["state.pt"]


def test_state_comes_back_as_it_was(tmp_path):
    state = {
        "numbers": [1, 2.5, -3, None, True, 2**62],
        "nested": {"text": "å", 7: [{}, []]},
        "tensors": {
            dtype: torch.arange(6).view(2, 3).to(dtype)
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)
        },
    }
    command.save_state(tmp_path / "state.pt", state)
    back = command.load_state(tmp_path / "state.pt")
    tensors, expected = back.pop("tensors"), state.pop("tensors")
    assert back == state
    assert tensors.keys() == expected.keys()
    for dtype, tensor in tensors.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[dtype])


def test_the_state_of_an_optimiser_comes_back_bitwise(tmp_path):
    rows = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.AdamW(rows, 0.1)
    rows[1].grad = torch.tensor([1.0, -2.0, 0.3])
    optimizer.step()
    command.save_state(tmp_path / "state.pt", optimizer.state_dict())
    back = command.load_state(tmp_path / "state.pt")
    expected = optimizer.state_dict()
    assert back["param_groups"] == expected["param_groups"]
    assert back["state"].keys() == expected["state"].keys() == {1}
    for key, value in expected["state"][1].items():
        assert torch.equal(back["state"][1][key], value)


def test_a_truncated_state_is_refused_in_one_line(tmp_path):
    path = tmp_path / "state.pt"
    command.save_state(path, {"tensor": torch.ones(100)})
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a whole state file") as caught:
            command.load_state(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_text_is_refused_as_a_state(tmp_path):
    path = tmp_path / "state.pt"
    path.write_text("<html>not found</html>\n")
    with pytest.raises(ValueError, match="not a whole state file"):
        command.load_state(path)


class Dangerous:
    """Pickled, it is an instruction to make a folder when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_pickle_that_carries_code_is_refused_and_not_run(tmp_path):
    path, folder = tmp_path / "state.pt", tmp_path / "made"
    torch.save({"router": Dangerous(str(folder))}, path)
    with pytest.raises(ValueError, match="not a whole state file"):
        command.load_state(path)
    assert not folder.exists()


def test_a_missing_state_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"state\.pt"):
        command.load_state(tmp_path / "state.pt")


def test_check_writable_leaves_no_file(tmp_path):
    command.check_writable(tmp_path / "new" / "file.png")
    command.check_writable(str(tmp_path / "file.png"))
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == []


def test_check_writable_does_not_touch_a_file_that_is_there(tmp_path):
    path = tmp_path / "file.png"
    path.write_text("old")
    command.check_writable(path)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.png"]


def test_check_writable_refuses_a_folder_and_what_lies_under_a_file(tmp_path):
    with pytest.raises(OSError, match="it is a folder"):
        command.check_writable(tmp_path)
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="cannot write .*samples.png: .*file is no folder"):
        command.check_writable(tmp_path / "file" / "samples.png")
    with pytest.raises(OSError, match="file"):
        command.check_writable(tmp_path / "file" / "deeper" / "samples.png")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_check_writable_refuses_a_folder_without_permission(tmp_path, monkeypatch):
    def touch(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(command.Path, "touch", touch)  # as root, permissions stop nobody
    with pytest.raises(OSError, match="cannot write .*samples.png: Permission denied"):
        command.check_writable(tmp_path / "samples.png")
    assert names(tmp_path) == []


# ------------------------------------------------------------------------------------------------
# A command's end


@pytest.mark.parametrize(
    "error", [ValueError("a bad value"), OSError("a bad file"), FileNotFoundError("no file"),
              ConnectionError("no server"), PermissionError(13, "Permission denied", "file")],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        command.run(main)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {error}\n"
    assert printed.out == ""


def test_an_interruption_is_exit_code_130(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        command.run(main)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", [RuntimeError, KeyError, TypeError, AssertionError, IndexError])
def test_a_mistake_of_the_code_is_not_hidden(error):
    def main():
        raise error("a bug")

    with pytest.raises(error, match="a bug"):
        command.run(main)


def test_a_command_that_succeeds_just_returns(capsys):
    command.run(lambda: print("done"))
    assert capsys.readouterr() == ("done\n", "")


# ------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize("text, number", [("0", 0), ("7", 7), (str(2**63 - 1), 2**63 - 1)])
def test_seeds(text, number):
    assert command.seed(text) == number


@pytest.mark.parametrize("text", ["-1", "1.5", "", "one", "0x10", "²", str(2**63)])
def test_other_seeds_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="a seed is"):
        command.seed(text)


def test_model_flags_leave_what_the_model_decides_open():
    parser = argparse.ArgumentParser()
    command.add_model_flags(parser)
    args = vars(parser.parse_args([]))
    assert args.pop("model") == "digits"
    assert args.pop("seed") == 0
    assert set(args.values()) == {None}
    args = parser.parse_args(["--steps", "10", "--guidance", "4", "--seed", "3"])
    assert (args.steps, args.guidance, args.seed) == (10, 4.0, 3)


def test_a_warning_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards
    command.run(lambda: None)
    assert warnings.formatwarning("prompt cut", UserWarning, "x.py", 3) == "warning: prompt cut\n"


@pytest.mark.parametrize("library", [OSError, AttributeError])
def test_another_c_library_is_left_alone(monkeypatch, library):
    called = []

    def load(name):
        called.append(name)
        raise library

    monkeypatch.setattr(command.ctypes, "CDLL", load)
    command.run(lambda: called.append("main"))
    assert called == ["libc.so.6", "main"]


@pytest.mark.parametrize("text", ("nan", "inf", "-inf", "1e999", "", "one"))
def test_numbers_that_are_none_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        command.finite(text)
    assert command.finite("-2.5e-3") == -0.0025


@pytest.mark.parametrize("text", ("", " ", "\t"))
def test_empty_names_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        command.name(text)
    with pytest.raises(argparse.ArgumentTypeError):
        command.path(text)
    assert command.name("ddim:0.5") == "ddim:0.5" and command.path("a/b") == Path("a/b")


@pytest.mark.parametrize("error", (
    MemoryError("Unable to allocate 7 TiB"), torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
))
def test_a_lack_of_memory_is_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        command.run(main)
    line = capsys.readouterr().err
    assert caught.value.code == 2 and line.count("\n") == 1
    assert line.startswith("error: out of memory: try a smaller --batch-size")


MISSING_ON_MPS = ("The operator 'aten::_linalg_eigh' is not currently implemented for the MPS "
                  "device.\nAs a temporary fix, you can set the environment variable ...")


def test_what_torch_lacks_on_mps_is_one_line(capsys):
    def main():
        raise NotImplementedError(MISSING_ON_MPS)

    with pytest.raises(SystemExit) as caught:
        command.run(main)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: torch lacks an operation on mps: use --device cpu, or set "
                           "PYTORCH_ENABLE_MPS_FALLBACK=1")
    assert "aten::_linalg_eigh" in line

    def unfinished():
        raise NotImplementedError("not written yet")

    with pytest.raises(NotImplementedError):  # a fault of the code's own
        command.run(unfinished)


def test_each_kind_of_device_is_asked_in_its_own_words(monkeypatch):
    asked = []
    for kind, names in (("cuda", ("synchronize", "max_memory_allocated", "empty_cache")),
                        ("mps", ("synchronize", "driver_allocated_memory", "empty_cache"))):
        for name in names:
            monkeypatch.setattr(getattr(torch, kind), name,
                                lambda *device, words=f"{kind}.{name}": asked.append(words) or 7)
    for device in ("cuda:1", "mps", "cpu"):
        command.synchronize(device)
        peak = command.peak_memory(device)
        text.free_memory(torch.device(device))
        assert peak == 7 if device != "cpu" else peak is None or peak > 1e6
    assert asked == ["cuda.synchronize", "cuda.max_memory_allocated", "cuda.empty_cache",
                     "mps.synchronize", "mps.driver_allocated_memory", "mps.empty_cache"]



def test_a_message_is_one_line_and_commands_no_terminal(capsys):
    def main():
        raise ValueError("first\nsecond \x1b[31m red")

    with pytest.raises(SystemExit):
        command.run(main)
    assert capsys.readouterr().err == "error: first second \\x1b[31m red\n"


def test_a_path_that_the_console_cannot_print_is_no_failure(tmp_path):
    """The console of this child knows ASCII only."""
    code = "import command\ncommand.run(lambda: print('wrote \\u9f8d.png'))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent,
                            env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert answer.returncode == 0 and answer.stdout == b"wrote \\u9f8d.png\n"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_an_interruption_while_torch_is_imported_is_one_line():
    child = subprocess.Popen([sys.executable, "train_stepwise.py", "--model", "none"],
                             cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{child.pid}/maps").read_text():
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate()
    assert child.returncode == 130 and errors == "interrupted\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_threads_sleep_where_other_work_wants_the_cores():
    """In a child, because `startup` takes over Ctrl-C. Beside work for every core its threads are
    passive, unless the user says otherwise."""
    code = ("import os, startup\n"
            "print([startup.crowded(f'0.5 0.4 0.3 {n}/99 77', 8) for n in (1, 3, 4)])\n"
            "print(os.environ.get('OMP_WAIT_POLICY'))")
    clean = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    work = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
            for _ in range(2 * os.cpu_count())]
    try:
        lines = [subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent,
                                env={**clean, **more}, capture_output=True, text=True).stdout
                 for more in ({}, {"OMP_WAIT_POLICY": "active"})]
    finally:
        for process in work:
            process.kill()
    assert [line.split("\n")[:2] for line in lines] == [
        ["[False, False, True]", "passive"], ["[False, False, True]", "active"]]


def test_progress_where_there_is_no_terminal_is_lines(capsys, monkeypatch):
    """One every 30 seconds, by tqdm's clock, and none for work that is shorter."""
    now = [0.0]
    monkeypatch.setitem(sys.modules, "startup", object())  # as in a command
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for _ in command.progress(range(100), unit="step"):
        now[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4 and all("/100" in line and "step" in line for line in lines)
    for _ in command.progress(range(20), unit="step"):
        now[0] += 1
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for _ in command.progress(range(100), unit="step"):
        now[0] += 1
    assert capsys.readouterr().err == ""
