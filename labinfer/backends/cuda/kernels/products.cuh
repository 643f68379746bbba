// What the two kernels for few tokens share: up to three matrices that meet the same x, in tiles of 16 rows, and what
// becomes of a tile's sums. GLU: a tile is 8 rows of the first matrix and the same 8 of the second, joined by the
// activation. ADD: y = residual + product. NORM: x is normed first, by `s.scale`.
#define WARPS 8
struct Part {
    const u8 *w;
    const float *bias;
    float *y;
    int y_row, rows;
};
DEV int tiles_of(int rows) { return (rows + 15) / 16; }
// The matrix that a tile is of; the tile's number becomes that within it.
DEV int part_of(const Part (&p)[3], int &tile) {
    int part = 0;
#ifndef GLU
    while (part < 2 && tile >= tiles_of(p[part].rows)) tile -= tiles_of(p[part++].rows);
#endif
    return part;
}

// Thread (row, m) turns the sums of row and token m (`sum(row, m)`) into a result.
template <class Sum>
DEV void finish(const Part (&p)[3], int tile, int tokens, const float *residual, int residual_row, int function, Sum sum) {
#ifdef GLU
    int row = threadIdx.x % 8, m = threadIdx.x / 8, at = tile * 8 + row;
    if (m >= tokens || at >= p[0].rows) return;
    float gate = sum(row, m) + (p[0].bias ? p[0].bias[at] : 0.f), up = sum(row + 8, m) + (p[1].bias ? p[1].bias[at] : 0.f);
    p[0].y[(size_t)m * p[0].y_row + at] = activate(function, gate) * up;
#else
    int row = threadIdx.x % 16, m = threadIdx.x / 16, part = part_of(p, tile), at = tile * 16 + row;
    if (m >= tokens || at >= p[part].rows) return;
    float v = sum(row, m) + (p[part].bias ? p[part].bias[at] : 0.f);
#ifdef ADD
    v += get(residual + (size_t)m * residual_row + at);
#endif
    p[part].y[(size_t)m * p[part].y_row + at] = v;
#endif
}
