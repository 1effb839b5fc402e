// The aligned crop out of a wide frame: bilinear, the arithmetic of Pillow's affine transform in its order.
#include <cstdint>

// A fused multiply-add rounds once where Pillow rounds twice, and a colour between two grey levels would fall otherwise.
#if defined(__clang__)
#define TWO_ROUNDINGS
#pragma clang fp contract(off)
#else
#define TWO_ROUNDINGS __attribute__((optimize("fp-contract=off")))
#endif

extern "C" {

// image: rows of `stride` bytes. For every output column and channel: columns, where its left neighbour is in a row, and
// dx, the share of the right one; for every output row: rows, its upper neighbour, and dy, the share of the lower one.
TWO_ROUNDINGS void align(const uint8_t *image, int64_t stride, int64_t size, const int64_t *columns, const double *dx,
                         const int64_t *rows, const double *dy, uint8_t *out) {
    const int64_t count = 3 * size;
    for (int64_t y = 0; y < size; ++y) {
        const uint8_t *upper = image + rows[y] * stride, *lower = upper + stride;
        for (int64_t k = 0; k < count; ++k) {
            const int64_t at = columns[k];
            const double above = upper[at] + (upper[at + 3] - upper[at]) * dx[k];
            const double below = lower[at] + (lower[at + 3] - lower[at]) * dx[k];
            out[y * count + k] = static_cast<uint8_t>(above + (below - above) * dy[y]);
        }
    }
}
}
