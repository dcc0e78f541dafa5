"""A submission in a process of its own, for grading and for the leaderboard; and the same without
one, for a student's own tests.

The process that grades sends a function's name and its arguments, and gets plain data back
(messages.py). It never imports the submission. The submission's process has a copy of the modules
that the assignment needs and of runner.py, and nothing else of the repository. How well it is shut
in depends on the system: `ways` lists it, `find_way` tries what works here.
"""

import ast
import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(HERE)) if path not in sys.path]

import messages  # noqa: E402

import command  # noqa: E402

TEMPORARY = "harmonica-grading.{}."  # the temporary folders' prefix, with the number of the process
OUT_OF_TIME = 124  # the exit code that runner.py then has
START_LIMIT = 300  # seconds until a process has imported the modules
NOBODY = 65534
KEPT = "PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT"  # of the environment

# ------------------------------------------------------------------------------------------------
# The copy of the repository, and the process around a submission

# Makes a root folder with what Python needs, the course and an own folder /work, and nothing else.
# $1 an empty folder, $2 student.py, then the readable places, --, and the command.
SHUT_IN = r"""
set -e; umask 022; root=$1 student=$2; shift 2
mount -t tmpfs -o size=64m,nr_inodes=10000,mode=755 none "$root"
mkdir -m 777 "$root/work" "$root/proc" "$root/dev"
cp "$student" "$root/work/student.py"
mount -t proc proc "$root/proc"
for device in /dev/null /dev/urandom; do
    touch "$root$device"; mount --bind $device "$root$device"
done
while [ "$1" != -- ]; do
    mkdir -p "$root$(dirname "$1")"
    if [ -L "$1" ]; then cp -P "$1" "$root$1"; shift; continue; fi
    if [ -d "$1" ]; then mkdir -p "$root$1"; else touch "$root$1"; fi
    mount --bind "$1" "$root$1"
    mount -o remount,bind,ro,nosuid,nodev "$root$1"
    shift
done
shift; cd "$root"; exec chroot "$root" "$@"
"""
POWERLESS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
NAMESPACES = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--ipc", "--pid",
              "--fork", "--kill-child"]
AS_NOBODY = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
WALLED = ("behind walls of the system: a submission sees Python, the course's modules and its own "
          "64 MB; no other file, no other process, no network")
OTHER = ("as the user nobody: a submission cannot write your files or end your processes, but it "
         "can read what everyone may read")
OPEN = ("as you: Python refuses other files, processes and the network, but code that gets round "
        "Python is not stopped; grade strangers' code as root, with unshare, or in a container")


def ways():
    """How a process can be shut in, the strictest first: (the words, the command before it or None,
    the command before Python, the user's number or None)."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if sys.platform == "linux" and all(map(shutil.which, ("unshare", "setpriv", "chroot"))):
        if root:
            yield WALLED, NAMESPACES, [*POWERLESS, *AS_NOBODY], None
        else:
            yield WALLED, [*NAMESPACES, "--user", "--map-root-user"], POWERLESS, None
    if root:
        yield OTHER, None, [], NOBODY
    yield OPEN, None, [], None


def python():
    """The command of this Python without links in its path, and the folders that it needs."""
    prefix = os.path.realpath(sys.prefix)
    executable = os.path.join(prefix, os.path.relpath(sys.executable, sys.prefix))
    places = [prefix, os.path.realpath(sys.base_prefix), "/usr", "/lib", "/lib64", "/bin",
              "/etc/ld.so.cache", "/sys/devices/system/cpu"]
    return executable, [place for place in dict.fromkeys(places) if os.path.exists(place)]


def imported(names):
    """The project's modules of these names and those that they import, as files."""
    found, names = [], list(names)
    for name in names:
        file = ROOT / f"{name.replace('.', '/')}.py"
        if file.is_file() and file not in found:
            found.append(file)
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names += [alias.name for alias in getattr(node, "names", ())
                          if isinstance(node, ast.Import)]
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
    return found


class Course:
    """What the submissions of one assignment run with: a folder with a copy of the modules `needs`
    and of probes.py, and the way in which processes are shut in here. `needs` "everything" copies
    every module, the data and the models.

    `with Course(...) as course:` removes the folder at the end. Raises OSError if the Python that
    submissions run with holds all modules already.
    """

    def __init__(self, assignment, needs, way=None):
        clear_left_behind()
        if needs != "everything" and (Path(sysconfig.get_path("purelib")) / "proxy.py").is_file():
            raise OSError("`pip install .` put all modules into this Python, so that a submission "
                          "could import what it is to write: grade with another environment")
        self.folder = Path(tempfile.mkdtemp(prefix=TEMPORARY.format(os.getpid())))
        self.folder.chmod(0o755)  # nobody has to read it
        self.copy = self.folder / "course"
        self.copy.mkdir()
        files, named = [HERE / "runner.py", HERE / "messages.py"], list(needs)
        if needs == "everything":
            files, named = [*files, *ROOT.glob("*.py")], []
            for name in ("data", "checkpoints", "experiments"):
                shutil.copytree(ROOT / name, self.copy / name)
        self.modules = ["torch", *named] if needs else []  # imported before student.py
        if (assignment / "probes.py").is_file():
            files.append(assignment / "probes.py")
            self.modules.append("probes")
        for file in [*files, *imported(named)]:
            shutil.copy(file, self.copy)
        for path in [self.copy, *self.copy.rglob("*")]:
            path.chmod(0o755)  # even if the lecturer's own files are not for everyone
        self.words, *self.way = way or find_way(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.folder, ignore_errors=True)


def find_way(course):
    """The strictest of `ways` in which an empty submission runs here."""
    student = course.folder / "student.py"
    student.write_text("")
    modules, course.modules = course.modules, []
    try:
        for way in ways():
            course.words, *course.way = way
            with contextlib.suppress(Failed, OSError), Submission(course, student, 30, 2**30):
                return way
    finally:
        course.modules = modules
    raise OSError("no process for a submission can be started here")


def clear_left_behind():
    """Removes the temporary folders of a grading that was killed."""
    for path in Path(tempfile.gettempdir()).glob(TEMPORARY.format("*") + "*"):
        process = path.name.split(".")[1]
        if process.isdecimal() and not command.is_running(int(process)):
            shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------------------------------------
# Asking


class Failed(Exception):
    """What went wrong in a submission, in words for its author."""


class Ended(Failed):
    """Its process is gone."""


class Asked:
    """`asked.v_step(x, v)` calls v_step of student.py, and checks that the arguments stay as they
    are. `asked.probe(name, ...)` calls a function of probes.py, which gets student.py's module
    first. Arguments and results are plain data. Raises ValueError if the submission does, else
    Failed."""

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments: self.ask(name, arguments, probe=False)

    def probe(self, name, *arguments):
        return self.ask(name, arguments, probe=True)


def check_unchanged(name, before, after):
    for number, (old, new) in enumerate(zip(before, after, strict=True), 1):
        if not equal(old, new):
            raise Failed(f"{name} changed its argument {number} in place: work on a copy")


def equal(a, b):
    """Whether two values of plain data are the same."""
    if hasattr(a, "equal"):
        return hasattr(b, "equal") and a.dtype == b.dtype and a.equal(b)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Local(Asked):
    """student.py and probes.py of a folder, imported here: for a student's own tests."""

    def __init__(self, folder, needs):
        self.folder = folder
        check_imports(folder / "student.py", needs)
        sys.path.insert(0, str(folder))
        for name in ("student", "probes"):
            sys.modules.pop(name, None)
        self.module = importlib.import_module("student")
        self.probes = importlib.import_module("probes")

    def ask(self, name, arguments, probe):
        sent = messages.copy(arguments)
        if probe:
            result = getattr(self.probes, name)(self.module, *sent)
        else:
            result = getattr(self.module, name)(*sent)
            check_unchanged(name, arguments, sent)
        try:
            return messages.copy(result)
        except Exception as error:  # not plain, or an object that does not say what it is
            raise Failed(f"TypeError: {name} returned {error}") from None


def check_imports(file, needs):
    """Raises Failed if a student.py imports a module of the repository that grading leaves out."""
    if needs == "everything":
        return
    allowed = {path.stem for path in imported(needs)}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            if (ROOT / f"{name}.py").is_file() and name not in allowed:
                raise Failed(f"student.py imports {name}, which is not there in grading; of this "
                             f"repository's modules {', '.join(sorted(allowed))} are")


class Submission(Asked):
    """A student.py in a process of its own, which has `seconds` for its import, later what `give`
    gives it, and `memory` bytes beside the modules'; with `processor`, so many seconds of processor
    time in all. Raises Failed or ValueError if student.py cannot be imported.

    `with Submission(...) as submission:` ends the process, and those that it started.
    """

    def __init__(self, course, student, seconds, memory, processor=0):
        self.late, self.number, self.processor = False, 0, processor
        self.give(seconds)
        self.folder = Path(tempfile.mkdtemp(prefix="one.", dir=course.folder))
        self.folder.chmod(0o755)
        own = self.folder / "work"
        own.mkdir()
        shutil.copyfile(student, own / "student.py")
        for path in (own, own / "student.py"):
            path.chmod(0o755)
        outer, inner, user = course.way
        executable, places = python()
        words, options = [*inner, executable, "-B", str(course.copy / "runner.py")], {}
        if outer is not None:
            root = self.folder / "root"
            root.mkdir()
            words = [*outer, "sh", "-c", SHUT_IN, "sh", str(root), str(own / "student.py"),
                     *places, str(course.copy), "--", *words]
            own = Path("/work")
        elif user is not None:
            os.chown(own, user, user)
            options = {"user": user, "group": user, "extra_groups": []}
        self.process = subprocess.Popen(
            words, cwd=self.folder, env=environment(own), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, **options)
        settings = {"modules": course.modules, "folder": str(own), "memory": int(memory),
                    "processor": processor, "readable": [
                        *places, str(course.copy), "/proc/self", "/proc/cpuinfo", "/dev/urandom"]}
        try:
            self._result("the start", self._reply(START_LIMIT, settings))
            self.give(seconds)
            self._result("import", self._reply(self.seconds()))
        except BaseException:
            self.close()
            raise

    def give(self, seconds):
        """Sets the time until which answers must have come."""
        self.deadline = time.monotonic() + seconds

    def seconds(self):
        return max(0.0, self.deadline - time.monotonic())

    def ask(self, name, arguments, probe):
        self.number += 1
        reply = self._reply(self.seconds(), {"number": self.number, "name": name,
                                             "arguments": arguments, "probe": probe})
        if reply.get("number") != self.number:  # something else wrote: nothing after it counts
            end(self.process)
            raise Ended(f"{name} gave no answer")
        result = self._result(name, reply)
        if not probe:
            check_unchanged(name, arguments, reply["arguments"])
        return result

    def _reply(self, seconds, request=None):
        """Writes the request, if any -> the next reply. Raises Failed if it does not come in time
        (a process that does not read what is written to it counts as late too), or is none."""
        timer = threading.Timer(seconds, self._too_late)
        timer.start()
        try:
            if request is not None:
                with contextlib.suppress(OSError):  # it has ended: reading tells how
                    messages.write(self.process.stdin, request)
            reply = messages.read(self.process.stdout)
        except EOFError:
            end(self.process)
            raise Ended(self._why()) from None
        except ValueError as error:
            end(self.process)
            raise Ended(f"what it returned is not plain data ({error})") from None
        finally:
            timer.cancel()
        if not isinstance(reply, dict):
            end(self.process)
            raise Ended("what it returned is no answer")
        return reply

    def _too_late(self):
        self.late = True
        kill(self.process)

    def _why(self):
        code = self.process.returncode
        if self.late:
            return "it took more than the time limit"
        if code == OUT_OF_TIME and self.processor:
            return f"it took more than {self.processor:g} s of processor time"
        if code == -getattr(signal, "SIGKILL", 0) or code == 1:  # 1: what unshare says of it
            return "it ended, or the system ended it at a limit (memory, threads)"
        return f"it ended the process (exit code {code})"

    def _result(self, name, reply):
        if "error" in reply:
            kind, words = (str(reply.get(key))[:500] for key in ("error", "message"))
            if kind == "ValueError":
                raise ValueError(words)
            if kind == "SystemExit":
                raise Failed("it ended the process (sys.exit)")
            line = reply.get("line")
            where = f" (student.py, line {line})" if isinstance(line, int) else ""
            raise Failed(f"{kind}: {words}{where}")
        if "result" not in reply or not isinstance(reply.get("arguments"), list):
            raise Failed(f"{name} gave no answer")
        return reply["result"]

    def close(self):
        end(self.process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def environment(folder):
    """The variables that a submission sees: none of the lecturer's own. One thread; sets keep their
    order, so that a message stays the same."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**{name: os.environ[name] for name in KEPT if name in os.environ},
            **dict.fromkeys(threads, "1"), "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0",
            "HOME": str(folder), "TMPDIR": str(folder)}


def kill(process):
    """Kills a process and those of its group. In a namespace of its own, all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def end(process):
    if process.returncode is None:  # later its number may be another's
        kill(process)
        process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            stream.close()
