"""Debian packages for any architecture, as an ordinary user: apt with a state directory of its own.

The host's own apt configuration (proxies, certificates) stays in force; its package lists, its dpkg
status and its hooks are left alone. apt checks the signatures of the lists, and each file against them.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from viommu.lab.provision.cache import MIB, Cache, ProvisionError
from viommu.lab.provision.progress import Say, watch

STABLE = "trixie"
BACKPORTS = "trixie-backports"
GUEST_ARCHITECTURES = ("amd64", "arm64")

LISTS_LIVE = 6 * 3600  # seconds for which package lists are taken as current
_LISTS_SIZE = 200 * MIB  # the lists and apt's index of them, on disk

_KEYRINGS = ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp")
_HELPER = Path("/usr/lib/apt/apt-helper")

# Read after the host's own configuration. The `#clear` lines drop the host's hooks, which would work
# on the host's own lists.
_CONFIGURATION = """\
Dir::State "{root}/state";
Dir::State::Lists "{root}/state/lists";
Dir::State::status "{root}/state/status";
Dir::Cache "{root}/cache";
Dir::Cache::Archives "{root}/cache/archives";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "";
Dir::Etc::SourceList "{root}/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
#clear APT::Architectures;
APT::Architecture "{native}";
APT::Architectures {{ {architectures} }};
APT::Sandbox::User "";
APT::Default-Release "";
#clear APT::Update;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
Acquire::ForceHash "SHA256";
Acquire::Retries "2";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::CNF::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
"""


@dataclass(frozen=True)
class Archive:
    """A file of the mirror: a .deb, or the tarball of a source package."""

    uri: str
    filename: str
    size: int  # bytes
    digest: str  # SHA-256 in hexadecimal

    @property
    def package(self) -> str:
        return self.filename.split("_")[0]

    @property
    def version(self) -> str:
        """The version of the package, with its epoch."""
        return unquote(self.filename.split("_")[1])

    @property
    def architecture(self) -> str:
        """Debian's name of it, or "all"."""
        return self.filename.removesuffix(".deb").split("_")[-1]


def host_architecture() -> str:
    """Debian's name of the host's architecture."""
    return _run(["dpkg", "--print-architecture"], "asking dpkg for the architecture").strip()


def _run(command: Sequence[str | Path], doing: str) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    except FileNotFoundError as error:
        raise ProvisionError(
            f"{command[0]} is not there: viommu setup takes packages through Debian's apt; run it "
            "on Debian, or install QEMU ≥ 10.1 and libvfio-user and name your own guest."
        ) from error
    if done.returncode:
        raise ProvisionError(_explain(doing, done.stderr or done.stdout))
    return done.stdout


_UNREACHABLE = re.compile(
    r"Could not resolve|Temporary failure|Unable to connect|Could not connect"
    r"|Connection (failed|refused|timed out)|Cannot initiate|Network is unreachable|timed out",
    re.IGNORECASE,
)


def _explain(doing: str, output: str) -> str:
    """One sentence from apt's output."""
    complaints = [line[3:] for line in output.splitlines() if line.startswith("E: ")]
    detail = " ".join((complaints or output.splitlines() or ["no output"])[0].split())
    if "No space left" in output or "enough free space" in output:
        return (
            f"The cache directory is full while {doing}: free some space there, or set "
            "VIOMMU_CACHE to a directory on a larger disk, and run viommu setup again."
        )
    if "NO_PUBKEY" in output or "not signed" in output:
        return (
            f"The mirror's signature cannot be checked while {doing}: "
            "install a current debian-archive-keyring."
        )
    if _UNREACHABLE.search(output):
        return (
            f"The Debian mirror cannot be reached while {doing} ({detail}): check the network, or "
            "name a mirror in VIOMMU_DEBIAN_MIRROR, and run viommu setup again; it goes on "
            "where it stopped."
        )
    return f"apt failed while {doing}: {detail}"


def host_mirror() -> str:
    """The mirror that the host's apt uses for its own Debian release, or `VIOMMU_DEBIAN_MIRROR`."""
    if named := os.environ.get("VIOMMU_DEBIAN_MIRROR"):
        return named
    release = _os_release()
    if release.get("ID") == "debian":
        wanted = {release.get("VERSION_CODENAME"), "stable", "testing", "unstable", "sid"}
        listing = _run(
            [
                "apt-get",
                "indextargets",
                "--format",
                "$(RELEASE) $(COMPONENT) $(REPO_URI)",
                "Created-By: Packages",
            ],
            "asking apt for its mirror",
        )
        for line in listing.splitlines():
            suite, component, uri = line.split(maxsplit=2)
            if suite in wanted and component == "main":
                return uri
    raise ProvisionError(
        "No Debian mirror is known from this host's apt: name one in VIOMMU_DEBIAN_MIRROR (the URL "
        "of a directory that holds dists/ and pool/)."
    )


def _os_release() -> dict[str, str]:
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {key: value.strip("\"'") for key, value in pairs}


def host_release() -> str:
    """The code name of the host's Debian release, as "bookworm"."""
    return _os_release().get("VERSION_CODENAME", STABLE)


def _keyring() -> Path:
    for name in _KEYRINGS:
        if (path := Path("/usr/share/keyrings") / name).exists():
            return path
    raise ProvisionError(
        "Debian's signing keys are missing: apt-get install debian-archive-keyring"
    )


class PrivateApt:
    """apt with sources and state of its own under `<cache>/<name>`."""

    def __init__(
        self,
        cache: Cache,
        say: Say,
        *,
        name: str = "apt",
        suites: Sequence[str] = (STABLE, BACKPORTS),
        sources: Sequence[str] = (STABLE,),
        architectures: Iterable[str] = GUEST_ARCHITECTURES,
    ) -> None:
        self._cache = cache
        self._say = say
        self._root = cache.directory / name
        self._suites = suites
        self._sources = sources
        self._native = host_architecture()
        self._architectures = sorted({self._native, *architectures})
        self._archives = cache.directory / "archives"
        self._updated = False

    # -- the lists ------------------------------------------------------------------------------

    def _apt(self, *arguments: str, doing: str) -> str:
        return _run(["apt-get", "-c", self._root / "apt.conf", "-q", *arguments], doing)

    def _sources_list(self) -> str:
        mirror, keyring = host_mirror(), _keyring()
        architectures = ",".join(self._architectures)
        lines = [
            f"deb [arch={architectures} signed-by={keyring}] {mirror} {suite} main"
            for suite in self._suites
        ]
        lines += [f"deb-src [signed-by={keyring}] {mirror} {suite} main" for suite in self._sources]
        return "\n".join(lines) + "\n"

    def update(self) -> None:
        """Reads the package lists, unless that was done with the same sources of late."""
        if self._updated:
            return
        stamp = self._root / "updated"
        sources = self._sources_list()
        try:
            current = (
                stamp.read_text() == sources and time.time() - stamp.stat().st_mtime < LISTS_LIVE
            )
        except OSError:
            current = False
        if not current:
            stamp.unlink(missing_ok=True)
            self._configure()
            self._cache.require_space(_LISTS_SIZE, "reading the package lists")
            (self._root / "sources.list").write_text(sources)
            # A list of Debian's main section has about 10 MB; the backports' are small.
            size = 10 * (len(self._architectures) + len(self._sources))
            names = ", ".join(self._suites)
            self._say(f"Reading Debian's package lists ({names}), about {size} MB")
            # Without Error-Mode an unreachable mirror is a warning, and the old lists are used.
            self._apt(
                "update", "-o", "APT::Update::Error-Mode=any", doing="reading the package lists"
            )
            stamp.write_text(sources)
        self._updated = True

    def _configure(self) -> None:
        for part in ("state/lists/partial", "cache/archives/partial"):
            (self._root / part).mkdir(parents=True, exist_ok=True)
        (self._root / "state" / "status").touch()
        architectures = " ".join(f'"{name}";' for name in self._architectures)
        (self._root / "apt.conf").write_text(
            _CONFIGURATION.format(root=self._root, native=self._native, architectures=architectures)
        )

    # -- which files ----------------------------------------------------------------------------

    def closure(
        self, packages: Sequence[str], *, architecture: str | None = None, suite: str = STABLE
    ) -> list[Archive]:
        """The .debs that installing `packages` takes on an empty system, without recommended ones."""
        self.update()
        names = [f"{name}:{architecture or self._native}" for name in packages]
        output = self._apt(
            "--print-uris", "--yes", "--no-install-recommends", "-t", suite, "install", *names,
            doing=f"resolving {', '.join(packages)}",
        )  # fmt: skip
        return list(_parse_uris(output))

    def source_tarball(self, package: str) -> Archive:
        """The upstream tarball of a source package."""
        self.update()
        output = self._apt(
            "--print-uris", "--download-only", "--tar-only", "source", package,
            doing=f"looking up the source of {package}",
        )  # fmt: skip
        return next(_parse_uris(output))

    # -- the files ------------------------------------------------------------------------------

    def fetch(self, archives: Sequence[Archive], purpose: str) -> list[Path]:
        """Downloads what the cache lacks and checks all of it. Returns paths in the same order."""
        self._archives.mkdir(parents=True, exist_ok=True)
        missing = [archive for archive in archives if not self._is_here(archive)]
        if missing:
            self._download(missing, purpose)
        return [self._archives / archive.filename for archive in archives]

    def _is_here(self, archive: Archive) -> bool:
        path = self._archives / archive.filename
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == archive.digest
        except FileNotFoundError:
            return False

    def _download(self, archives: Sequence[Archive], purpose: str) -> None:
        self._configure()
        total = sum(archive.size for archive in archives)
        files = "1 file" if len(archives) == 1 else f"{len(archives)} packages"
        self._cache.require_space(total * 5, purpose)  # packed, unpacked, and the image made of it
        self._say(f"Downloading {files}, {total / 1e6:.0f} MB, for {purpose}")
        # apt-helper goes on with a partial file and refuses one that has the wrong digest.
        partial = {archive: self._archives / f"{archive.filename}.partial" for archive in archives}
        command: list[str | Path] = [_HELPER, "-c", self._root / "apt.conf", "-q", "download-file"]
        for archive, path in partial.items():
            command += [archive.uri, path, f"SHA256:{archive.digest}"]
        with watch(purpose, total, lambda: sum(map(_size, partial.values()))):
            _run(with_parent(command), f"downloading {purpose}")
        for archive, path in partial.items():
            path.rename(self._archives / archive.filename)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def with_parent(command: list[str | Path]) -> list[str | Path]:
    """The command, made to end when its parent does: a killed setup leaves nothing running."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", *command] if setpriv else command


def _parse_uris(output: str) -> Iterator[Archive]:
    for line in output.splitlines():
        match = re.fullmatch(r"'(\S+)' (\S+) (\d+) SHA256:([0-9a-f]{64})", line)
        if match:
            uri, filename, size, digest = match.groups()
            yield Archive(uri, filename, int(size), digest)


def unpack(package: Path, into: Path, wanted: Callable[[str], bool]) -> None:
    """Unpacks the files of a .deb whose path ("usr/bin/x") is `wanted`. Runs nothing of it."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for member in tar:
                    path = member.name.removeprefix("./")
                    if wanted(path):
                        _place(tar, member, into / path)
        except tarfile.TarError as error:
            raise ProvisionError(
                f"{package} cannot be unpacked ({error}): delete it and run viommu setup again."
            ) from error


def _place(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if member.issym():
        target.symlink_to(member.linkname)
    elif member.islnk():
        # Debian's hard links point at an earlier member of the same package.
        target.hardlink_to(target.parent / Path(member.linkname).name)
    elif (content := tar.extractfile(member)) is not None:
        with target.open("wb") as file:
            shutil.copyfileobj(content, file)
        target.chmod(member.mode & 0o755 | 0o600)


def command_in(root: Path, name: str) -> list[str]:
    """Runs a program with the loader and libraries of `root`: its libc may be newer than the host's."""
    loaders = sorted((root / "usr/lib").glob("*/ld-linux*.so.*"))
    if not loaders:
        raise ProvisionError(f"No dynamic loader in {root}: remove it and run viommu setup again.")
    libraries = f"{loaders[0].parent}:{root / 'usr/lib'}"
    program = str(root / "usr/bin" / name)
    return [str(loaders[0]), "--library-path", libraries, "--argv0", name, program]
