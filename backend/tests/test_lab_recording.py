"""What is kept of a console with its times, and a command's output while it comes."""

import time
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from viommu.lab.recording import ConsoleLine, Recorder, last_stamp, with_kernel_log
from viommu.lab.shell import Between

BEGIN, END = b"0123456789abcdef<", b">0123456789abcdef"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in pairwise(edges)]


@given(
    st.binary(),
    st.binary().filter(lambda data: END not in data + END[:-1]),
    st.binary(),
    st.lists(st.integers(0)),
)
def test_what_is_between_the_marks_comes_however_it_is_cut(
    before: bytes, output: bytes, after: bytes, places: list[int]
) -> None:
    got: list[bytes] = []
    between = Between(BEGIN, END, got.append)
    for piece in cut(before + BEGIN + output + END + after, places):
        between.feed(piece)
    assert b"".join(got) == output


def test_output_does_not_wait_for_the_end() -> None:
    got: list[bytes] = []
    between = Between(BEGIN, END, got.append)
    between.feed(b"echo " + BEGIN + b"first\n>01")
    assert got == [b"first\n"]
    between.feed(b"2\nlast>0123")
    assert b"".join(got) == b"first\n>012\nlast"


def test_a_line_has_the_time_of_its_first_byte() -> None:
    recorder = Recorder()
    start = time.monotonic()
    recorder.feed(b"[    0.5] one\r\ntw")
    time.sleep(0.05)
    recorder.feed(b"o\r\n0123456789abcdef<three>0123456789abcdef1;")
    one, two, three = recorder.lines(start)
    assert [one.text, two.text, three.text] == ["[    0.5] one", "two", "three[status 1]"]
    assert one.time is not None
    assert one.time == two.time
    assert three.time is not None
    assert three.time >= one.time + 0.05


def test_what_the_kernel_said_in_its_log_alone_comes_in_between() -> None:
    console = [ConsoleLine("[    1.000000] boots", 3.0), ConsoleLine("$ id", 5.0)]
    log = "[    1.000000] boots\n[    2.500000] late\nno stamp\n[    4.000000] later\n"
    lines = with_kernel_log(console, log, last_stamp(console), booted=2.0)
    assert [(line.text, line.time) for line in lines] == [
        ("[    1.000000] boots", 3.0),
        ("[    2.500000] late", 4.5),
        ("$ id", 5.0),
        ("[    4.000000] later", 6.0),
    ]
