"""Every command imports this before anything else, above all before torch."""

import os
import signal
import sys

# torch's threads wait for each other by spinning, each on a core of its own. If other processes
# want these cores, the work may take ten times as long. Passive threads sleep while they wait. This
# is read once, when torch is imported.
if sys.platform == "linux":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def end(*_):
    os.write(2, b"interrupted\n")
    os._exit(130)


# Ctrl-C while torch is imported, which takes seconds, ends in one line, as later in `command.run`.
signal.signal(signal.SIGINT, end)
