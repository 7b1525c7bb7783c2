"""Downloads that stop, break off or bring the wrong bytes, from a mirror in this process."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest

from viommu.lab.provision.apt import Archive, PrivateApt, host_mirror, unpack
from viommu.lab.provision.cache import Cache, ProvisionError

BACKEND = Path(__file__).parents[1]
CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Mirror:
    """Serves `CONTENT` under any path; can stop in the middle of it."""

    def __init__(self) -> None:
        self.ranges: list[str | None] = []  # the Range header of each request
        self.stalled = Event()  # half is sent, and no more follows
        self.stall = False
        self._release = Event()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                mirror._serve(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/debian"

    def archive(self, digest: str | None = None, size: int = len(CONTENT)) -> Archive:
        known = hashlib.sha256(CONTENT).hexdigest()
        return Archive(f"{self.url}/tool.deb", "tool_1%3a2_all.deb", size, digest or known)

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers["Range"]
        self.ranges.append(asked)
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        request.send_response(206 if first else 200)
        if first:
            last = len(CONTENT) - 1
            request.send_header("Content-Range", f"bytes {first}-{last}/{len(CONTENT)}")
        request.send_header("Last-Modified", "Sat, 01 Nov 2025 00:00:00 GMT")
        request.send_header("Content-Length", str(len(CONTENT) - first))
        request.end_headers()
        if self.stall:
            request.wfile.write(CONTENT[: len(CONTENT) // 2])
            request.wfile.flush()
            self.stalled.set()
            self._release.wait()
        else:
            request.wfile.write(CONTENT[first:])

    def close(self) -> None:
        self._release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    mirror = Mirror()
    yield mirror
    mirror.close()


def private_apt(cache: Path) -> PrivateApt:
    cache.mkdir(exist_ok=True)
    return PrivateApt(Cache(cache), print)


def processes_of(directory: Path) -> list[str]:
    """The command lines of the processes that name `directory`."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(directory) in line:
            lines.append(line)
    return lines


def test_download(tmp_path: Path, mirror: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    archive = mirror.archive()
    assert (archive.package, archive.version, archive.architecture) == ("tool", "1:2", "all")
    (path,) = private_apt(tmp_path / "cache").fetch([archive], "a tool")
    assert path.read_bytes() == CONTENT
    assert capsys.readouterr().out == "Downloading 1 file, 1 MB, for a tool\n"
    private_apt(tmp_path / "cache").fetch([archive], "a tool")
    assert capsys.readouterr().out == ""
    assert len(mirror.ranges) == 1


def test_damaged_file_in_the_cache_is_downloaded_again(tmp_path: Path, mirror: Mirror) -> None:
    (path,) = private_apt(tmp_path / "cache").fetch([mirror.archive()], "a tool")
    path.write_bytes(b"x" + path.read_bytes()[1:])
    (path,) = private_apt(tmp_path / "cache").fetch([mirror.archive()], "a tool")
    assert path.read_bytes() == CONTENT


def test_wrong_bytes_are_refused(tmp_path: Path, mirror: Mirror) -> None:
    apt = private_apt(tmp_path / "cache")
    with pytest.raises(ProvisionError, match=r"apt failed while downloading a tool: .*mismatch"):
        apt.fetch([mirror.archive(digest="0" * 64)], "a tool")
    assert not (tmp_path / "cache/archives/tool_1%3a2_all.deb").exists()


FETCH = (
    "import sys\nfrom pathlib import Path\n"
    "from viommu.lab.provision.apt import Archive, PrivateApt\n"
    "from viommu.lab.provision.cache import Cache, ProvisionError\n"
    "cache, uri, name, size, digest = sys.argv[1:]\n"
    "try:\n"
    "    apt = PrivateApt(Cache(Path(cache)), print)\n"
    "    apt.fetch([Archive(uri, name, int(size), digest)], 'a tool')\n"
    "except ProvisionError as error:\n"
    "    sys.exit(str(error))\n"
)


def fetch_elsewhere(cache: Path, archive: Archive) -> list[str]:
    facts = (archive.uri, archive.filename, str(archive.size), archive.digest)
    return [sys.executable, "-c", FETCH, str(cache), *facts]


def test_killed_download_goes_on(tmp_path: Path, mirror: Mirror) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    mirror.stall = True
    environment = {**os.environ, "PYTHONPATH": str(BACKEND)}
    with subprocess.Popen(fetch_elsewhere(cache, mirror.archive()), env=environment) as setup:
        assert mirror.stalled.wait(30)
        partial = cache / "archives" / "tool_1%3a2_all.deb.partial"
        wait_until(lambda: partial.exists() and partial.stat().st_size > 0)
        setup.kill()
    # The download dies with the one who started it.
    wait_until(lambda: not processes_of(cache))
    assert not (cache / "archives" / "tool_1%3a2_all.deb").exists()
    mirror.stall = False
    (path,) = private_apt(cache).fetch([mirror.archive()], "a tool")
    assert path.read_bytes() == CONTENT
    assert mirror.ranges[0] is None
    assert (mirror.ranges[1] or "").startswith("bytes=")


def wait_until(condition: object, seconds: float = 30) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.02)


def test_interrupted_setup_says_so(tmp_path: Path, mirror: Mirror) -> None:
    mirror.stall = True
    cache = tmp_path / "cache"
    environment = {
        **os.environ,
        "PYTHONPATH": str(BACKEND),
        "VIOMMU_CACHE": str(cache),
        "VIOMMU_DEBIAN_MIRROR": mirror.url,
    }
    command = [sys.executable, "-P", "-m", "viommu.lab.provision"]
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as setup:
        assert mirror.stalled.wait(30)
        os.killpg(setup.pid, signal.SIGINT)  # as a terminal does
        _, errors = setup.communicate(timeout=30)
    assert setup.returncode == 130
    assert errors == (
        "\nviommu setup: interrupted; run it again and it goes on where it stopped.\n"
    )
    wait_until(lambda: not processes_of(cache))


def test_unreachable_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("VIOMMU_DEBIAN_MIRROR", "http://127.0.0.1:9/debian")
    with pytest.raises(ProvisionError, match="mirror cannot be reached while reading") as caught:
        private_apt(tmp_path / "cache").update()
    assert "\n" not in str(caught.value)
    assert "run viommu setup again" in str(caught.value)


def test_disk_that_fills_up_during_a_download(tmp_path: Path, mirror: Mirror) -> None:
    archive = mirror.archive(size=0)  # promises less than comes, so that the disk fills up
    cache = tmp_path / "cache"
    cache.mkdir()
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    script = 'mount -t tmpfs -o size=512k none "$1" && shift && exec "$@"'
    done = subprocess.run(
        [
            "unshare", *user, "--mount", "sh", "-c", script, "sh", str(cache),
            *fetch_elsewhere(cache, archive),
        ],
        env={**os.environ, "PYTHONPATH": str(BACKEND)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("The cache directory is full while downloading a tool: free")
    assert done.stderr.count("\n") == 1


def test_named_mirror_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIOMMU_DEBIAN_MIRROR", "https://mirror.invalid/debian")
    assert host_mirror() == "https://mirror.invalid/debian"


def test_damaged_package(tmp_path: Path) -> None:
    package = tmp_path / "broken.deb"
    package.write_bytes(b"not a package")
    with pytest.raises(ProvisionError, match=r"broken\.deb cannot be unpacked"):
        unpack(package, tmp_path / "root", lambda path: True)


def test_unpack_keeps_links_and_permissions(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: tool\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: x\n"
    )
    (tree / "usr/bin").mkdir(parents=True)
    (tree / "usr/bin/tool").write_text("run")
    (tree / "usr/bin/tool").chmod(0o755)
    (tree / "usr/bin/again").hardlink_to(tree / "usr/bin/tool")
    (tree / "usr/bin/link").symlink_to("tool")
    (tree / "usr/unwanted").touch()
    package = tmp_path / "tool.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", tree, package],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    root = tmp_path / "root"
    unpack(package, root, lambda path: path.startswith("usr/bin/"))
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())
    assert names == ["usr/bin/again", "usr/bin/link", "usr/bin/tool"]
    assert (root / "usr/bin/again").read_text() == "run"
    assert (root / "usr/bin/link").readlink() == Path("tool")
    assert (root / "usr/bin/tool").stat().st_mode & 0o777 == 0o755
