"""Which test is told what a guest did, and what becomes of the evidence."""

import pytest

from tests.plugin_rig import guests

__all__ = ["guests"]  # a fixture


def run(guests: pytest.Pytester, text: str, *arguments: str) -> tuple[dict[str, int], str]:
    """The outcomes, and what was printed."""
    guests.makepyfile(test_it=text)
    result = guests.runpytest("-p", "no:cacheprovider", *arguments)
    return result.parseoutcomes(), result.stdout.str() + result.stderr.str()


def test_a_setup_that_fails_has_what_the_guest_did_in_it(guests: pytest.Pytester) -> None:
    text = """
        import pytest

        @pytest.fixture
        def driver(viommu_guest):
            viommu_guest.say("WARNING: CPU: 0 at driver.c:1 probe")
            assert False, "insmod failed"

        def test_driver(driver): pass
        def test_innocent(viommu_guest): pass
    """
    outcomes, output = run(guests, text)
    assert outcomes == {"passed": 1, "errors": 1}, output
    assert output.count("WARNING: CPU: 0 at driver.c:1 probe") == 3, (
        "the source, the finding, the log"
    )
    assert "WARNING: CPU: 0 at driver.c:1" in output.partition("aarch64 guest: kernel log")[2]


def test_a_fixture_may_fail_at_its_end_while_the_ledger_watches(guests: pytest.Pytester) -> None:
    text = """
        import pytest

        @pytest.fixture
        def driver(viommu_guest):
            yield
            assert False, "rmmod failed"

        def test_driver(driver): pass
    """
    outcomes, output = run(guests, text, "--viommu-ledger")
    assert outcomes == {"passed": 1, "errors": 1}, output
    assert "clean, 0 events" in output.partition("aarch64 guest: ledger")[2]


def test_evidence_that_cannot_be_kept_ends_no_session(guests: pytest.Pytester) -> None:
    text = """
        def test_one(viommu_guest, pytestconfig):
            kept = pytestconfig.rootpath / "kept"
            kept.mkdir(exist_ok=True)
            (kept / "test_it.py-test_one").write_text("in the way")
            assert False

        def test_other(viommu_guest): pass
    """
    outcomes, output = run(guests, text, "--viommu-artifacts=kept")
    assert outcomes == {"failed": 1, "passed": 1}, output
    assert "not kept: [Errno 17] File exists" in output.partition("viommu: artifacts")[2]


def test_a_place_for_evidence_that_cannot_be_is_refused(guests: pytest.Pytester) -> None:
    guests.makefile("", kept="a file")
    result = guests.runpytest("--viommu-artifacts=kept")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert (
        f"ERROR: --viommu-artifacts: {guests.path}/kept cannot be made: File exists"
        in result.stderr.str()
    )


def test_a_plan_may_end_the_server_it_is_loaded_in(guests: pytest.Pytester) -> None:
    text = """
        import time
        import pytest

        @pytest.mark.viommu_allow("the server of the devices")
        def test_it(viommu_faults, viommu_rig):
            viommu_faults.load('[[effect]]\\nwhen = { after = 0.0 }\\ncall = "server.die"')
            deadline = time.monotonic() + 20
            while viommu_rig.serving.exit_code is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert viommu_rig.serving.exit_code is not None
    """
    outcomes, output = run(guests, text)
    assert outcomes == {"passed": 1}, output


def test_a_guest_with_a_plan_may_be_ended_for_another(guests: pytest.Pytester) -> None:
    text = """
        def test_it(viommu_faults, viommu_lab):
            assert viommu_lab.rig(seed=1)
    """
    outcomes, output = run(guests, text)
    assert outcomes == {"passed": 1}, output


@pytest.mark.parametrize(
    ("dirty", "outcomes"), [(False, {"passed": 1, "failed": 1}), (True, {"passed": 2})]
)
def test_a_server_that_ends_after_a_test_is_told_of_the_next(
    guests: pytest.Pytester, dirty: bool, outcomes: dict[str, int]
) -> None:
    """Unless the guest was for no other test anyway."""
    text = f"""
        import os
        import signal
        import time
        import pytest

        @pytest.fixture
        def killed(viommu_rig):
            yield
            os.kill(viommu_rig.serving.pid, signal.SIGKILL)
            while viommu_rig.serving.exit_code is None:
                time.sleep(0.01)

        @pytest.mark.viommu(dirty={dirty})
        def test_one(killed): pass

        def test_next(viommu_rig):
            assert viommu_rig.serving.exit_code is None
    """
    found, output = run(guests, text)
    assert found == outcomes, output
    assert (
        "since the last test: the server of the devices killed by SIGKILL" in output
    ) is not dirty


def test_each_guest_of_a_test_has_evidence_of_its_own(guests: pytest.Pytester) -> None:
    text = """
        def test_it(viommu_lab):
            for number in range(2):
                viommu_lab.rig(seed=number).guest.console = f"I am {number}"
            assert False
    """
    _, output = run(guests, text, "--viommu-guests=2", "--viommu-artifacts=kept")
    kept = guests.path / "kept/test_it.py-test_it"
    for number, name in enumerate(("aarch64 guest", "aarch64 guest 2")):
        assert f" {name}: console " in output
        stem = name.replace(" ", "-")
        assert (kept / f"{stem}-console.txt").read_text("utf-8") == f"I am {number}"
        assert (kept / f"{stem}-trace.jsonl").is_file()
