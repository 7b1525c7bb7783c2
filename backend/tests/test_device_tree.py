"""The node of an SMMU in a device tree, on trees with just what matters."""

import libfdt
import pytest

from viommu.lab.device_tree import add_smmu
from viommu.lab.errors import LabError

HIGH = 0x80_0000_0000
# Space code, PCI address, CPU address, size: a window of I/O ports, one of 32 and one of 64 bits.
PORTS = (0x0100_0000, 0, 0, 0, 0x3EFF_0000, 0, 0x1_0000)
LOW_WINDOW = (0x0200_0000, 0, 0x1000_0000, 0, 0x1000_0000, 0, 0x2EFF_0000)
HIGH_WINDOW = (0x0300_0000, 0x80, 0, 0x80, 0, 0x80, 0)


def cells(*values: int) -> bytes:
    return b"".join(value.to_bytes(4, "big") for value in values)


def a_tree(*windows: tuple[int, ...], host: str = "pcie@10000000") -> bytes:
    tree = libfdt.Fdt.create_empty_tree(4096)
    root = tree.path_offset("/")
    node = tree.add_subnode(root, host)
    tree.setprop(node, "ranges", b"".join(cells(*window) for window in windows))
    tree.setprop_u32(node, "phandle", 0x8003)
    return bytes(tree.as_bytearray())


def props(blob: bytes, path: str) -> dict[str, bytes]:
    tree = libfdt.Fdt(bytearray(blob))
    found = {}
    at = tree.first_property_offset(tree.path_offset(path), [libfdt.NOTFOUND])
    while at >= 0:
        each = tree.get_property_by_offset(at)
        found[each.name] = bytes(each)
        at = tree.next_property_offset(at, [libfdt.NOTFOUND])
    return found


def test_root_ports_are_not_behind_the_smmu() -> None:
    host = props(add_smmu(a_tree(HIGH_WINDOW), 1, [2, 4]).blob, "/pcie@10000000")
    mapped = cells(0x18, 0x8004, 0x18, 0x8) + cells(0x28, 0x8004, 0x28, 0xFFD8)
    assert host["iommu-map"] == mapped


def test_ats_is_for_those_who_ask() -> None:
    host, asked = (
        props(add_smmu(a_tree(HIGH_WINDOW), 1, ats=ats).blob, "/pcie@10000000")
        for ats in (False, True)
    )
    assert asked == {**host, "ats-supported": b""}


def test_the_node() -> None:
    made = add_smmu(a_tree(PORTS, LOW_WINDOW, HIGH_WINDOW), 1)
    assert (made.address, made.node) == (HIGH, "8000000000.iommu")
    assert props(made.blob, "/iommu@8000000000") == {
        "compatible": b"arm,smmu-v3\0",
        "reg": cells(0x80, 0, 0, 0x2_0000),
        "interrupts": cells(0, 4, 1),
        "interrupt-names": b"combined\0",
        "#iommu-cells": cells(1),
        "dma-coherent": b"",
        "phandle": cells(0x8004),
    }


@pytest.mark.parametrize(
    ("slot", "mapped"),
    [
        (1, cells(0x10, 0x8004, 0x10, 0xFFF0)),
        (5, cells(0x8, 0x8004, 0x8, 0x20) + cells(0x30, 0x8004, 0x30, 0xFFD0)),
        (31, cells(0x8, 0x8004, 0x8, 0xF0) + cells(0x100, 0x8004, 0x100, 0xFF00)),
    ],
)
def test_every_function_but_the_bridge_and_the_smmu_is_translated(slot: int, mapped: bytes) -> None:
    host = props(add_smmu(a_tree(HIGH_WINDOW), slot).blob, "/pcie@10000000")
    assert host["iommu-map"] == mapped
    assert host["iommu-map-mask"] == cells(0xFFFF)


@pytest.mark.parametrize(("slot", "interrupt"), [(1, 4), (2, 5), (3, 6), (4, 3), (5, 4)])
def test_the_interrupt_is_that_of_the_slot(slot: int, interrupt: int) -> None:
    node = props(add_smmu(a_tree(HIGH_WINDOW), slot).blob, "/iommu@8000000000")
    assert node["interrupts"] == cells(0, interrupt, 1)


def test_the_rest_of_the_tree_stays() -> None:
    before = a_tree(PORTS, HIGH_WINDOW)
    after = props(add_smmu(before, 1).blob, "/pcie@10000000")
    assert {name: after[name] for name in ("ranges", "phandle")} == props(before, "/pcie@10000000")


@pytest.mark.parametrize(
    ("blob", "why"),
    [
        (a_tree(HIGH_WINDOW, host="usb@0"), "no PCI host"),
        (a_tree(PORTS, LOW_WINDOW), "no 64-bit window"),
        (b"no tree at all" * 10, "cannot be edited"),
    ],
)
def test_what_is_no_such_tree_is_said_in_a_sentence(blob: bytes, why: str) -> None:
    with pytest.raises(LabError, match=why):
        add_smmu(blob, 1)
