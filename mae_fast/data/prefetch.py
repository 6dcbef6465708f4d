"""Batches on their device: on CUDA each is copied while the step before it computes."""

from collections.abc import Iterable, Iterator

import torch

from mae_fast.data.loader import Batch


class DevicePrefetch:
    """The batches of a loader, in order, with their frames on `device`.

    On CUDA they are copied on a stream of their own, which waits for no step, from pinned memory.
    `ahead()` fetches and copies the next one: call it when a step's work has been launched, and the
    host waits for the loader while the device computes. Elsewhere it does nothing, and a batch is
    fetched when it is asked for. What the loader raises is raised by the `next` it belongs to.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device):
        self.batches, self.device = iter(batches), device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.found: tuple[Batch, torch.cuda.Event] | Exception | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.stream is None:
            return next(self.batches).to(self.device)
        self.ahead()
        found, self.found = self.found, None
        if isinstance(found, Exception):
            raise found
        batch, copied = found
        now = torch.cuda.current_stream(self.device)
        now.wait_event(copied)
        # Their memory is the copying stream's: it is not given to a later batch before this stream
        # has read it.
        batch.flat.record_stream(now)
        batch.placed.record_stream(now)
        return batch

    def ahead(self) -> None:
        """Fetch the next batch and begin its copy, unless that has been done."""
        if self.stream is None or self.found is not None:
            return
        try:
            batch = next(self.batches)
        except Exception as e:  # StopIteration too
            self.found = e
            return
        with torch.cuda.stream(self.stream):
            batch = batch.to(self.device, non_blocking=True)
            self.found = batch, self.stream.record_event()
