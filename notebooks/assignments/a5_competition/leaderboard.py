"""Runs the schedules of a folder of submissions on digits and sorts them by FID.

    python notebooks/assignments/a5_competition/leaderboard.py SUBMISSIONS --images 200

SUBMISSIONS/<name>/student.py is a submission. Its `make_schedule(model, seconds)` runs in a process
of its own, with one thread and limits on processor time and memory. It must return a bool (T, K)
table that computes all of row 0 and reuses at least half of all cells. Anything else is refused,
with a reason, and the other submissions go on. Every schedule then makes the same images from the
same noise. Three schedules to compare with, shown in brackets, make them too.

With --images 200 a submission takes well under a minute on two free cores, without its own
--seconds. FID of so few images is biased upwards, equally for all: compare at equal numbers only.
For a final use `--images 2000 --seed` and a number that nobody knew.

This is no sandbox: a submission runs as you and can read and write your files. Run strangers' code
in a container. The time limit needs Linux or macOS, the memory limit Linux.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parents[1])]

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import argparse  # noqa: E402 (from here on the project's modules are on the path)
import contextlib  # noqa: E402
import dataclasses  # noqa: E402
import importlib.util  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402

import folders  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import command  # noqa: E402
import features  # noqa: E402
import metrics  # noqa: E402
import models  # noqa: E402
import pictures  # noqa: E402
import router  # noqa: E402
from cache import Cache  # noqa: E402
from samplers import Noise, denoise, make_sampler  # noqa: E402

BATCH = 50
TO_COMPARE = ("none", "fora-paper:2", "random:0.5")
MOST_IMAGES, MOST_SECONDS, MOST_GIGABYTES = 50_000, 86_400, 1e6

# ------------------------------------------------------------------------------------------------
# In the submission's own process


def limit_process(seconds, gigabytes):
    """Limits this process: its processor time from now on, its memory and the files it writes."""
    try:
        import resource
    except ImportError:  # Windows
        return
    processor = math.ceil(time.process_time() + 1.25 * seconds + 1)
    limits = {
        resource.RLIMIT_CPU: (processor, processor + 1),  # SIGXCPU, which `ask` knows; SIGKILL
        resource.RLIMIT_DATA: (int(gigabytes * 1e9),) * 2,
        resource.RLIMIT_FSIZE: (10**8, 10**8),
        resource.RLIMIT_CORE: (0, 0),
    }
    for kind, limit in limits.items():
        with contextlib.suppress(ValueError, OSError):  # a platform without this limit
            resource.setrlimit(kind, limit)


def compute(student, out, seconds, gigabytes):
    """Calls the submission and writes its schedule and the seconds it took, as an npz."""
    model = models.load("digits", device="cpu")
    limit_process(seconds, gigabytes)
    start = time.process_time()
    spec = importlib.util.spec_from_file_location("student", student)
    module = importlib.util.module_from_spec(spec)
    sys.modules["student"] = module
    spec.loader.exec_module(module)
    schedule = module.make_schedule(model, seconds)
    np.savez(out, schedule=np.asarray(schedule), seconds=time.process_time() - start)


# ------------------------------------------------------------------------------------------------
# In our process


def check(schedule, steps, branches):
    """Raises ValueError unless the schedule is bool (T, K), computes row 0, and reuses at least
    half of all T K branch evaluations."""
    if schedule.dtype != bool or schedule.shape != (steps, branches):
        raise ValueError(f"a schedule is bool {(steps, branches)}, not {schedule.dtype} "
                         f"{schedule.shape}")
    if not schedule[0].all():
        raise ValueError("row 0 must compute every branch")
    reused = int((~schedule).sum())
    if 2 * reused < schedule.size:
        raise ValueError(f"its CUR is {100 * reused / schedule.size:.2f} %, below 50 %")


def ask(student, seconds, gigabytes, steps, branches):
    """Runs a submission -> its schedule, bool (T, K), and the processor time that it took.
    Raises ValueError with the reason if it returns no such schedule in time."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        out, errors = Path(folder) / "schedule.npz", Path(folder) / "errors.txt"
        arguments = [sys.executable, __file__, "--compute", student.resolve(), out,
                     "--seconds", seconds, "--memory", gigabytes]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                       "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
        with errors.open("wb") as stream:
            process = subprocess.Popen(
                [str(argument) for argument in arguments], cwd=folder, env=environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stream,
                start_new_session=True,
            )  # fmt: skip
            try:
                process.wait(timeout=4 * seconds + 60)  # more, as it may get less than a core
            except subprocess.TimeoutExpired as error:
                raise ValueError("it did not end: is it waiting for something?") from error
            finally:
                end(process)
        if process.returncode == -getattr(signal, "SIGXCPU", 0) != 0:
            raise ValueError(f"it took more than {seconds:g} s of processor time")
        if process.returncode != 0 or not out.is_file():
            raise ValueError(reason(errors, process.returncode))
        if out.stat().st_size > 10**6:
            raise ValueError("what it returned is no schedule: it has more than 1 MB")
        try:
            with np.load(out, allow_pickle=False) as data:
                schedule, spent = data["schedule"], float(data["seconds"])
        except Exception as error:  # the file holds whatever the submission put there
            raise ValueError("what it returned is not an array of numbers") from error
    check(schedule, steps, branches)
    if spent > 1.1 * seconds + 0.5:
        raise ValueError(f"it took {spent:.1f} s of processor time, not {seconds:g}")
    return torch.from_numpy(schedule), spent


def end(process):
    """Ends a process and the processes that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def reason(errors, code):
    """The last line of a process's error output: of a traceback, this is the exception."""
    lines = errors.read_bytes()[-4000:].decode(errors="replace").strip().splitlines()
    text = lines[-1] if lines else f"it ended the process (exit code {code})"
    return "".join(letter if letter.isprintable() else " " for letter in text)[:110]


@torch.no_grad()
def sample(model, schedule, count, seed):
    """`count` images of random digits, with the same noise and labels for every schedule: x_0
    (N, 1, 28, 28)."""
    sampler, parts = make_sampler(model.sampler, model.steps), []
    for first in range(0, count, BATCH):
        noise = Noise(seed, range(first, min(first + BATCH, count)))
        x = noise.start(model.shape, model.device)
        condition = model.condition(noise.labels(10))
        cache = None if schedule.all() else Cache(schedule)
        parts.append(denoise(model.network, sampler, x, condition, model.guidance, cache))
    return torch.cat(parts)


@dataclasses.dataclass
class Row:
    """A line of the table."""

    name: str
    fid: float
    cur: float
    error: float  # mean square difference to the images without a cache, pixels in [-1, 1]
    seconds: float | None


def rank(submissions, images, seed, seconds, gigabytes):
    """-> the rows, sorted by FID, and {name: reason} of the submissions that were refused."""
    model, network = models.load("digits"), features.load("digits")
    steps, branches = model.steps, len(model.network.branches)
    reference = metrics.statistics_of("digits", network)
    full = sample(model, router.none(steps, branches), images, seed)

    def score(name, schedule, spent=None):
        x = full if schedule.all() else sample(model, schedule, images, seed)
        fid = metrics.evaluate(pictures.to_pixels(x), reference, ["fid"], network)["fid"]
        error = (x - full).double().square().mean().item()
        return Row(name, fid, router.cur(schedule), error, spent)

    named = [(name, router.named(name, steps, branches)) for name in TO_COMPARE]
    rows, refused = [score(f"({name})", schedule) for name, schedule in named], {}
    for student in submissions:
        name = command.one_line(student.parent.name)
        print(f"{name} ...", flush=True)
        try:
            if why := folders.trouble(student.parent):
                raise ValueError(why)
            schedule, spent = ask(student, seconds, gigabytes, steps, branches)
            rows.append(score(name, schedule, spent))
        except (ValueError, OSError) as error:
            refused[name] = str(error)
    return sorted(rows, key=lambda row: row.fid), refused


def table(rows, refused):
    """The leaderboard as text. The schedules to compare with have no place."""
    lines, place = [f"{'':4}{'submission':24}{'FID':>8}{'CUR %':>8}{'error':>10}{'seconds':>9}"], 0
    for row in rows:
        place += row.seconds is not None
        number = "" if row.seconds is None else f"{place}."
        spent = "" if row.seconds is None else f"{row.seconds:.1f}"
        lines.append(f"{number:4}{row.name[:23]:24}{row.fid:8.3f}{100 * row.cur:8.2f}"
                     f"{row.error:10.5f}{spent:>9}")
    return "\n".join(lines + [f"{name[:23]}: refused: {why}" for name, why in refused.items()])


def main():
    parser = command.Parser(__doc__)
    parser.add_argument("submissions", type=command.path, nargs="?",
                        help="a folder of NAME/student.py")
    parser.add_argument("--images", type=int, default=200, help="for FID and the error (200)")
    parser.add_argument("--seed", type=command.seed, default=0, help="of the noise (0)")
    parser.add_argument("--seconds", type=command.finite, default=30,
                        help="processor time for a schedule (30)")
    parser.add_argument("--memory", type=command.finite, default=4, help="memory limit, GB (4)")
    parser.add_argument("--compute", nargs=2, help=argparse.SUPPRESS)  # how `ask` starts it
    args = parser.parse_args()
    if args.compute:
        return compute(*args.compute, args.seconds, args.memory)
    for flag, value, least, most in (
        ("images", args.images, 2, MOST_IMAGES), ("seconds", args.seconds, 0.01, MOST_SECONDS),
        ("memory", args.memory, 0.01, MOST_GIGABYTES),
    ):
        if not least <= value <= most:
            raise ValueError(f"--{flag} must be from {least} to {most:g}, not {value:g}")
    if args.submissions is None:
        raise ValueError("name a folder of submissions: one is NAME/student.py")
    submissions = [args.submissions / name / "student.py"
                   for name in folders.names_in(args.submissions)]
    rows, refused = rank(submissions, args.images, args.seed, args.seconds, args.memory)
    print(f"\n{args.images} images each\n{table(rows, refused)}")


if __name__ == "__main__":
    if "--compute" in sys.argv:  # let a submission's error print its traceback: `reason` reads it
        main()
    else:
        command.run(main)
