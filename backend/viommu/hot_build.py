"""Builds `viommu._hot`: the three loops that a DMA of many scattered pages spends its time in.

Each has its Python twin in `viommu.hot`, which says what it does.
"""

from cffi import FFI

ffibuilder = FFI()

ffibuilder.cdef("""
typedef struct { uint64_t base, size; uint8_t *host; uint64_t access; } vi_region;

uint32_t vi_fill(const uint64_t *descriptors, uint64_t *slots, uint32_t count,
                 uint64_t mask, uint64_t expected, uint64_t address_mask, uint64_t flags);
uint32_t vi_collect(const uint64_t *slots, uint32_t count, uint64_t need, uint32_t page_shift,
                    uint64_t offset, uint64_t length, uint64_t *runs, uint64_t *covered);
int vi_compare_exchange(uint64_t *word, uint64_t expected, uint64_t value);
uint64_t vi_move(const vi_region *regions, uint32_t region_count,
                 const uint64_t *runs, uint32_t run_count,
                 uint8_t *buffer, uint64_t length, int to_guest);
""")

ffibuilder.set_source(
    "viommu._hot",
    """
#include <stdint.h>
#include <string.h>

typedef struct { uint64_t base, size; uint8_t *host; uint64_t access; } vi_region;

static uint32_t vi_fill(const uint64_t *descriptors, uint64_t *slots, uint32_t count,
                        uint64_t mask, uint64_t expected, uint64_t address_mask, uint64_t flags)
{
    uint32_t i;
    for (i = 0; i < count; i++) {
        /* one load: the guest may be writing the table */
        uint64_t descriptor = __atomic_load_n(&descriptors[i], __ATOMIC_RELAXED);
        if (slots[i] || (descriptor & mask) != expected)
            break;
        slots[i] = (descriptor & address_mask) | flags;
    }
    return i;
}

static uint32_t vi_collect(const uint64_t *slots, uint32_t count, uint64_t need,
                           uint32_t page_shift, uint64_t offset, uint64_t length,
                           uint64_t *runs, uint64_t *covered)
{
    const uint64_t page = 1ull << page_shift, address_mask = ~(page - 1) & ((1ull << 52) - 1);
    uint64_t done = 0;
    uint32_t n = 0;
    for (uint32_t i = 0; i < count && done < length; i++, offset = 0) {
        if ((slots[i] & need) != need)
            break;
        uint64_t start = (slots[i] & address_mask) + offset, part = page - offset;
        if (part > length - done)
            part = length - done;
        if (n && runs[2 * n - 2] + runs[2 * n - 1] == start) {
            runs[2 * n - 1] += part;
        } else {
            runs[2 * n] = start;
            runs[2 * n + 1] = part;
            n++;
        }
        done += part;
    }
    *covered = done;
    return n;
}

static int vi_compare_exchange(uint64_t *word, uint64_t expected, uint64_t value)
{
    return __atomic_compare_exchange_n(word, &expected, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

static uint64_t vi_move(const vi_region *regions, uint32_t region_count,
                        const uint64_t *runs, uint32_t run_count,
                        uint8_t *buffer, uint64_t length, int to_guest)
{
    const uint64_t wanted = to_guest ? 2 : 1;
    const vi_region *region = regions;
    uint64_t moved = 0, total = 0;
    for (uint32_t i = 0; i < run_count; i++)
        total += runs[2 * i + 1];
    if (total != length)
        return UINT64_MAX;
    for (uint32_t i = 0; i < run_count; i++) {
        uint64_t address = runs[2 * i], left = runs[2 * i + 1];
        while (left) {
            if (!region_count)
                return moved;
            if (address < region->base || address - region->base >= region->size) {
                uint32_t k;
                for (k = 0; k < region_count; k++)
                    if (address >= regions[k].base && address - regions[k].base < regions[k].size)
                        break;
                if (k == region_count)
                    return moved;
                region = &regions[k];
            }
            if (!region->host || (region->access & wanted) == 0)
                return moved;
            uint64_t offset = address - region->base, part = region->size - offset;
            if (part > left)
                part = left;
            if (to_guest)
                memcpy(region->host + offset, buffer + moved, part);
            else
                memcpy(buffer + moved, region->host + offset, part);
            moved += part;
            address += part;
            left -= part;
        }
    }
    return moved;
}
""",
    extra_compile_args=["-O2"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
