// Kernels that work on each number by itself. Rows of x, z and y are `*_row` floats apart; a thread takes one number.
#define AT() \
    int i = blockIdx.x * blockDim.x + threadIdx.x, t = blockIdx.y; \
    begin(); \
    if (i >= n) return

extern "C" __global__ void add(const float *x, int x_row, const float *z, int z_row, float *y, int y_row, int n) {
    AT();
    y[(size_t)t * y_row + i] = get(x + (size_t)t * x_row + i) + get(z + (size_t)t * z_row + i);
}
extern "C" __global__ void scale(const float *x, int x_row, float *y, int y_row, int n, float by) {
    AT();
    y[(size_t)t * y_row + i] = get(x + (size_t)t * x_row + i) * by;
}
extern "C" __global__ void softcap(const float *x, int x_row, float *y, int y_row, int n, float cap) {
    AT();
    y[(size_t)t * y_row + i] = cap * tanhf(get(x + (size_t)t * x_row + i) / cap);
}
extern "C" __global__ void activation(const float *x, int x_row, float *y, int y_row, int n, int function) {
    AT();
    y[(size_t)t * y_row + i] = activate(function, get(x + (size_t)t * x_row + i));
}
extern "C" __global__ void glu(
    const float *gate, int gate_row, const float *up, int up_row, float *y, int y_row, int n, int function) {
    AT();
    y[(size_t)t * y_row + i] = activate(function, get(gate + (size_t)t * gate_row + i)) * get(up + (size_t)t * up_row + i);
}
// Rows `rows[t]` of x.
extern "C" __global__ void select_rows(const float *x, int x_row, const int *rows, float *y, int y_row, int n) {
    AT();
    y[(size_t)t * y_row + i] = get(x + (size_t)get(rows + t) * x_row + i);
}
// x in the number type of products, its rows `pitch` apart and zero from `n` on.
extern "C" __global__ void narrow(const float *x, int x_row, u32 *y, int n, int pitch) {
    int i = 2 * (blockIdx.x * blockDim.x + threadIdx.x), t = blockIdx.y;
    begin();
    if (i >= pitch) return;
    float a = i < n ? get(x + (size_t)t * x_row + i) : 0.f, b = i + 1 < n ? get(x + (size_t)t * x_row + i + 1) : 0.f;
    y[((size_t)t * pitch + i) / 2] = two(a, b);
}
// y[t] += bias
extern "C" __global__ void add_bias(float *y, int y_row, const float *bias, int n) {
    AT();
    float *at = y + (size_t)t * y_row + i;
    *at = get(at) + bias[i];
}
