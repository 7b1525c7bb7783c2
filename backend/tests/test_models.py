"""A class of the user's own as the model of a function: how it is found, and the one sentence that refuses it."""

import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from tests.server_rig import Machine
from vfio_user import SocketError
from viommu.endpoints.base import Endpoint
from viommu.endpoints.nvme.controller import NvmeController
from viommu.endpoints.port import DmaPort
from viommu.endpoints.test_engine import SmmuTestEngine
from viommu.memory import GuestMemory
from viommu.models import ModelError, make_endpoint
from viommu.trace import Tracer

GOOD = """
from viommu.endpoints.master import Bar, DmaMaster, Identity

class Mine(DmaMaster):
    identity = Identity(0x1234, 0x5305, 0xFF0000)
    bars = (Bar(0, 0x1000),)

    def __init__(self, *given, depth=4, **named):
        super().__init__(*given, **named)
        self.depth = depth

    def power_on(self):
        self.register = self.depth

    def read(self, bar, offset, size):
        return self.register

    def write(self, bar, offset, size, value):
        self.register = value
"""


def spec(model: str, **options: Any) -> SimpleNamespace:
    return SimpleNamespace(
        name="mine",
        model=model,
        stream_id=0x10,
        disk=None,
        disk_format=None,
        snapshot=False,
        size=1 << 20,
        write_cache="host",
        options=options,
    )


def make(model: str, **options: Any) -> Any:
    port = DmaPort(GuestMemory(), 0x10)
    with ExitStack() as held:
        return make_endpoint(
            spec(model, **options),
            port,
            order=Random(1),
            tracer=Tracer(),
            held=held,
            wake=lambda: None,
        )


@pytest.fixture(autouse=True)
def _importing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test imports, and where from, is forgotten."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Writes a file, whose path it returns."""

    def written(text: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return written


def test_ours_have_names() -> None:
    assert isinstance(make("test-engine"), SmmuTestEngine)
    assert isinstance(make("nvme"), NvmeController)


def test_a_class_in_a_file(write: Callable[[str], str]) -> None:
    path = write(GOOD)
    model = make(f"{path}:Mine", depth=7)
    assert (model.name, model.read(0, 0, 4)) == ("mine", 7), "it has been powered on"
    assert isinstance(model, Endpoint)
    assert type(make(f"{path}:Mine")) is type(model), "the file is run once"


def test_a_class_in_a_package(
    write: Callable[[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme").mkdir()
    write(GOOD, "acme/chips.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert make("acme.chips:Mine").read(0, 0, 4) == 4


def test_a_file_imports_what_lies_beside_it(write: Callable[..., str]) -> None:
    write(GOOD, "family_of_mine.py")
    path = write("import family_of_mine\nclass Other(family_of_mine.Mine): pass\n")
    assert make(f"{path}:Other").read(0, 0, 4) == 4


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        ("Mime", "", "", "there is no 'Mime', but Mine"),
        ("Mine", "(DmaMaster)", "", "it is no Endpoint: derive it from viommu.endpoints.master."),
        ("Bar", "", "", "it is no Endpoint: derive it from viommu.endpoints.master.DmaMaster"),
        ("Mine", "def read", "def reed", "every endpoint needs read, and it has none"),
        ("Mine", "identity =", "ids =", "every endpoint needs identity, and it has none"),
        ("Mine", "Identity(0x1234, 0x5305, 0xFF0000)", "(1, 2)", "its identity must be an Ident"),
        ("Mine", "(Bar(0, 0x1000),)", "(Bar(0, 0x1000))", "its bars must be a tuple of Bar: (Bar("),
        ("Mine", "class", "clas", "SyntaxError: invalid syntax (mine.py, line 4)"),
        ("Mine", "import Bar", "import Foo", "ImportError: cannot import name 'Foo'"),
        ("Mine", "class Mine", "1 / 0\nclass Mine", "ZeroDivisionError: division by zero (mine.py, l"),
        ("Mine", "class Mine", "raise SystemExit(3)\nclass Mine", "SystemExit: 3 (mine.py, line 4)"),
        ("Mine", "super()", "1 / 0; super()", "ZeroDivisionError: division by zero (mine.py, line 9)"),
        ("Mine", "super()", "raise ValueError('two\\n lines'); super()", "ValueError: two lines (mine"),
        ("Mine", "= self.depth", "= self.deep", "AttributeError: 'Mine' object has no attribute 'deep'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(
    write: Callable[[str], str], name: str, old: str, new: str, sentence: str
) -> None:
    path = write(GOOD.replace(old, new) if old else GOOD)
    with pytest.raises(ModelError) as raised:
        make(f"{path}:{name}")
    assert str(raised.value).startswith(f"device 'mine': {path}:{name}: {sentence}")
    assert "\n" not in str(raised.value)


def test_a_file_that_failed_can_be_mended(write: Callable[[str], str]) -> None:
    with pytest.raises(ModelError):
        make(f"{write('1 / 0')}:Mine")
    assert make(f"{write(GOOD)}:Mine").depth == 4


def test_an_option_that_it_does_not_take(write: Callable[[str], str]) -> None:
    with pytest.raises(ModelError, match=r"TypeError: .*unexpected keyword argument 'deep'"):
        make(f"{write(GOOD)}:Mine", deep=3)


def test_what_is_not_there(write: Callable[[str], str], tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"no such file; its path begins at the folder of the TOML"
    ):
        make(f"{tmp_path}/none.py:Mine")
    with pytest.raises(ModelError, match="ModuleNotFoundError: No module named 'acme'"):
        make("acme.chips:Mine")
    with pytest.raises(ModelError, match="there is no 'Mine', but no endpoint at all"):
        make(f"{write('')}:Mine")


# What shows only when it is served


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("0x1000", "0x1001", "BAR 0: 0x1001 is no power of two from 16 to 2 GiB"),
        ("Bar(0, 0x1000)", "Bar(5, 0x1000)", "there is no 64-bit BAR 5"),
        ("Bar(0, 0x1000),", "Bar(0, 16), Bar(1, 16)", "BAR 1 is taken"),
        ("0x1234", "0x12345", "identity: 0x12345 does not fit 16 bits"),
        ("0x1234", "'acme'", "TypeError: "),
    ],
)
def test_what_cannot_be_served_is_told(
    write: Callable[[str], str], old: str, new: str, sentence: str
) -> None:
    path = write(GOOD.replace(old, new))
    with (
        tempfile.TemporaryDirectory(prefix="vs-", dir="/tmp") as short,
        pytest.raises(ModelError) as raised,
    ):
        Machine(Path(short), functions=[spec(f"{path}:Mine")])
    assert str(raised.value).startswith(f"device 'mine': {path}:Mine: {sentence}")


def test_a_socket_that_cannot_be_is_not_the_models_fault(
    write: Callable[[str], str], tmp_path: Path
) -> None:
    with pytest.raises(SocketError):
        Machine(tmp_path / "none", functions=[spec(f"{write(GOOD)}:Mine")])


def test_the_device_of_the_documentation(write: Callable[..., str]) -> None:
    text = (Path(__file__).parents[2] / "docs/devices.md").read_text("utf-8")
    device, drive = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    path = write(device, "fill.py")
    assert make(f"{path}:Fill", byte=3).page == b"\3" * 4096
    exec(f"{device}\n{drive}", {"__name__": "fill"})
