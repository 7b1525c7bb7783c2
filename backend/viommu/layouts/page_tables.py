"""VMSAv8-64 translation table descriptors (DDI 0487, D8.3)."""

from viommu.layouts.bitfields import Layout, bits


class TableDescriptor(Layout, size=8):
    """A table descriptor of levels 0 to 2; the hierarchical attributes bind everything below it (D8.3.1)."""

    valid = bits(0, kind=bool)
    table = bits(1, kind=bool)
    next_table = bits(47, 12, scale=4096)
    pxn_table = bits(59, kind=bool)
    xn_table = bits(60, kind=bool)
    ap_table = bits(62, 61)
    ns_table = bits(63, kind=bool)


class LeafDescriptor(Layout, size=8):
    """A stage 1 block or page descriptor; `page` is 1 at level 3 and 0 for a block (D8.3.2)."""

    valid = bits(0, kind=bool)
    page = bits(1, kind=bool)
    attr_index = bits(4, 2)
    ns = bits(5, kind=bool)
    ap_user = bits(6, kind=bool)
    ap_read_only = bits(7, kind=bool)
    sh = bits(9, 8)
    af = bits(10, kind=bool)
    ng = bits(11, kind=bool)
    address = bits(47, 12, scale=4096)
    dbm = bits(51, kind=bool)
    contiguous = bits(52, kind=bool)
    pxn = bits(53, kind=bool)
    xn = bits(54, kind=bool)


class Stage2LeafDescriptor(Layout, size=8):
    """A stage 2 block or page descriptor (D8.3.2)."""

    valid = bits(0, kind=bool)
    page = bits(1, kind=bool)
    mem_attr = bits(5, 2)
    s2ap_read = bits(6, kind=bool)
    s2ap_write = bits(7, kind=bool)
    sh = bits(9, 8)
    af = bits(10, kind=bool)
    address = bits(47, 12, scale=4096)
    dbm = bits(51, kind=bool)
    contiguous = bits(52, kind=bool)
    xn = bits(54, 53)
