"""The worker of a run: it subtracts the images that are committed, makes the maps of the others, and commits them in shards."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from camfn._errors import CamError
from camfn.runs import shards
from camfn.runs.decoding import Decoded, Decoder, batches, decoded
from camfn.runs.job import Job
from camfn.runs.making import Maker, failure
from camfn.runs.rows import Row
from camfn.runs.sources import Item
from camfn.zoo.networks import Network

LATEST = 300.0
"""Seconds after which a shard is committed, however few images it has: a kill loses no more."""
BYTES = 64 * 2**20
"""The bytes of the maps at which a shard is committed."""
HOPELESS = 32
"""The number of images in a row whose maps cannot be made that ends a run: a setting is wrong, or the device is broken."""


class Done(NamedTuple):
    """The number of images and failures that are committed, or are about to be."""

    images: int
    failures: int


class Worker:
    """Make and commit the maps of images."""

    def __init__(self, job: Job, network: Network, told: Callable[[Done], None] = lambda done: None) -> None:
        self._job, self._told = job, told
        self._maker, self._decoder = Maker(job, network), Decoder(network, job.views)

    def __call__(self, items: Iterable[Item], done: Collection[str] = (), stopped: Callable[[], bool] = lambda: False) -> Done:
        """Make the maps of the images that are not done, and commit them.

        - `stopped`: asked after each batch; if true, the rest is left.

        An exception, such as that of Ctrl-C, commits what was made before it is raised.
        """
        pending = _Pending(self._job)
        images = failures = 0
        found = decoded(_rest(items, done), self._decoder, self._job.workers)
        try:
            for batch in batches(found, self._job.batch):
                new = self._attempt(batch, pending)
                images, failures = images + new.images, failures + new.failures
                self._told(new)
                pending.commit_if_due()
                if stopped():
                    break
        finally:
            found.close()
            pending.commit()
        return Done(images, failures)

    def _attempt(self, batch: list[Decoded], pending: "_Pending") -> Done:
        """Make the maps of a batch. Images that were not decoded come in batches of their own."""
        failures = 0
        made = self._maker.rows(batch) if batch[0].x is not None else [each.error or "" for each in batch]
        for image, rows in zip(batch, made):
            if isinstance(rows, str):
                pending.fail(failure(image, rows), decoded=image.x is not None)
                failures += 1
            else:
                pending.add(rows)
        return Done(len(batch), failures)


def _rest(items: Iterable[Item], done: Collection[str]) -> Iterator[Item]:
    return (item for item in items if item.id not in done)


class _Pending:
    """Rows that are not committed yet."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._rows: list[Row] = []
        self._failed: list[Row] = []
        self._suspect: list[Row] = []  # failures of the model since an image went well: perhaps not the images' fault
        self._images, self._bytes, self._since = 0, 0, time.monotonic()

    def add(self, rows: list[Row]) -> None:
        self._rows += rows
        self._failed += self._suspect
        self._suspect = []
        self._images += 1
        self._bytes += sum(row.map.nbytes for row in rows if row.map is not None)

    def fail(self, row: Row, decoded: bool) -> None:
        (self._suspect if decoded else self._failed).append(row)
        if len(self._suspect) == HOPELESS:
            self._suspect = []
            raise CamError(f"{HOPELESS} images in a row failed, the last ({row.id!r}) with: {row.error}")

    def commit_if_due(self) -> None:
        late = time.monotonic() - self._since > LATEST
        if late or self._images >= self._job.every or self._bytes >= BYTES or len(self._failed) >= self._job.every:
            self.commit(suspects=False)

    def commit(self, suspects: bool = True) -> None:
        """Commit all rows. At the end, with the suspects."""
        if suspects:
            self._failed += self._suspect
            self._suspect = []
        if self._rows:
            shards.commit(self._job.out / shards.MAPS, self._rows, self._job.dtype)
        self._rows = []
        if self._failed:
            shards.commit(self._job.out / shards.FAILURES, self._failed, self._job.dtype)
        self._failed = []
        self._images, self._bytes, self._since = 0, 0, time.monotonic()
