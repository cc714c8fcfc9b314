"""Names of before for what `dataset.py` defines."""

from declip_cli.data.dataset import UNREAD
from declip_cli.data.dataset import Dataset as SampleStore
from declip_cli.data.dataset import Example as RawSample

__all__ = ["UNREAD", "RawSample", "SampleStore"]
