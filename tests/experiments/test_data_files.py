"""The experiments' downloads: checked, tried again, and never half in the cache."""

import gzip
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

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
CONTENT = np.random.default_rng(0).bytes(300_000)


def packed(**members):
    """A packed tar file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVE = packed(data=CONTENT, other=b"")
SHA256 = hashlib.sha256(ARCHIVE).hexdigest()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


class Server:
    """Gives the archive, but for what goes wrong.

    Attributes:
      cuts: after how many bytes of each answer the connection is cut; None for not.
      status: another answer than the file.
      stalls: whether it stops in the middle, and keeps the connection.
      asked: how many requests there were.
    """

    def __init__(self):
        self.cuts, self.status, self.stalls = [], None, False
        self.content, self.asked = ARCHIVE, 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                """Is quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/data.tgz"

    def answer(self, request):
        self.asked += 1
        if self.status:
            request.send_error(self.status)
            return
        request.send_response(200)
        request.send_header("Content-Length", str(len(self.content)))
        request.end_headers()
        cut = self.cuts.pop(0) if self.cuts else None
        request.wfile.write(self.content[:cut])
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


@pytest.fixture
def quick(monkeypatch):
    """Without the seconds between two attempts."""
    monkeypatch.setattr("pooch.core.time.sleep", lambda _: None)


def read(server, cache):
    from archives import Archive

    (content,) = Archive(server.url, SHA256).read(["data"], cache)
    return content


def test_an_archive_is_fetched_once_and_nothing_else_is_left(server, tmp_path):
    cache = tmp_path / "new" / "cache"
    assert read(server, cache) == CONTENT
    assert read(server, cache) == CONTENT
    assert os.listdir(cache) == ["data.tgz"]
    assert server.asked == 1


def test_a_download_that_is_cut_is_tried_again(server, tmp_path, quick):
    server.cuts = [100_000, 50_000]
    assert read(server, tmp_path) == CONTENT
    assert server.asked == 3
    assert os.listdir(tmp_path) == ["data.tgz"]


@pytest.mark.parametrize("fault", ["cut", "missing", "changed", "nobody"])
def test_what_cannot_be_had_is_not_kept(server, tmp_path, quick, fault):
    from archives import DataError

    server.cuts = 9 * [100_000] if fault == "cut" else []
    server.status = 404 if fault == "missing" else None
    if fault == "changed":
        server.content = packed(data=CONTENT[1:])
    if fault == "nobody":
        server.close()
    with pytest.raises(DataError, match=r"Could not download.*data\.tgz.*put it into"):
        read(server, tmp_path)
    if fault == "nobody":
        server.__init__()  # for the fixture to close
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: raw[::-1]])
def test_a_damaged_archive_in_the_cache_is_fetched_again(server, tmp_path, damage):
    (tmp_path / "data.tgz").write_bytes(damage(ARCHIVE))
    assert read(server, tmp_path) == CONTENT
    assert (tmp_path / "data.tgz").read_bytes() == ARCHIVE
    assert server.asked == 1


def test_a_damaged_archive_stays_until_a_new_one_is_whole(server, tmp_path, quick):
    from archives import DataError

    (tmp_path / "data.tgz").write_bytes(b"old")
    server.cuts = 3 * [1]
    with pytest.raises(DataError):
        read(server, tmp_path)
    assert (tmp_path / "data.tgz").read_bytes() == b"old"


@pytest.mark.slow
def test_a_program_killed_while_it_downloads(server, tmp_path):
    """By `kill -9`: nothing has the file's name, and the next one is not disturbed."""
    server.cuts, server.stalls = [100_000], True
    program = (
        "import pathlib, archives\n"
        f"archives.Archive({server.url!r}, {SHA256!r}).read(['data'], "
        f"pathlib.Path({str(tmp_path)!r}))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=EXPERIMENTS,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while child.poll() is None and not any(
        x.stat().st_size for x in tmp_path.iterdir()
    ):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "data.tgz").exists()
    server.stalls = False
    assert read(server, tmp_path) == CONTENT


# --------------------------------------------------------------------- what is in them


def serve(server, monkeypatch, module, **members):
    """What a module's archive is, at the server."""
    from archives import Archive

    server.content = packed(**members)
    sha256 = hashlib.sha256(server.content).hexdigest()
    monkeypatch.setattr(module, "ARCHIVE", Archive(server.url, sha256))


def idx(array):
    """The bytes of an idx file of unsigned bytes."""
    header = np.array([0x800 + array.ndim, *array.shape], ">i4")
    return header.tobytes() + array.astype(np.uint8).tobytes()


def test_mnist(server, tmp_path, monkeypatch):
    import mnist

    pixels = np.arange(3 * 784).reshape(3, 28, 28) % 256
    files = {f"package/data/{name}": idx(pixels) for name in mnist.FILES}
    serve(server, monkeypatch, mnist, **files)
    for images in mnist.load("mnist", tmp_path):
        assert images.dtype == np.float32
        expected = pixels.reshape(3, 784) / 255
        np.testing.assert_allclose(images, expected, rtol=1e-6)


def test_fashion_mnist(server, tmp_path, monkeypatch):
    import fashion

    pixels, labels = np.arange(2 * 784).reshape(2, 28, 28) % 256, np.array([7, 2])
    kinds = {"images-idx3": pixels, "labels-idx1": labels}
    files = {
        f"{fashion.FOLDER}/{part}-{kind}-ubyte.gz": gzip.compress(idx(array))
        for part in ("train", "t10k")
        for kind, array in kinds.items()
    }
    serve(server, monkeypatch, fashion, **files)
    for cases in fashion.load(tmp_path):
        expected = pixels[..., None] / 255
        np.testing.assert_allclose(cases.images, expected, rtol=1e-6)
        np.testing.assert_array_equal(cases.labels, labels)


def test_austen(server, tmp_path, monkeypatch):
    import austen
    import rdata

    files = {}
    for number, name in enumerate(austen.NOVELS):
        path = tmp_path / "one.rda"
        rdata.write_rda(path, {name: np.array([f"Line {number}", "", "fin" * 20])})
        files[f"janeaustenr/data/{name}.rda"] = path.read_bytes()
    serve(server, monkeypatch, austen, **files)
    corpus = austen.load(tmp_path)
    tokens = np.concatenate(corpus[:3])
    text = "".join(corpus.alphabet[i] for i in tokens)
    expected = [f"Line {n}\n\n{'fin' * 20}" for n in range(len(austen.NOVELS))]
    assert text == "\n".join(expected)
    assert len(corpus.test) == len(corpus.validation) == int(0.05 * len(text))
