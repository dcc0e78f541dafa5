"""Every command imports this before anything else, above all before torch."""

import os
import signal
import sys


def crowded(load, cores):
    """Whether other work wants more than a quarter of the cores now. `load` is what Linux says in
    /proc/loadavg; its fourth word is how many threads want a core, this one among them."""
    running = int(load.split()[3].split("/")[0])
    return running - 1 > cores // 4


# torch's threads wait for each other by spinning, each on a core of its own. Passive threads sleep
# while they wait. Where other work wants the cores, sampling took four times as long with spinning;
# where there is none, training took a ninth more with sleeping (docs/PERFORMANCE.md). torch reads
# this once, when it is imported.
if sys.platform == "linux":
    with open("/proc/loadavg") as file:
        if crowded(file.read(), os.cpu_count()):
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def end(*_):
    os.write(2, b"interrupted\n")
    os._exit(130)


# Ctrl-C while torch is imported, which takes seconds, ends in one line, as later in `command.run`.
signal.signal(signal.SIGINT, end)
