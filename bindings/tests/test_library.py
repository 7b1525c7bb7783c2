"""Finding libvfio-user, and telling its two interfaces apart.

API 0.2 is a stub here: it shows which arguments arrive, nothing else.
"""

import ctypes
import errno
import shutil
import subprocess
from pathlib import Path

import pytest

from vfio_user import Library, LibraryError, LibraryNotFound, PciDevice, abi
from vfio_user.library import cache_directory

# What the stub does more than return 0.
STUB = r"""
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static char context[1], config[4096];
static int fd;
size_t seen_max_regions;
void *seen_register, *seen_unregister;
int seen_flags, seen_shadow_fd;
size_t seen_shadow_offset;

void *vfu_create_ctx(int transport, const char *path, int flags, void *data, int type)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    strcpy(address.sun_path, path);
    fd = socket(AF_UNIX, SOCK_STREAM, 0);
    return bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0 ? context : NULL;
}

void vfu_destroy_ctx(void *ctx) { close(fd); }
int vfu_get_poll_fd(void *ctx) { return fd; }
void *vfu_pci_get_config_space(void *ctx) { return config; }

int vfu_setup_device_dma(void *ctx, size_t max_regions, void *register_, void *unregister)
{
    seen_max_regions = max_regions;
    seen_register = register_;
    seen_unregister = unregister;
    return 0;
}

int vfu_sgl_read(void *ctx, void *sg, size_t count, void *data, int flags)
{
    seen_flags = flags;
    return 0;
}

int vfu_create_ioeventfd(void *ctx, uint32_t region, int event, size_t offset, uint32_t size,
                         uint32_t flags, uint64_t match, int shadow_fd, size_t shadow_offset)
{
    seen_shadow_fd = shadow_fd;
    seen_shadow_offset = shadow_offset;
    return 0;
}
"""


def build(directory: Path, source: str) -> Path:
    compiler = shutil.which("cc")
    assert compiler, "this test needs a C compiler: install gcc"
    (directory / "stub.c").write_text(source)
    library = directory / "libstub.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-w", "-o", str(library), str(directory / "stub.c")],
        check=True,
    )
    return library


def stub_of(functions: dict[str, abi.Signature]) -> str:
    rest = [name for name in functions if f" {name}(" not in STUB and f"*{name}(" not in STUB]
    return STUB + "".join(f"int {name}() {{ return 0; }}\n" for name in rest)


def test_the_real_library_has_every_function_declared() -> None:
    library = Library.load()
    assert library.api in {(0, 1), (0, 2)}
    declared = abi.API_0_1 if library.api == (0, 1) else abi.API_0_2
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", real_path()], capture_output=True, text=True, check=True
    )
    exported = {line.split()[-1] for line in listing.stdout.splitlines()}
    public = {name for name in exported if name.startswith(("vfu_", "dma_sg_size"))}
    assert public == declared.keys()
    for name, (result, arguments) in declared.items():
        function = getattr(library.call, name)
        assert function.restype is result
        assert function.argtypes == arguments


def real_path() -> str:
    """The file that the dynamic linker took for the library."""
    with open("/proc/self/maps", encoding="ascii") as maps:  # noqa: PTH123 - a pseudo file
        return next(line.split()[-1] for line in maps if "libvfio-user.so" in line)


def test_the_real_library_answers(directory: Path) -> None:
    library = Library.load()
    assert 8 <= library.call.dma_sg_size() <= 256
    if library.api == (0, 1):
        assert library.call.vfu_get_migr_register_area_size() % 0x1000 == 0
    context = library.call.vfu_create_ctx(0, str(directory / "x.sock").encode(), 1, None, 0)
    with pytest.raises(LibraryError, match="vfu_run_ctx: Invalid argument"):
        library.check("vfu_run_ctx", context)
    library.call.vfu_destroy_ctx(context)
    assert library.call.vfu_create_ctx(0, b"/nonexistent/x.sock", 1, None, 0) is None
    assert ctypes.get_errno() == errno.ENOENT


def test_api_0_2_is_recognized_and_called_as_declared(directory: Path) -> None:
    library = Library(str(build(directory, stub_of(abi.API_0_2))))
    assert library.api == (0, 2)
    stub = ctypes.CDLL(library.name)
    path = directory / "stub.sock"
    with PciDevice(
        path, vendor_id=1, device_id=1, class_code=0, max_dma_regions=77, library=library
    ):
        assert ctypes.c_size_t.in_dll(stub, "seen_max_regions").value == 77
        first = ctypes.c_void_p.in_dll(stub, "seen_register").value
        second = ctypes.c_void_p.in_dll(stub, "seen_unregister").value
        assert first
        assert second
        assert first != second
    library.call.vfu_sgl_read(1, None, 1, None, 5)
    assert ctypes.c_int.in_dll(stub, "seen_flags").value == 5
    library.call.vfu_create_ioeventfd(1, 0, 0, 0, 0, 0, 0, -1, 1 << 40)
    assert ctypes.c_int.in_dll(stub, "seen_shadow_fd").value == -1
    assert ctypes.c_size_t.in_dll(stub, "seen_shadow_offset").value == 1 << 40


def test_api_0_1_is_recognized(directory: Path) -> None:
    assert Library(str(build(directory, stub_of(abi.API_0_1)))).api == (0, 1)


def test_something_else_is_refused(directory: Path) -> None:
    library = build(directory, "int nothing;")
    with pytest.raises(LibraryNotFound, match=r"no function .*VFIO_USER_LIBRARY.*scripts/setup"):
        Library(str(library))


def test_the_environment_comes_first(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = str(build(directory, stub_of(abi.API_0_2)))
    monkeypatch.setenv("VFIO_USER_LIBRARY", chosen)
    library = Library.load()
    assert (library.name, library.origin) == (chosen, "$VFIO_USER_LIBRARY")
    monkeypatch.setenv("VFIO_USER_LIBRARY", "/nonexistent/lib.so")
    with pytest.raises(LibraryNotFound, match=r"VFIO_USER_LIBRARY: /nonexistent/lib\.so"):
        Library.load()


def test_the_system_comes_before_what_setup_built(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VFIO_USER_LIBRARY", raising=False)
    monkeypatch.setenv("VIOMMU_CACHE", str(directory))
    (directory / "libvfio-user" / "lib").mkdir(parents=True)
    built = build(directory, stub_of(abi.API_0_1))
    place = directory / "libvfio-user" / "lib" / "libvfio-user.so.0.0.1"
    shutil.move(built, place)
    monkeypatch.setattr("vfio_user.library.SYSTEM_NAMES", ("libviommu-absent.so",))
    library = Library.load()
    assert (library.name, library.origin) == (str(place), "scripts/setup")
    monkeypatch.setattr("vfio_user.library.SYSTEM_NAMES", ("libviommu-absent.so", str(place)))
    assert Library.load().origin == "system"


def test_nowhere_is_one_clear_error(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VFIO_USER_LIBRARY", raising=False)
    monkeypatch.setenv("VIOMMU_CACHE", str(directory))
    monkeypatch.setattr("vfio_user.library.SYSTEM_NAMES", ("libviommu-absent.so",))
    with pytest.raises(LibraryNotFound, match=r"^libvfio-user not found: run scripts/setup, "):
        Library.load()


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("VIOMMU_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == Path("/home/somebody/.cache/viommu")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == Path("/xdg/viommu")
    monkeypatch.setenv("VIOMMU_CACHE", "/own")
    assert cache_directory() == Path("/own")
