// Kernels that work on each number by itself. Rows of x, z and y are `*_row` floats apart; a thread takes four numbers.
// y = f(x), number by number, and y = f(x, z).
template <class F> DEV void each(const float *x, int x_row, Out *y, int y_row, int n, F f) {
    int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x), t = blockIdx.y;
    begin();
    if (i >= n) return;
    float4 a = load(x + (size_t)t * x_row + i, n - i);
    store(y + (size_t)t * y_row + i, n - i, f(a.x), f(a.y), f(a.z), f(a.w));
}
template <class F> DEV void pairs(const float *x, int x_row, const float *z, int z_row, Out *y, int y_row, int n, F f) {
    int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x), t = blockIdx.y;
    begin();
    if (i >= n) return;
    float4 a = load(x + (size_t)t * x_row + i, n - i), b = load(z + (size_t)t * z_row + i, n - i);
    store(y + (size_t)t * y_row + i, n - i, f(a.x, b.x), f(a.y, b.y), f(a.z, b.z), f(a.w, b.w));
}

extern "C" __global__ void add(const float *x, int x_row, const float *z, int z_row, Out *y, int y_row, int n) {
    pairs(x, x_row, z, z_row, y, y_row, n, [](float a, float b) { return a + b; });
}
extern "C" __global__ void scale(const float *x, int x_row, Out *y, int y_row, int n, float by) {
    each(x, x_row, y, y_row, n, [=](float a) { return a * by; });
}
extern "C" __global__ void softcap(const float *x, int x_row, Out *y, int y_row, int n, float cap) {
    each(x, x_row, y, y_row, n, [=](float a) { return cap * tanhf(a / cap); });
}
extern "C" __global__ void activation(const float *x, int x_row, Out *y, int y_row, int n, int function) {
    each(x, x_row, y, y_row, n, [=](float a) { return activate(function, a); });
}
extern "C" __global__ void glu(
    const float *gate, int gate_row, const float *up, int up_row, Out *y, int y_row, int n, int function) {
    pairs(gate, gate_row, up, up_row, y, y_row, n, [=](float a, float b) { return activate(function, a) * b; });
}
// Rows `rows[t]` of x.
extern "C" __global__ void select_rows(const float *x, int x_row, const int *rows, Out *y, int y_row, int n) {
    int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x), t = blockIdx.y;
    begin();
    if (i >= n) return;
    float4 a = load(x + (size_t)get(rows + t) * x_row + i, n - i);
    store(y + (size_t)t * y_row + i, n - i, a.x, a.y, a.z, a.w);
}
// y[t] += bias
extern "C" __global__ void add_bias(Out *y, int y_row, const float *bias, int n) {
    pairs((const float *)y, y_row, bias, 0, y, y_row, n, [](float a, float b) { return a + b; });
}

// Rows of x in the number type of products: `pitch` numbers, a multiple of 32, from row to row.
extern "C" __global__ void narrow(const float *x, int x_row, uint2 *y, int n, int pitch) {
    int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x), t = blockIdx.y;
    begin();
    if (i >= pitch) return;
    float4 a = i < n ? load(x + (size_t)t * x_row + i, n - i) : make_float4(0.f, 0.f, 0.f, 0.f);
    y[((size_t)t * pitch + i) / 4] = make_uint2(two(a.x, a.y), two(a.z, a.w));
}
// Eight of `n` numbers of that type.
DEV void load_eight(float (&r)[8], const u16 *p, int left, bool aligned) {
    if (aligned) {
        uint4 v = get((const uint4 *)p);
        u32 pairs[4] = {v.x, v.y, v.z, v.w};
        #pragma unroll
        for (int j = 0; j < 8; j++) r[j] = one(pairs[j / 2] >> 16 * (j % 2) & 0xffff);
    } else {
        #pragma unroll
        for (int j = 0; j < 8; j++) r[j] = j < left ? one(get(p + j)) : 0.f;
    }
}
// A gated unit from halves in that type, `n` of each side by side in a row; a thread takes eight.
extern "C" __global__ void narrow_glu(const u16 *gate, Out *y, int y_row, int n, int function) {
    int i = 8 * (blockIdx.x * blockDim.x + threadIdx.x), t = blockIdx.y;
    begin();
    if (i >= n) return;
    float g[8], u[8];
    gate += (size_t)t * 2 * n + i;
    load_eight(g, gate, n - i, n % 8 == 0);
    load_eight(u, gate + n, n - i, n % 8 == 0);
    #pragma unroll
    for (int j = 0; j < 8; j++) g[j] = activate(function, g[j]) * u[j];
    y += (size_t)t * y_row + i;
    store(y, n - i, g[0], g[1], g[2], g[3]);
    if (i + 4 < n) store(y + 4, n - i - 4, g[4], g[5], g[6], g[7]);
}
