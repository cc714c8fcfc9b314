"""Run img2dataset in a process of its own, because it writes to stdout and takes over signals."""

import json
import os
import signal
import sys
import threading
import time

if __name__ in ("__main__", "__mp_main__"):
    # It imports these if they are there, without need: seconds in each of its processes.
    sys.modules |= {"torch": None, "ray": None}  # type: ignore[dict-item]


def _end_with(parent: int) -> None:
    """End all processes of the download when the one that asked for it was killed: its next run starts another."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    """Download what the settings on the command line say."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    import img2dataset

    img2dataset.download(**json.loads(sys.argv[1]))


if __name__ == "__main__":
    main()
