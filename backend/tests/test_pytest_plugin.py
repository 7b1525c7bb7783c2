"""The pytest plugin without guests: options, and what a user sees who made a mistake."""

import re
from pathlib import Path

import pytest

from viommu.lab.assets import cache_directory
from viommu.pytest_plugin.news import alarming

ROOT = Path(__file__).parents[2]
CACHE = cache_directory()  # pytester gives each test a home of its own

SHOW = """
    from viommu.pytest_plugin.options import GuestOptions, RunOptions, chosen

    def test_show(pytestconfig):
        print(chosen(pytestconfig, GuestOptions), chosen(pytestconfig, RunOptions))
"""


def shown(pytester: pytest.Pytester, *arguments: str) -> str:
    pytester.makepyfile(SHOW)
    result = pytester.runpytest("-rP", *arguments)
    result.assert_outcomes(passed=1)
    return result.stdout.str()


def test_an_option_is_a_flag_a_variable_and_a_key(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "machine='aarch64-virt', smmu='', raw=False, kernel=None," in shown(pytester)
    pytester.makeini(
        "[pytest]\nviommu_kernel = from-ini\nviommu_raw = yes\nviommu_seed = 0x10\nviommu_guests = 2\n"
    )
    told = shown(pytester)
    assert f"kernel={pytester.path / 'from-ini'!r}" in told
    assert "raw=True" in told
    assert "seed=16" in told
    assert "guests=2" in told
    monkeypatch.setenv("VIOMMU_KERNEL", "/from/environment")
    monkeypatch.setenv("VIOMMU_RAW", "0")
    told = shown(pytester)
    assert "kernel=PosixPath('/from/environment')" in told
    assert "raw=False" in told
    told = shown(pytester, "--viommu-kernel=/from/flag", "--viommu-raw", "--viommu-keep-going")
    assert "kernel=PosixPath('/from/flag')" in told
    assert "raw=True" in told
    assert "keep_going=True" in told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--viommu-seed=much"], "--viommu-seed: 'much' is no number"),
        (["--viommu-guests=0"], "--viommu-guests: 0 is too few, a test needs 1"),
        (["-o", "viommu_raw=perhaps"], "viommu_raw: 'perhaps' is neither true nor false"),
    ],
)
def test_a_wrong_value_is_told(
    pytester: pytest.Pytester, arguments: list[str], sentence: str
) -> None:
    result = pytester.runpytest(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {sentence}" in result.stderr.str()


@pytest.mark.parametrize(
    ("marker", "sentence"),
    [
        ("machin='x'", "viommu: no option 'machin'; there is machine, smmu, raw, kernel,"),
        (
            "machine='x'",
            "no machine 'x'; known: aarch64-nvme, aarch64-virt, x86_64-nvme, x86_64-q35, or a .toml file",
        ),
        ("smmu='stall = 1'", "smmu.stall: unknown key, allowed: "),
        ("qemu='/bin/false'", "/bin/false is no QEMU ≥ 10.1 with vfio-user-pci"),
    ],
)
def test_a_guest_that_cannot_be_is_told(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, marker: str, sentence: str
) -> None:
    monkeypatch.setenv("VIOMMU_CACHE", str(CACHE))
    pytester.makepyfile(f"""
        import pytest
        @pytest.mark.viommu({marker})
        def test_it(viommu_guest): pass
    """)
    result = pytester.runpytest("--strict-markers")
    result.assert_outcomes(errors=1)
    assert sentence in result.stdout.str()


def test_what_is_missing_is_provided_when_it_is_needed(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here from a mirror that is not there."""
    monkeypatch.setenv("VIOMMU_CACHE", str(pytester.path / "cache"))
    monkeypatch.setenv("VIOMMU_DEBIAN_MIRROR", "http://127.0.0.1:9/debian")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    pytester.makepyfile("def test_it(viommu_guest): pass\ndef test_other(): pass")
    result = pytester.runpytest()
    result.assert_outcomes(errors=1, passed=1)
    assert "mirror cannot be reached" in result.stdout.str()


def test_who_wants_no_guest_does_not_load_the_lab(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import sys
        def test_it():
            assert "viommu.pytest_plugin" in sys.modules
            assert not {"viommu.lab", "pydantic", "pexpect"} & set(sys.modules)
    """)
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("message", "alarm"),
    [
        ("WARNING: CPU: 0 PID: 1 at drivers/iommu/iommu.c:1 iommu_free+0x10/0x20", True),
        ("BUG: Bad page state in process sh  pfn:4040", True),
        ("Unable to handle kernel NULL pointer dereference at virtual address 0", True),
        ("INFO: task sh:123 blocked for more than 120 seconds.", True),
        ("rcu: INFO: rcu_sched self-detected stall on CPU", True),
        ("watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [sh:1]", True),
        ("irq 25: nobody cared (try booting with the \"irqpoll\" option)", True),
        ("arm-smmu-v3 8000000000.iommu: event 0x10 received:", False),
        ("8000000000.iommu: unknown/unsupported TT endianness!", False),
        ("rcu: Hierarchical SRCU implementation.", False),
        ("a word of BUG: in the middle", False),
    ],
)  # fmt: skip
def test_what_alarms(message: str, alarm: bool) -> None:
    assert alarming(message) == alarm


def test_the_document_names_every_option(pytester: pytest.Pytester) -> None:
    told = pytester.runpytest("--help").stdout.str()
    options = set(re.findall(r"--viommu-[a-z-]+", told))
    assert len(options) > 10
    document = (ROOT / "docs/pytest.md").read_text("utf-8")
    assert options == set(re.findall(r"--viommu-[a-z-]+", document))
