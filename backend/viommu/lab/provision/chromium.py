"""A headless Chromium for the tests of the report: the one on PATH, else that of the host's own Debian release.

It is no part of `scripts/setup`: 110 MB that only those tests want, and they ask for it.
"""

import re
import shutil
import sys
from pathlib import Path

from viommu.lab.assets import cache_directory
from viommu.lab.provision.apt import Archive, PrivateApt, host_release, unpack
from viommu.lab.provision.cache import Cache, ProvisionError, recipe_key
from viommu.lab.provision.progress import Say

PROGRAMS = ("chromium", "chromium-headless-shell", "google-chrome")
PACKAGE = "chromium-headless-shell"
_COMMON, _FONTS = "chromium-common", "fonts-dejavu-core"
# Reached through what it never loads here: a graphics stack and its compiler. And the C library is the host's.
_USELESS = re.compile(r"lib(llvm|z3|icu|gl|egl|vulkan|drm|va|c6|c-bin|crypt)[\d.-]*")
_KEPT = re.compile(
    r"usr/lib/chromium/(?!libVk)|(usr/)?lib/[^/]+/(pulseaudio/)?[^/]+\.so[^/]*$"
    r"|usr/share/fonts/.|usr/share/doc/[^/]+/copyright$"
)
_FONT_CONFIGURATION = """\
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{root}/usr/share/fonts</dir><cachedir>{root}/fonts-cache</cachedir></fontconfig>
"""
# The program is started by name, not through a loader: it starts itself again as its own children.
_STARTER = """\
#!/bin/sh
export LD_LIBRARY_PATH={libraries} FONTCONFIG_FILE={root}/fonts.conf
exec {root}/usr/lib/chromium/{package} "$@"
"""


def find(cache: Cache) -> Path | None:
    """A Chromium that is there already."""
    for program in PROGRAMS:
        if path := shutil.which(program):
            return Path(path)
    starter = cache.directory / _directory() / PACKAGE
    return starter if starter.exists() else None


def provide(cache: Cache, say: Say) -> Path:
    """The program to start. Downloads it where there is none; raises `ProvisionError`."""
    found = find(cache)
    if found is not None:
        return found
    try:
        with cache.locked(say):
            return find(cache) or _install(cache, say)
    except ProvisionError as error:
        raise ProvisionError(
            f"No Chromium is on PATH (Debian: apt-get install chromium), and none can be had: {error}"
        ) from error


def _directory() -> str:
    return f"chromium-{recipe_key(Path(__file__))}"


def _install(cache: Cache, say: Say) -> Path:
    release = host_release()
    apt = PrivateApt(
        cache, say, name=f"apt-{release}", suites=(release,), sources=(), architectures=()
    )
    archives = [a for a in apt.closure((PACKAGE, _FONTS), suite=release) if _is_wanted(a)]
    files = apt.fetch(archives, "Chromium")
    say(f"Unpacking Chromium ({len(files)} packages)")
    with cache.building(_directory()) as work:
        for file in files:
            unpack(file, work, lambda path: _KEPT.match(path) is not None)
        root = cache.directory / _directory()  # where it is going to be
        (work / "fonts.conf").write_text(_FONT_CONFIGURATION.format(root=root))
        shared = (path.relative_to(work) for path in work.rglob("lib/*-linux-gnu*/**/*.so*"))
        libraries = ":".join(sorted({str(root / path.parent) for path in shared}))
        starter = work / PACKAGE
        starter.write_text(_STARTER.format(root=root, libraries=libraries, package=PACKAGE))
        starter.chmod(0o755)
    return root / PACKAGE


def _is_wanted(archive: Archive) -> bool:
    if archive.package in {PACKAGE, _COMMON, _FONTS}:
        return True
    return archive.package.startswith(("lib", "zlib")) and not _USELESS.fullmatch(archive.package)


def main() -> int:
    try:
        print(provide(Cache(cache_directory()), lambda text: print(text, file=sys.stderr)))  # noqa: T201
    except ProvisionError as error:
        print(f"viommu.lab.provision.chromium: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
