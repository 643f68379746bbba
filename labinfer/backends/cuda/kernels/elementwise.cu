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
// A gated unit from halves in that type.
extern "C" __global__ void narrow_glu(const u16 *gate, const u16 *up, Out *y, int y_row, int n, int function) {
    int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x), t = blockIdx.y;
    begin();
    if (i >= n) return;
    gate += (size_t)t * n + i;
    up += (size_t)t * n + i;
    float g[4] = {}, u[4] = {};
    if (n % 4 == 0) {
        uint2 a = get((const uint2 *)gate), b = get((const uint2 *)up);
        g[0] = one(a.x & 0xffff), g[1] = one(a.x >> 16), g[2] = one(a.y & 0xffff), g[3] = one(a.y >> 16);
        u[0] = one(b.x & 0xffff), u[1] = one(b.x >> 16), u[2] = one(b.y & 0xffff), u[3] = one(b.y >> 16);
    } else {
        #pragma unroll
        for (int j = 0; j < 4; j++)
            if (i + j < n) g[j] = one(get(gate + j)), u[j] = one(get(up + j));
    }
    #pragma unroll
    for (int j = 0; j < 4; j++) g[j] = activate(function, g[j]) * u[j];
    store(y + (size_t)t * y_row + i, n - i, g[0], g[1], g[2], g[3]);
}
