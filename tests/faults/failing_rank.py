"""`declip`, with a rank that fails at its third step; run by a launcher: `torchrun … failing_rank.py pretrain …`."""

import os
import signal

from declip_cli.__main__ import main
from declip_cli.errors import DataError
from declip_cli.train import checkpoint, loop

_STEP = loop.take_step


def fail_at_step_3(training, rate):
    if training.step == 3 and os.environ.get("RANK") == os.environ["DECLIP_FAULT_RANK"]:
        kind = os.environ["DECLIP_FAULT"]
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "bug":
            raise ZeroDivisionError("a mistake of ours")
        raise DataError("this rank cannot read its data", remedy="mend the disk")
    return _STEP(training, rate)


def fail_to_evaluate(self):
    if os.environ.get("RANK") == os.environ["DECLIP_FAULT_RANK"]:
        raise DataError("this rank cannot read its data", remedy="mend the disk")
    return _SCORES(self)


_SCORES = checkpoint.Checkpointer.scores
if os.environ.get("DECLIP_FAULT") == "evaluation":
    checkpoint.Checkpointer.scores = fail_to_evaluate
elif os.environ.get("DECLIP_FAULT"):
    loop.take_step = fail_at_step_3

if __name__ == "__main__":
    main()
