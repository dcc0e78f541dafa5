"""Every command imports this before anything else: Ctrl-C while torch is loaded, which takes
seconds, ends in one line, as it does later (`command.run`)."""

import os
import signal


def end(*_):
    os.write(2, b"interrupted\n")
    os._exit(130)


signal.signal(signal.SIGINT, end)
