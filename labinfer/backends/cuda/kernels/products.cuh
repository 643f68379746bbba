// What the two kernels for few tokens share: up to three matrices that meet the same x, in tiles of 16 rows, and what
// becomes of a tile's sums. GLU: a tile is 8 rows of the first matrix and the same 8 of the second, joined by the
// activation. ADD: y = residual + product. NORM: x is normed first, by `s.scale`.
#define WARPS 8
#define CHUNK 2048  // columns of a tile that come to shared memory at once, in `stream.cu`
struct Part {
    const u8 *w;
    const float *bias;
    float *y;
    int y_row, rows;
};
struct Parts {
    Part p[3];
};
DEV int tiles_of(int rows) { return (rows + 15) / 16; }
// The matrix that a tile is of; the tile's number becomes that within it.
DEV int part_of(const Parts &parts, int &tile) {
    int part = 0;
#ifndef GLU
    while (part < 2 && tile >= tiles_of(parts.p[part].rows)) tile -= tiles_of(parts.p[part++].rows);
#endif
    return part;
}

// What the item-th thread, of (row, m), adds to its result: read early, it costs nothing.
DEV float residual_at(const Parts &parts, int tile, int item, int tokens, const float *residual, int residual_row) {
    int m = item / 16, part = part_of(parts, tile), at = tile * 16 + item % 16;
    return m < tokens && at < parts.p[part].rows ? get(residual + (size_t)m * residual_row + at) : 0.f;
}

// The item-th thread, of (row, m), turns the sums of row and token m (`sum(row, m)`) into a result.
template <class Sum> DEV void finish(const Parts &parts, int tile, int item, int tokens, float residue, int function, Sum sum) {
#ifdef GLU
    int row = item % 8, m = item / 8, at = tile * 8 + row;
    if (m >= tokens || at >= parts.p[0].rows) return;
    float gate = sum(row, m) + (parts.p[0].bias ? parts.p[0].bias[at] : 0.f), up = sum(row + 8, m) + (parts.p[1].bias ? parts.p[1].bias[at] : 0.f);
    ((Out *)parts.p[0].y)[(size_t)m * parts.p[0].y_row + at] = out_of(activate(function, gate) * up);
#else
    int row = item % 16, m = item / 16, part = part_of(parts, tile), at = tile * 16 + row;
    if (m >= tokens || at >= parts.p[part].rows) return;
    parts.p[part].y[(size_t)m * parts.p[part].y_row + at] = sum(row, m) + (parts.p[part].bias ? parts.p[part].bias[at] : 0.f) + residue;
#endif
}
