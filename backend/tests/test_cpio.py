"""The cpio writer, against a reader made from the format's description."""

import stat
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.lab.cpio import CpioEntry, write_cpio

HEADER = 110


def read(archive: bytes, position: int = 0) -> Iterator[tuple[str, int, bytes, tuple[int, int]]]:
    """The members of all archives in `archive`, which may follow one another."""
    while position < len(archive):
        if archive[position] == 0:
            position += 1
            continue
        assert position % 4 == 0
        assert archive[position : position + 6] == b"070701"
        fields = [
            int(archive[position + 6 + 8 * index : position + 14 + 8 * index], 16)
            for index in range(13)
        ]
        mode, size, name_size = fields[1], fields[6], fields[11]
        start = position + HEADER
        name = archive[start : start + name_size]
        assert name.endswith(b"\0")
        start = -(-(start + name_size) // 4) * 4
        data = archive[start : start + size]
        assert len(data) == size
        position = -(-(start + size) // 4) * 4
        if name != b"TRAILER!!!\0":
            yield name[:-1].decode(), mode, data, (fields[9], fields[10])


def test_kinds_of_member() -> None:
    entries = [
        CpioEntry.directory("etc", 0o700),
        CpioEntry.file("etc/motd", b"hello", 0o600),
        CpioEntry.symlink("bin", "usr/bin"),
        CpioEntry.character_device("console", 5, 1),
    ]
    assert list(read(write_cpio(entries))) == [
        ("etc", stat.S_IFDIR | 0o700, b"", (0, 0)),
        ("etc/motd", stat.S_IFREG | 0o600, b"hello", (0, 0)),
        ("bin", stat.S_IFLNK | 0o777, b"usr/bin", (0, 0)),
        ("console", stat.S_IFCHR | 0o600, b"", (5, 1)),
    ]


def test_parents_come_first_and_once() -> None:
    names = [
        name
        for name, *_ in read(
            write_cpio(
                [
                    CpioEntry.file("a/b/c", b""),
                    CpioEntry.file("a/b/d", b""),
                    CpioEntry.directory("a"),
                ]
            )
        )
    ]
    assert names == ["a", "a/b", "a/b/c", "a/b/d"]


def test_archives_can_follow_one_another() -> None:
    one, two = (write_cpio([CpioEntry.file(name, name.encode())]) for name in "ab")
    assert len(one) % 512 == 0
    assert [data for _, _, data, _ in read(one + two)] == [b"a", b"b"]


@pytest.mark.parametrize(
    "path", ["/etc", "../etc", "a/../b", "a//b", "a/", "./a", "", ".", "a\0b", "TRAILER!!!"]
)
def test_path_that_is_not_plain(path: str) -> None:
    with pytest.raises(ValueError, match=r"path"):
        write_cpio([CpioEntry.file(path, b"")])


def test_same_path_twice() -> None:
    with pytest.raises(ValueError, match="two members"):
        write_cpio([CpioEntry.file("a", b"1"), CpioEntry.file("a", b"2")])


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0.!"), min_size=1, max_size=20)


@given(st.dictionaries(NAMES, st.binary(max_size=40), max_size=10))
def test_contents_survive(files: dict[str, bytes]) -> None:
    archive = write_cpio(CpioEntry.file(name, data) for name, data in files.items())
    assert {name: data for name, _, data, _ in read(archive)} == files
