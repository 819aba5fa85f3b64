"""The progress line of a run: images, rate, time left and failures. Nothing is shown where stderr is not a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from camfn.runs.worker import Done


@contextmanager
def line(total: int | None, hidden: bool) -> Iterator[Callable[[Done], None]]:
    """Yield a function that is told how many more images are done."""
    from tqdm import tqdm

    failures = 0
    with tqdm(total=total, unit="image", file=sys.stderr, disable=hidden or None, smoothing=0.05) as bar:

        def told(done: Done) -> None:
            nonlocal failures
            failures += done.failures
            bar.set_postfix_str(f"{failures} failed" if failures else "", refresh=False)
            bar.update(done.images)

        yield told
