"""The process of a submission: imports student.py, calls its functions, answers with plain data.
sandbox.py starts it and asks; the process that asks imports nothing of a submission.

What is said here cannot be trusted, for the submission can change it. It only gains nothing: the
right answers are not here, and no verdict is.
"""

import contextlib
import ctypes
import importlib
import os
import signal
import sys
import traceback

import messages

OUT_OF_TIME = 124  # the exit code
FILE_BYTES = 10_000_000  # of a file that it writes
FILES = 64  # open at once: files without a name take memory that no other limit counts
REFUSED = ("subprocess.Popen", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn",
           "os.system", "os.startfile", "os.kill", "os.killpg", "socket.__new__",
           "socket.getaddrinfo", "socket.gethostbyname", "sqlite3.connect", "ctypes.dlopen",
           "ctypes.dlsym", "ctypes.dlsym/handle", "os.chown", "os.chmod")
READS = ("os.listdir", "os.scandir", "os.chdir")
WRITES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
          "os.utime", "shutil.rmtree", "shutil.move", "shutil.copyfile")
TWO_PATHS = "os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile"


def limit(memory, processor):
    """Limits what this process takes from now on, where the system can: `memory` bytes more, no
    further process or thread, few and small files; with `processor`, as many seconds of processor
    time."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {"RLIMIT_DATA": memory, "RLIMIT_NPROC": 0, "RLIMIT_FSIZE": FILE_BYTES,
              "RLIMIT_NOFILE": FILES, "RLIMIT_CORE": 0}
    if sys.platform == "linux":  # maps of shared memory count too
        with open("/proc/self/statm") as file:
            limits["RLIMIT_AS"] = int(file.read().split()[0]) * resource.getpagesize() + memory
    for name, number in limits.items():
        with contextlib.suppress(ValueError, OSError, AttributeError):  # a system without it
            resource.setrlimit(getattr(resource, name), (number, number))
    if processor:
        used = resource.getrusage(resource.RUSAGE_SELF)
        number = int(used.ru_utime + used.ru_stime + processor + 1)
        signal.signal(signal.SIGXCPU, lambda *_: os._exit(OUT_OF_TIME))
        resource.setrlimit(resource.RLIMIT_CPU, (number, number + 1))


def guard(readable, folder):
    """Has Python refuse what a solution never needs: other processes, the network, files outside
    `readable`, writing outside `folder`. Code that is not Python can still do all of that: where
    the system has walls, they are around this process as well."""
    readable = [os.path.realpath(path) for path in (*readable, folder)]
    folder = os.path.realpath(folder)

    def within(path, places):
        path = os.path.realpath(os.fsdecode(path))
        return path == os.devnull or any(
            path == place or path.startswith(place + os.sep) for place in places)

    def hook(event, arguments):
        if event in REFUSED:
            raise PermissionError(f"a submission must not use {event}")
        if event != "open" and event not in READS + WRITES:
            return
        writes = event in WRITES
        if event == "open":
            mode, flags = arguments[1:3]
            writes = any(letter in (mode or "") for letter in "wax+") or bool(
                (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        for path in arguments[: 2 if event in TWO_PATHS else 1]:
            if path is None or isinstance(path, int):
                continue
            if writes and not within(path, [folder]):
                raise PermissionError(f"a submission must not write {path}, outside its folder")
            if not within(path, readable):
                raise PermissionError(f"a submission must not read {path}")

    sys.addaudithook(hook)


def end_with_parent():
    """On Linux: when the process that asks is killed, this one is too."""
    PR_SET_PDEATHSIG = 1
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def described(error):
    """An exception as plain data: its type, its words, and the line of student.py."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if os.path.basename(frame.filename) == "student.py"]
    kind, text = type(error).__name__, str(error)[:2000]
    return {"error": str(kind), "message": text, "line": lines[-1] if lines else None}


def answer(places, request):
    """Calls what the request names. -> a dict of plain data: the request's number, the result, and
    the arguments as they are after the call; or the error."""
    number = request["number"]
    try:
        if request["probe"]:
            function = getattr(places["probes"], request["name"])
            arguments = [places["student"], *request["arguments"]]
        else:
            function = getattr(places["student"], request["name"])
            arguments = request["arguments"]
        result = function(*arguments)
        return {"number": number, "result": result, "arguments": request["arguments"]}
    except BaseException as error:  # what it raises is its own affair, SystemExit too
        return {"number": number, **described(error)}


def say(stream, reply):
    """Writes a reply. If it holds more than plain data, an error takes its place."""
    try:
        messages.write(stream, reply)
    except Exception as error:  # the submission's own objects are asked what they are
        messages.write(stream, {"number": reply["number"], "error": "TypeError",
                                "message": f"it returned {error}", "line": None})


def main():
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what a submission prints must not mix with the replies
        os.dup2(null, descriptor)
    end_with_parent()
    settings = messages.read(requests)
    places = {}
    try:
        for name in settings["modules"]:
            places[name] = importlib.import_module(name)
        sys.path.insert(0, settings["folder"])
        os.chdir(settings["folder"])
        say(replies, {"result": None, "arguments": []})
        limit(settings["memory"], settings["processor"])
        guard(settings["readable"], settings["folder"])
        places["student"] = importlib.import_module("student")
        say(replies, {"result": None, "arguments": []})
    except BaseException as error:
        say(replies, described(error))
        return
    with contextlib.suppress(EOFError):
        while True:
            say(replies, answer(places, messages.read(requests)))


if __name__ == "__main__":
    main()
