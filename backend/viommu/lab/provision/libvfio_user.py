"""libvfio-user: the one that the environment names, the system's, or one compiled here.

The source is in Debian's source package of QEMU. It needs a C compiler and json-c's headers; where the
headers are missing, json-c of the host's own release is unpacked beside the result, so that nothing
but the compiler has to be installed.
"""

import ctypes
import lzma
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from viommu.lab.provision.apt import STABLE, PrivateApt, host_release, unpack
from viommu.lab.provision.cache import Cache, Entry, ProvisionError, recipe_key
from viommu.lab.provision.progress import Say

VARIABLE = "VFIO_USER_LIBRARY"
SONAME = "libvfio-user.so.0"
DIRECTORY = "libvfio-user"  # in the cache; without a key, so that the bindings find it by its name
_SOURCE = "subprojects/libvfio-user/"
# The transport over a pipe serves the library's own tests only.
_UNITS = ("dma", "irq", "libvfio-user", "migration", "pci", "pci_caps", "tran", "tran_sock")
_FLAGS = (
    "-std=gnu99", "-O2", "-g", "-fPIC", "-shared", "-D_GNU_SOURCE", "-fvisibility=hidden",
    f"-Wl,-soname,{SONAME}", "-Wl,--no-undefined", "-Wl,-rpath,$ORIGIN",
)  # fmt: skip


def key() -> str:
    """Changes with the recipe, with what the environment names and with what the system has."""
    return recipe_key(Path(__file__), os.environ.get(VARIABLE, ""), _system_library() or "")


def _system_library() -> str | None:
    """The path of the system's library.

    The linker's own list is asked, not dlopen(), which also finds what this process has loaded.
    """
    ldconfig = shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if ldconfig is None:
        return None
    listing = subprocess.run([ldconfig, "-p"], capture_output=True, text=True).stdout
    paths = (line.partition(" => ") for line in listing.splitlines())
    return next((path for name, _, path in paths if name.split()[:1] == [SONAME]), None)


def api(library: ctypes.CDLL) -> str:
    """The version of its interface, 0.1 or 0.2, told by a function that only the older one exports."""
    return "0.1" if hasattr(library, "vfu_get_migr_register_area_size") else "0.2"


def _describe(path: str | Path, origin: str) -> Entry:
    try:
        version = api(ctypes.CDLL(str(path)))
    except OSError as error:
        raise ProvisionError(f"{path} is no library that this host can load ({error}).") from error
    return {"path": str(path), "version": f"API {version}", "origin": origin}


def provide(cache: Cache, apt: PrivateApt, say: Say) -> Entry:
    """The manifest's entry."""
    if named := os.environ.get(VARIABLE):
        if not Path(named).is_file():
            raise ProvisionError(
                f"{VARIABLE} names {named}, which does not exist: correct or unset it."
            )
        return _describe(Path(named).absolute(), f"${VARIABLE}")
    if installed := _system_library():
        return _describe(installed, "system library")
    directory = cache.directory / DIRECTORY
    recipe = recipe_key(Path(__file__))
    try:
        current = (directory / "recipe").read_text() == recipe
    except OSError:
        current = False
    if not current:
        _build(recipe, cache, apt, say)
    source = (directory / "source").read_text()
    return _describe(directory / "lib" / SONAME, f"compiled from Debian {STABLE}, {source}")


def _build(recipe: str, cache: Cache, apt: PrivateApt, say: Say) -> None:
    compiler = _compiler()
    tarball = apt.source_tarball("qemu")
    (source,) = apt.fetch([tarball], "the source of libvfio-user")
    say("Compiling libvfio-user")
    with cache.building(DIRECTORY) as work:
        _extract(source, work)
        (work / "lib").mkdir()
        json_c = _host_json_c(compiler) or unpack_json_c(work, cache, say)
        include = work / "include" / "vfio-user"
        units = [str(work / "unpacked/lib" / f"{unit}.c") for unit in _UNITS]
        output = str(work / "lib" / SONAME)
        _compile([compiler, *_FLAGS, f"-I{include}", *units, *json_c, "-o", output, "-lpthread"])
        (work / "lib" / "libvfio-user.so").symlink_to(SONAME)
        for remains in ("unpacked", "json-c"):
            shutil.rmtree(work / remains, ignore_errors=True)
        (work / "source").write_text(f"qemu {tarball.version.removesuffix('.orig.tar.xz')}")
        (work / "recipe").write_text(recipe)


def _compiler() -> str:
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            probe = subprocess.run(
                [path, "-x", "c", "-", "-o", "/dev/null"],
                input="#include <stdio.h>\nint main(void) { return 0; }\n",
                capture_output=True, text=True,
            )  # fmt: skip
            if probe.returncode == 0:
                return path
    raise ProvisionError(
        "No C compiler works here, and libvfio-user has to be compiled: "
        "sudo apt-get install gcc libc6-dev"
    )


def _extract(tarball: Path, work: Path) -> None:
    """Takes the library's own folder out of QEMU's source.

    The headers go to `work`/include/vfio-user, the rest to `work`/unpacked.
    """
    found = False
    try:
        with tarfile.open(tarball, "r|*") as tar:
            for member in tar:
                _, inside, path = member.name.partition(_SOURCE)
                if found and not inside:
                    break  # a folder's members stand together; most of the tarball is still to come
                found = found or bool(inside)
                if member.isfile() and path.startswith(("lib/", "include/", "LICENSE")):
                    folder = "include/vfio-user" if path.startswith("include/") else "unpacked"
                    target = work / folder / path.removeprefix("include/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    content = tar.extractfile(member)
                    target.write_bytes(content.read() if content else b"")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ProvisionError(
            f"{tarball} is damaged ({error}): delete it and run scripts/setup again."
        ) from error
    (work / "unpacked/LICENSE").rename(work / "LICENSE")


def _host_json_c(compiler: str) -> list[str]:
    """The options that compile against the host's json-c; none where it has no headers."""
    options = ["-I/usr/include/json-c", "-ljson-c"]
    probe = subprocess.run(
        [compiler, "-x", "c", "-", "-shared", "-fPIC", "-o", "/dev/null", *options],
        input="#include <json.h>\n",
        capture_output=True,
        text=True,
    )
    return options if probe.returncode == 0 else []


def unpack_json_c(work: Path, cache: Cache, say: Say) -> list[str]:
    """Puts json-c into `work`/lib, beside what uses it; returns the options that compile against it.

    It is that of the host's own release: a newer one would need a newer C library.
    """
    release = host_release()
    apt = PrivateApt(
        cache, say, name=f"apt-{release}", suites=(release,), sources=(), architectures=()
    )
    wanted = [
        a
        for a in apt.closure(["libjson-c-dev"], suite=release)
        if a.package.startswith("libjson-c")
    ]
    for file in apt.fetch(wanted, "json-c's headers"):
        unpack(file, work / "json-c", lambda path: "/include/" in path or "/libjson-c.so" in path)
    (library,) = (path for path in (work / "json-c").rglob("libjson-c.so.?") if path.is_symlink())
    (work / "lib").mkdir(exist_ok=True)
    shutil.copy(library, work / "lib" / library.name)
    (work / "json-c/link").mkdir()
    (work / "json-c/link/libjson-c.so").symlink_to(work / "lib" / library.name)
    return [f"-I{work / 'json-c/usr/include/json-c'}", f"-L{work / 'json-c/link'}", "-ljson-c"]


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [
            line for line in done.stderr.splitlines() if "error" in line
        ] or done.stderr.splitlines()
        reason = errors[0] if errors else "no message"
        raise ProvisionError(f"libvfio-user does not compile with {command[0]}: {reason}")
