from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE
from urllib.request import Request, urlopen

import pytest
from obstore.store import S3Store
from pydantic import TypeAdapter, ValidationError

from brokertask.claim import MAX_CONTENT_BYTES, Claim
from brokertask.errors import (
    ConfigurationError,
    EnvelopeError,
    PayloadTooLarge,
    PayloadUnavailable,
)
from brokertask.payloads import PayloadStore, open_store
from brokertask.retry import Retry
from brokertask.values import MSGPACK, decode

pytestmark = pytest.mark.anyio

CONTENT = b"a scan of 5 MB" * 400_000
HASH = "ab" * 32
BUCKET = "payloads"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
    "AWS_SESSION_TOKEN": "IQoJb3JpZ2luX2Vj",
}


# --- claims -----------------------------------------------------------------------------------


def test_a_claim_crosses_the_wire() -> None:
    claim = Claim.of(CONTENT)
    assert claim.size == len(CONTENT)
    assert claim.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert Claim.read(decode(claim.pack(), MSGPACK)) == claim


def test_what_a_newer_version_added_to_a_claim_is_ignored() -> None:
    assert Claim.read({"sha256": HASH, "size": 1, "codec": "zstd"}) == Claim(HASH, 1)


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        b"",
        {},
        {"sha256": HASH},
        {"size": 1},
        {"sha256": HASH, "size": -1},
        {"sha256": HASH, "size": True},
        {"sha256": HASH, "size": 1.0},
        {"sha256": HASH, "size": "1"},
        {"sha256": HASH, "size": MAX_CONTENT_BYTES + 1},
        {"sha256": HASH, "size": 2**64 - 1},
        {"sha256": None, "size": 1},
        {"sha256": HASH.encode(), "size": 1},
        {"sha256": HASH.upper(), "size": 1},
        {"sha256": HASH[:-1], "size": 1},
        {"sha256": HASH + "\n", "size": 1},
        {"sha256": HASH[:-1] + "٣", "size": 1},
        {"sha256": "../../../../etc/passwd", "size": 1},
        {"sha256": "/etc/passwd", "size": 1},
        {"sha256": ("../" * 22)[:64], "size": 1},
        {"sha256": HASH[:-1] + "\0", "size": 1},
        {"sha256": [HASH], "size": 1},
    ],
)
def test_a_malformed_claim_is_undecodable(raw: object) -> None:
    with pytest.raises(EnvelopeError) as caught:
        Claim.read(raw)
    assert caught.value.reason == "undecodable"
    assert "passwd" not in str(caught.value)


def test_no_claim_leads_out_of_its_store() -> None:
    claim = Claim.read({"sha256": HASH, "size": 1, "key": "../../etc/passwd"})
    assert claim.key == f"ab/{HASH}"
    with pytest.raises(ValueError, match="sha256"):
        Claim("../../etc/passwd", 1)
    with pytest.raises(ValidationError, match="sha256"):
        TypeAdapter(Claim).validate_python({"sha256": "../../etc/passwd", "size": 1})


# --- both stores ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The endpoint of an S3 of this module's own, with an empty bucket."""
    program = """
        import sys
        from moto.server import ThreadedMotoServer
        server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        server.start()
        print("http://%s:%d" % server.get_host_and_port(), flush=True)
        sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdin=PIPE, stdout=PIPE, stderr=DEVNULL
    ) as process:
        assert process.stdout is not None
        endpoint = process.stdout.readline().decode().strip()
        ask("PUT", f"{endpoint}/{BUCKET}")
        yield endpoint
        # Its input ends, and so does it.


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The endpoint, as the environment tells it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    return server


def ask(method: str, url: str, data: bytes | None = None) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    with urlopen(Request(url, data, headers, method=method)) as answer:
        answer.read()


class Place:
    """A store, and the way to its content behind its back."""

    def __init__(self, url: str, behind: Path | S3Store) -> None:
        self.url = url
        self.store = open_store(url)
        self.behind = behind

    def write(self, claim: Claim, data: bytes) -> None:
        if isinstance(self.behind, Path):
            (self.behind / claim.key).write_bytes(data)
        else:
            self.behind.put(claim.key, data)

    def remove(self, claim: Claim) -> None:
        if isinstance(self.behind, Path):
            (self.behind / claim.key).unlink()
        else:
            self.behind.delete(claim.key)


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Place(f"file://{tmp_path}/store", tmp_path / "store")
    request.getfixturevalue("s3")
    return Place(f"s3://{BUCKET}/{tmp_path.name}", bucket(tmp_path.name))


def bucket(prefix: str | None) -> S3Store:
    return S3Store(BUCKET, prefix=prefix, client_options={"allow_http": True})


@pytest.mark.parametrize("data", [b"", b"\0", b"short", CONTENT], ids=len)
async def test_what_was_put_is_got(place: Place, data: bytes) -> None:
    claim = await place.store.put(data)
    assert claim == Claim.of(data)
    assert await open_store(place.url).get(claim) == data


async def test_many_at_once_put_the_same(place: Place) -> None:
    stores = [place.store, open_store(place.url)]
    async with asyncio.TaskGroup() as group:
        puts = [group.create_task(stores[n % 2].put(CONTENT[:100_000])) for n in range(20)]
    (claim,) = {put.result() for put in puts}
    assert await place.store.get(claim) == CONTENT[:100_000]


async def test_a_store_is_used_from_several_loops(place: Place) -> None:
    claim = await place.store.put(b"shared")
    there = await asyncio.to_thread(lambda: asyncio.run(place.store.get(claim)))
    assert there == await place.store.get(claim) == b"shared"


async def test_what_is_gone_is_said_to_be_gone(place: Place) -> None:
    claim = await place.store.put(b"content")
    place.remove(claim)
    with pytest.raises(PayloadUnavailable, match=rf"there is no {claim.key} .*expired"):
        await place.store.get(claim)


@pytest.mark.parametrize("damaged", [b"", b"conten", b"content+", b"c0ntent", b"x" * 100_000])
async def test_damage_is_noticed_and_mended_by_another_put(place: Place, damaged: bytes) -> None:
    claim = await place.store.put(b"content")
    place.write(claim, damaged)
    with pytest.raises(PayloadUnavailable, match=f"{claim.key} .* is damaged"):
        await place.store.get(claim)
    await place.store.put(b"content")
    assert await place.store.get(claim) == b"content"


async def test_a_claim_with_another_size_gets_nothing(place: Place) -> None:
    claim = await place.store.put(b"content")
    for size in (0, 6, 8, MAX_CONTENT_BYTES):
        with pytest.raises(PayloadUnavailable, match=f"7 bytes, not {size}"):
            await place.store.get(Claim(claim.sha256, size))


async def test_what_no_process_could_hold_is_refused(place: Place) -> None:
    with pytest.raises(PayloadTooLarge, match=f"{MAX_CONTENT_BYTES + 1} bytes"):
        await place.store.put(bytes(MAX_CONTENT_BYTES + 1))


async def test_another_attempt_follows_a_failing_store(place: Place) -> None:
    with pytest.raises(PayloadUnavailable) as caught:
        await place.store.get(Claim(HASH, 1))
    assert Retry().decide(1, caught.value).delay is not None


# --- opening ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "payloads",
        "/srv/payloads",
        "file:payloads",
        "file://payloads",
        "file:///",
        "file:////",
        "file:///srv?secret",
        "http://user:secret@host/bucket",
        "http://[secret",
        "s3:bucket",
        "s3://",
        "s3:///prefix",
        "s3://Bucket",
        "s3://user:secret@bucket/prefix",
        "s3://bucket/../prefix",
        "s3://bucket/a/./b",
        "s3://bucket/a//b",
        "s3://bucket/prefix?secret",
        "s3://bucket/prefix\n",
        "gs://bucket",
    ],
)
def test_an_unknown_url_is_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"file:///absolute/folder or s3://bucket/") as e:
        open_store(url)
    assert "secret" not in str(e.value)


async def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    claim = await open_store(f"file://{tmp_path}/a%20b/c d/").put(b"content")
    assert (tmp_path / "a b/c d" / claim.key).read_bytes() == b"content"


@pytest.mark.parametrize("prefix", ["", "/", "/a", "/a/v=1.0/.b_-/"])
async def test_a_prefix_may_have_several_parts_or_none(s3: str, prefix: str) -> None:
    claim = await open_store(f"s3://{BUCKET}{prefix}").put(b"content")
    found = await bucket(prefix.strip("/") or None).get_async(claim.key)
    assert await found.bytes_async() == b"content"


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("obstore", "obstore.store"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigurationError, match=r"pip install 'brokertask\[s3\]'"):
        open_store(f"s3://{BUCKET}/prefix")


def test_the_library_is_imported_for_s3_only(tmp_path: Path) -> None:
    program = f"""
        import sys
        from brokertask.payloads import open_store
        open_store("file://{tmp_path}")
        print("obstore" in sys.modules)
    """
    assert run(program) == "False"


# --- the folder -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep/store"


@pytest.fixture
def store(folder: Path) -> PayloadStore:
    return open_store(f"file://{folder}")


def files(folder: Path) -> list[str]:
    return [f"{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()]


def run(program: str) -> str:
    """Return what a program prints, or else how it ended."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or f"{done.returncode}: {done.stderr}"


async def test_the_same_content_is_stored_once(store: PayloadStore, folder: Path) -> None:
    claims = await asyncio.gather(*(store.put(b"content") for _ in range(20)))
    assert files(folder) == [claims[0].key]


async def test_content_is_for_its_user_only(store: PayloadStore, folder: Path) -> None:
    claim = await store.put(b"content")
    path = folder / claim.key
    modes = [each.stat().st_mode & 0o777 for each in (folder, path.parent, path)]
    assert modes == [0o700, 0o700, 0o600]


async def test_another_put_renews_the_age(store: PayloadStore, folder: Path) -> None:
    claim = await store.put(b"content")
    os.utime(folder / claim.key, (0, 0))
    await store.put(b"content")
    assert (folder / claim.key).stat().st_mtime > 1_000_000_000


@pytest.mark.parametrize("step", ["fsync", "replace"])
async def test_a_crash_on_the_way_leaves_nothing_that_is_read(
    store: PayloadStore, folder: Path, step: str
) -> None:
    claim = Claim.of(b"content")
    (folder / claim.key).parent.mkdir(parents=True)
    program = f"""
        import asyncio, os, signal
        from brokertask.payloads import open_store
        os.{step} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(open_store("file://{folder}").put(b"content"))
    """
    assert run(program) == "-9: "
    assert len(files(folder)) == 1
    with pytest.raises(PayloadUnavailable, match="there is no"):
        await store.get(claim)
    await store.put(b"content")
    assert await store.get(claim) == b"content"


def test_a_full_disk_is_said_and_leaves_nothing_behind(folder: Path) -> None:
    program = f"""
        import asyncio, resource
        from brokertask.errors import PayloadUnavailable
        from brokertask.payloads import open_store
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            asyncio.run(open_store("file://{folder}").put(bytes(100_000)))
        except PayloadUnavailable as error:
            print(error)
    """
    assert "cannot be written: [Errno 27] File too large" in run(program)
    assert files(folder) == []


async def test_a_folder_that_is_none_is_said(tmp_path: Path) -> None:
    tmp_path.joinpath("file").touch()
    store = open_store(f"file://{tmp_path}/file")
    with pytest.raises(PayloadUnavailable, match=r"cannot be written: .*/file'"):
        await store.put(b"content")
    with pytest.raises(PayloadUnavailable, match=r"cannot be read: .*Not a directory"):
        await store.get(Claim(HASH, 1))


async def test_a_disk_that_hangs_does_not_hang_the_loop(store: PayloadStore, folder: Path) -> None:
    claim = Claim.of(b"content")
    path = folder / claim.key
    path.parent.mkdir(parents=True)
    os.mkfifo(path)  # To open it takes until somebody writes.
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await store.get(claim)
    os.close(os.open(path, os.O_RDWR))


# --- S3 ---------------------------------------------------------------------------------------


@pytest.fixture
def guarded(s3: str) -> Iterator[None]:
    """From here on, the server looks at who asks."""
    reset = f"{s3}/moto-api/reset-auth"
    ask("POST", reset, b"0")
    yield
    ask("POST", reset, b"inf")


async def failure(url: str = f"s3://{BUCKET}/p") -> str:
    """Return what a put and a get of a failing store say; neither tells a secret."""
    store = open_store(url)
    said = []
    for attempt in (store.put(b"content"), store.get(Claim(HASH, 1))):
        with pytest.raises(PayloadUnavailable) as caught:
            await attempt
        said.append(str(caught.value))
        shown = "".join(traceback.format_exception(caught.value))
        assert not [secret for secret in (*SECRETS.values(), "hunter2") if secret in shown]
    assert said[0] == said[1]
    return said[0]


async def test_a_refused_user_is_said(s3: str, guarded: None) -> None:
    assert "InvalidAccessKeyId" in await failure()


async def test_a_missing_bucket_is_said(s3: str) -> None:
    said = await failure(f"s3://no-{BUCKET}/p")
    assert f"s3://no-{BUCKET}/p fails: NoSuchBucket" in said


async def test_an_endpoint_that_is_away_is_said(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hunter2@127.0.0.1:1")
    assert "fails: Connection refused" in await failure()


def test_a_wrong_option_in_the_environment_is_said(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CHECKSUM_ALGORITHM", "hunter2")
    with pytest.raises(ConfigurationError, match=r"AWS_\*") as caught:
        open_store(f"s3://{BUCKET}/p")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_forked_child_is_told_instead_of_waiting_for_ever(s3: str) -> None:
    program = f"""
        import asyncio, os
        from brokertask.errors import ConfigurationError
        from brokertask.payloads import open_store
        store = open_store("s3://{BUCKET}/p")
        claim = asyncio.run(store.put(b"content"))
        if child := os.fork():
            os.waitpid(child, 0)
        else:
            try:
                asyncio.run(store.get(claim))
            except ConfigurationError as error:
                print(error)
    """
    assert "forked from one that had used S3" in run(program)
