"""The payload store: what is too large for a message leaves it as a claim, and waits here.

    open_store("file:///srv/payloads")      a folder that publishers and workers share
    open_store("s3://bucket/prefix")        a bucket, by way of obstore: brokertask[s3]

Content has the name of its own SHA-256, so equal content is stored once, and a claim can lead to
nothing but what it was given for. Nothing is ever deleted here: a dead run may come back.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import ClassVar, Final, Protocol, TypeVar
from urllib.parse import unquote

import anyio.to_thread

from brokertask.claim import Claim
from brokertask.errors import ConfigurationError, PayloadUnavailable

T = TypeVar("T")

CONNECT_TIMEOUT: Final = timedelta(seconds=5)
REQUEST_TIMEOUT: Final = timedelta(seconds=60)
"""For one request to S3, its content included; and for how long failed ones are repeated."""
MAX_RETRIES: Final = 3
_FOLDER: Final = re.compile(r"file://(/+[^/?#][^?#]*)")
_BUCKET: Final = re.compile(
    r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/(?!\.\.?(?:/|\Z))[\w=.-]+)*)/?", re.ASCII
)
# What failed, as S3, the system or obstore names it among pages of text.
_CAUSES: Final = (
    r"<Code>(\w{1,80})</Code>",
    r"status code: (\d{3} [\w ]{1,80})",
    r'\b(?:message|error): "([^"]{1,80})"',
    r"\bkind: (\w{1,80})",
)


class PayloadStore(Protocol):
    """Where content waits for who holds its claim. Safe to use from several event loops."""

    async def put(self, data: bytes) -> Claim:
        """Store content, and return its claim once it is there to stay.

        The same content again is the same claim: what is stored is replaced by its equal, which
        renews its age and mends damage.

        Raises:
            PayloadTooLarge: It is over `claim.MAX_CONTENT_BYTES`.
            PayloadUnavailable: The store cannot be reached or refuses; perhaps it was stored.
        """
        ...

    async def get(self, claim: Claim) -> bytes:
        """Return the content of a claim, its size and hash checked.

        Raises:
            PayloadUnavailable: It is not there, it is damaged, or the store cannot be reached.
        """
        ...


def check_url(url: str) -> str:
    """Return the URL of a store.

    Raises:
        ConfigurationError: It is none.
    """
    if _BUCKET.fullmatch(url) or _FOLDER.fullmatch(url):
        return url
    # Whatever it is, there may be a password in it.
    raise ConfigurationError(
        "a payload store is file:///absolute/folder or s3://bucket/prefix, the prefix of letters, "
        "digits and _ = . - between slashes; credentials for S3 are AWS_* environment variables"
    )


def open_store(url: str) -> PayloadStore:
    """Return the store at a URL: `file:///absolute/folder` or `s3://bucket/prefix`.

    Nothing is connected or made before the first use.

    Raises:
        ConfigurationError: It is neither, or obstore, which speaks S3, is not installed.
    """
    if bucket := _BUCKET.fullmatch(check_url(url)):
        return BucketStore(bucket[1], bucket[2].strip("/"))
    return FolderStore(Path(unquote(url.removeprefix("file://"))))


class FolderStore:
    """Content as files `ab/abcdef…`, for the eyes of one user. Works in threads throughout."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def put(self, data: bytes) -> Claim:
        """As `PayloadStore.put`. Cost: two or three fsyncs."""
        return await _in_thread(lambda: self._write(data))

    async def get(self, claim: Claim) -> bytes:
        """As `PayloadStore.get`."""
        return await _in_thread(lambda: self._read(claim))

    def _write(self, data: bytes) -> Claim:
        claim = Claim.of(data)
        path = self._folder / claim.key
        try:
            _make(path.parent)
            # Complete under another name, then renamed: a crash leaves all of it or nothing.
            descriptor, unfinished = tempfile.mkstemp(prefix=".", dir=path.parent)
            try:
                with open(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(descriptor)
                os.replace(unfinished, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(unfinished)
                raise
            _sync(path.parent)
            # Who made it may have died before its name was on the disk.
            _sync(self._folder)
        except OSError as error:
            raise PayloadUnavailable(
                f"the payload store cannot be written: {error}; mend the folder, then try again"
            ) from error
        return claim

    def _read(self, claim: Claim) -> bytes:
        try:
            with open(self._folder / claim.key, "rb") as file:
                _check_size(claim, os.fstat(file.fileno()).st_size)
                data = file.read(claim.size)
        except FileNotFoundError as error:
            raise _missing(claim, f"below {self._folder}") from error
        except OSError as error:
            raise PayloadUnavailable(
                f"the payload store cannot be read: {error}; mend the folder, then try again"
            ) from error
        return _checked(claim, data)


class BucketStore:
    """Content as objects `prefix/ab/abcdef…` in a bucket of S3, or of what speaks like it.

    Credentials, region and endpoint are those of the environment when it is made.
    """

    # obstore's threads are the process's, made at the first request; a child has none of them and
    # would wait for them without end.
    _process: ClassVar[int | None] = None

    def __init__(self, bucket: str, prefix: str) -> None:
        try:
            from obstore.store import S3Store
        except ImportError as error:
            raise ConfigurationError(
                "a payload store on S3 needs obstore: pip install 'brokertask[s3]'"
            ) from error
        self._name = f"s3://{bucket}/{prefix}"
        try:
            self._objects = S3Store(
                bucket,
                prefix=prefix or None,
                # The endpoint says whether it is HTTP; the default one is HTTPS.
                client_options={
                    "allow_http": True,
                    "connect_timeout": CONNECT_TIMEOUT,
                    "timeout": REQUEST_TIMEOUT,
                },
                retry_config={"max_retries": MAX_RETRIES, "retry_timeout": REQUEST_TIMEOUT},
            )
        except Exception:
            raise ConfigurationError(
                f"{self._name}: an AWS_* environment variable has a value that obstore does not "
                "take; they are listed as S3Config in its documentation"
            ) from None

    async def put(self, data: bytes) -> Claim:
        """As `PayloadStore.put`. Cost: one request."""
        self._check_process()
        claim = await _in_thread(lambda: Claim.of(data))
        try:
            await self._objects.put_async(claim.key, data, use_multipart=False)
        except Exception as error:
            raise self._unavailable(error) from None
        return claim

    async def get(self, claim: Claim) -> bytes:
        """As `PayloadStore.get`. Cost: one request."""
        self._check_process()
        try:
            found = await self._objects.get_async(claim.key)
            _check_size(claim, found.meta["size"])
            data = bytes(await found.bytes_async())
        except PayloadUnavailable:
            raise
        except Exception as error:
            if isinstance(error, FileNotFoundError) and _cause(error) != "NoSuchBucket":
                raise _missing(claim, f"in {self._name}") from None
            raise self._unavailable(error) from None
        return await _in_thread(lambda: _checked(claim, data))

    def _check_process(self) -> None:
        process = os.getpid()
        if BucketStore._process not in (None, process):
            raise ConfigurationError(
                f"{self._name}: this process was forked from one that had used S3, which does not "
                "work: fork earlier, or start processes with the spawn method"
            )
        BucketStore._process = process

    def _unavailable(self, error: Exception) -> PayloadUnavailable:
        # Without the error itself: its text quotes the endpoint, and whatever was answered.
        return PayloadUnavailable(
            f"the payload store {self._name} fails: {_cause(error)}; look at the bucket, at the "
            "AWS_* environment variables and at what the user may do, then try again"
        )


async def _in_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns in a thread; one that hangs is left behind when cancelled."""
    return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)


def _make(folder: Path) -> None:
    """Make a folder and those above it that are missing, and have their names on the disk."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_size(claim: Claim, size: int) -> None:
    if size != claim.size:
        raise _damaged(claim, f"{size} bytes, not {claim.size}")


def _checked(claim: Claim, data: bytes) -> bytes:
    """Return `data` if it is what the claim was given for."""
    if hashlib.sha256(data).hexdigest() != claim.sha256:
        raise _damaged(claim, "its SHA-256 is another")
    return data


def _damaged(claim: Claim, how: str) -> PayloadUnavailable:
    return PayloadUnavailable(
        f"the content {claim.key} in the payload store is damaged: {how}; restore it, or put the "
        "same content again"
    )


def _missing(claim: Claim, place: str) -> PayloadUnavailable:
    return PayloadUnavailable(
        f"there is no {claim.key} {place}: it has expired, or is in another store; restore it, or "
        "discard the run"
    )


def _cause(error: Exception) -> str:
    """Return in a word or two what failed."""
    found = (re.search(pattern, str(error)) for pattern in _CAUSES)
    return next((each[1] for each in found if each), type(error).__name__)
