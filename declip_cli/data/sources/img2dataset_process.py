"""Run img2dataset in a process of its own, because it writes to stdout and takes over signals."""

import json
import signal
import sys
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):
    # The archive writer of img2dataset imports torch if it is there, without need: five seconds in each of
    # the three or more processes that img2dataset starts.
    sys.modules["torch"] = None  # type: ignore[assignment]


def main() -> None:
    """Download what the settings file named on the command line says."""
    import img2dataset

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    img2dataset.download(**json.loads(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    main()
