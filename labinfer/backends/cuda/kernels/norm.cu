// Normalisation: one block for each group of a row (block y) of a token (block x), or of the row of x that `rows` says.
#define EACH(i) _Pragma("unroll 8") for (int i = threadIdx.x; i < n; i += blockDim.x)

#define FOURS 8  // a thread keeps up to so many times four numbers
extern "C" __global__ void rms_norm(
    const float *x, int x_row, const int *rows, const float *weight, Out *y, int y_row, int n, float eps, float offset) {
    __shared__ float scratch[32];
    begin();
    x += (size_t)(rows ? get(rows + blockIdx.x) : blockIdx.x) * x_row + blockIdx.y * n;
    y += (size_t)blockIdx.x * y_row + blockIdx.y * n;
    float4 v[FOURS];
    float squares = 0.f;
    #pragma unroll
    for (int k = 0; k < FOURS; k++) {
        int i = 4 * (k * blockDim.x + threadIdx.x);
        v[k] = i < n ? load(x + i, n - i) : make_float4(0.f, 0.f, 0.f, 0.f);
        squares += v[k].x * v[k].x + v[k].y * v[k].y + v[k].z * v[k].z + v[k].w * v[k].w;
    }
    float scale = rsqrtf(block_sum(squares, scratch) / n + eps);
    #pragma unroll
    for (int k = 0; k < FOURS; k++) {
        int i = 4 * (k * blockDim.x + threadIdx.x);
        if (i >= n) break;
        float4 by = make_float4(1.f, 1.f, 1.f, 1.f);
        if (weight) {
            by = load(weight + i, n - i);
            by = make_float4(by.x + offset, by.y + offset, by.z + offset, by.w + offset);
        }
        store(y + i, n - i, v[k].x * scale * by.x, v[k].y * scale * by.y, v[k].z * scale * by.z, v[k].w * scale * by.w);
    }
#ifdef NARROW  // products read rows padded with zeros
    for (int i = n + threadIdx.x; i < y_row; i += blockDim.x) y[i] = 0;
#endif
}

extern "C" __global__ void layer_norm(
    const float *x, int x_row, const float *weight, const float *bias, float *y, int y_row, int n, float eps) {
    __shared__ float scratch[32];
    begin();
    x += (size_t)blockIdx.x * x_row;
    y += (size_t)blockIdx.x * y_row;
    float sum = 0.f, squares = 0.f;
    EACH(i) sum += get(x + i);
    float mean = block_sum(sum, scratch) / n;
    EACH(i) {
        float v = get(x + i) - mean;
        squares += v * v;
    }
    float scale = rsqrtf(block_sum(squares, scratch) / n + eps);
    EACH(i) y[i] = (get(x + i) - mean) * scale * weight[i] + (bias ? bias[i] : 0.f);
}
