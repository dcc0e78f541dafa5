"""Runs the schedules of a folder of submissions on digits and sorts them by FID.

    python notebooks/assignments/a5_competition/leaderboard.py SUBMISSIONS --images 200

SUBMISSIONS/<name>/student.py is a submission. Its `make_schedule(model, seconds)` runs in a process
of its own, shut in as in grading (sandbox.py; the first line says how well), with one thread and
limits on processor time, memory and files. It must return a bool (T, K) table that computes all of
row 0 and reuses at least half of all cells. Anything else is refused, with a reason, and the other
submissions go on. Every schedule then makes the same images from the same noise. Three schedules to
compare with, shown in brackets, make them too.

With --images 200 a submission takes well under a minute on two free cores, without its own
--seconds. FID of so few images is biased upwards, equally for all: compare at equal numbers only.
For a final use `--images 2000 --seed` and a number that nobody knew.

The seconds in the table are those that the submission's process says; the system ends it after a
quarter more and two seconds. The limits of time need Linux or macOS, that of memory Linux.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import dataclasses  # noqa: E402 (from here on the project's modules are on the path)

import folders  # noqa: E402
import sandbox  # noqa: E402
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
LONGEST = 200  # characters of a reason
MOST_IMAGES, MOST_SECONDS, MOST_GIGABYTES = 50_000, 86_400, 1e6

def check(schedule, steps, branches):
    """Raises ValueError unless the schedule is bool (T, K), computes row 0, and reuses at least
    half of all T K branch evaluations."""
    if not isinstance(schedule, torch.Tensor):
        raise ValueError(f"a schedule is a bool tensor {(steps, branches)}, nothing else")
    if schedule.dtype != torch.bool or schedule.shape != (steps, branches):
        raise ValueError(f"a schedule is bool {(steps, branches)}, not "
                         f"{str(schedule.dtype).removeprefix('torch.')} {tuple(schedule.shape)}")
    if not schedule[0].all():
        raise ValueError("row 0 must compute every branch")
    reused = int((~schedule).sum())
    if 2 * reused < schedule.numel():
        raise ValueError(f"its CUR is {100 * reused / schedule.numel():.2f} %, below 50 %")


def ask(course, student, seconds, gigabytes, steps, branches):
    """Runs a submission -> its schedule, bool (T, K), and the processor time that it took.
    Raises ValueError with the reason if it returns no such schedule in time."""
    patience = 4 * seconds + 60  # more, as it may get less than a core
    try:
        with sandbox.Submission(course, student, patience, gigabytes * 1e9,
                                processor=1.25 * seconds + 1) as submission:
            answer = submission.probe("make_schedule", None, steps, branches, seconds)
    except sandbox.Failed as error:
        raise ValueError(str(error)) from error
    return accept(answer, seconds, steps, branches)


def accept(answer, seconds, steps, branches):
    """What a submission returned -> the schedule and the seconds, or ValueError."""
    if not isinstance(answer, list) or len(answer) != 2:
        raise ValueError("what it returned is no schedule")
    schedule, spent = answer
    check(schedule, steps, branches)
    if not isinstance(spent, float) or not 0 <= spent < MOST_SECONDS:  # nan is not either
        raise ValueError("the processor time that it claims is no time")
    if spent > 1.1 * seconds + 0.5:
        raise ValueError(f"it took {spent:.1f} s of processor time, not {seconds:g}")
    return schedule, spent


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
    with sandbox.Course(HERE, "everything") as course:
        print(f"Submissions run {course.words}.", flush=True)
        for student in submissions:
            name = command.one_line(student.parent.name)
            print(f"{name} ...", flush=True)
            try:
                if why := folders.trouble(student.parent):
                    raise ValueError(why)
                schedule, spent = ask(course, student, seconds, gigabytes, steps, branches)
                rows.append(score(name, schedule, spent))
            except (ValueError, OSError) as error:
                refused[name] = command.one_line(error)[:LONGEST]
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
    parser.add_argument("--memory", type=command.finite, default=4,
                        help="memory limit, GB beside torch (4)")
    args = parser.parse_args()
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
    command.run(main)
