"""Batches on the device; a GPU copies the next one while it works on the present one."""

from collections.abc import Iterator

import torch

from declip_cli.batch import Batch


class DeviceBatches(Iterator[Batch]):
    """Move batches of a stream to a device.

    A batch that was copied ahead has left the stream: only copy ahead where a step on it follows for certain, or
    the stream's position counts a batch that nobody has learned from.

    Args:
        source: batches in page-locked memory, or on the CPU if the device is none.
        device: where they are wanted.
    """

    def __init__(self, source: Iterator[Batch], device: torch.device) -> None:
        self._source, self._device = source, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: Batch | None = None

    def copy_ahead(self) -> None:
        """Start to copy the next batch, beside what the device has to do already; does nothing on a CPU."""
        if self._copies is not None and self._next is None:
            self._next = self._copied()

    def __next__(self) -> Batch:
        batch = self._copied() if self._next is None else self._next
        self._next = None
        if self._copies is not None:
            present = torch.cuda.current_stream(self._device)
            present.wait_stream(self._copies)
            for value in batch.on_device():
                value.record_stream(present)  # else its memory would be given to the next copy while it is read
        return batch

    def _copied(self) -> Batch:
        # The source marks in the stream of copies when the memory of its last batch may be written again.
        with torch.cuda.stream(self._copies):
            return next(self._source).to(self._device)
