"""Downloads of published weights. A failure is reported soon and in one sentence, and nothing else is printed."""

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch

from camfn._errors import CamError


def downloaded(url: str) -> Path:
    """Return the file in torch's cache, downloaded if needed. camfn reads it itself, since torchvision unpickles any object."""
    name = Path(urlparse(url).path).name
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not file.is_file():
        digits = re.search(r"-([a-f0-9]+)\.", name)
        with fetching(url, "give a weight file, or random weights (--no-pretrained)"):
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), digits and digits[1], progress=sys.stderr.isatty())
    return file


@contextmanager
def hub(name: str, hint: str) -> Iterator[None]:
    """Use only the cache if the hub does not answer. huggingface_hub would retry each file six times, for 23 seconds."""
    from huggingface_hub import constants, get_session

    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # else transformers asks the hub to convert weights
    before, silence = constants.HF_HUB_OFFLINE, None
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        constants.HF_HUB_OFFLINE, silence = True, error
    try:
        with fetching(name, hint, silence):
            yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def fetching(what: str, hint: str, silence: Exception | None = None) -> Iterator[None]:
    """Turn a failed download into a CamError. `silence` is the known reason why the hub does not answer."""
    try:
        yield
    except Exception as error:
        cause = next(filter(_is_network_error, chain(error)), error if silence and isinstance(error, OSError) else None)
        if cause is None:
            raise
        raise CamError(f"{what} cannot be fetched ({line(silence or cause)}): {hint}") from error


def _is_network_error(error: BaseException) -> bool:
    library = type(error).__module__.partition(".")[0]
    clients = ("huggingface_hub", "httpx", "httpx2", "requests")
    return library in clients or isinstance(error, (URLError, ConnectionError, TimeoutError))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def line(error: BaseException) -> str:
    """Return the type of the error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


# ---------------------------------------------------------------------------------------------------------- silence


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and logs of the libraries. What torch prints of a download is shown on a terminal only."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(sys.stderr if sys.stderr.isatty() else io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable()  # for all loggers, since a library's import sets the level of its own
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def bars(logging: Any, wanted: bool) -> Iterator[None]:
    """Show transformers' progress bars only for downloads on a terminal."""
    enabled = logging.is_progress_bar_enabled()
    if not (wanted and sys.stderr.isatty()):
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
