// Rotary position embedding, and the way of keys and values into the cache. One row of blocks (y) for each token.
// Feature i of `heads * head_dim`, turned; with its partner where it is the first of a pair. False for a second one.
DEV bool turned(const Turn &r, const float *x, int token, int row, int i, float &a, float &b, int &other) {
    int within = i % r.head_dim - r.start, pair;
    a = get(x + i);
    other = -1;
    if (within < 0 || within >= 2 * r.half) return true;
    if (r.interleaved) {
        if (within % 2) return false;
        pair = within / 2, other = i + 1;
    } else {
        if (within >= r.half) return false;
        pair = within, other = i + r.half;
    }
    float2 cs = angle(r, token, row, pair);
    float first = a, second = get(x + other);
    a = first * cs.x - second * cs.y;
    b = second * cs.x + first * cs.y;
    return true;
}

#define EACH(i, n) for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)

extern "C" __global__ void rope(const float *x, int x_row, float *y, int y_row, int n, Turn r) {
    int token = blockIdx.y, other;
    float a, b;
    begin();
    x += (size_t)token * x_row;
    y += (size_t)token * y_row;
    int row = get(r.positions + token);
    EACH(i, n) {
        if (!turned(r, x, token, row, i, a, b, other)) continue;
        y[i] = a;
        if (other >= 0) y[other] = b;
    }
}

// Rows of k (and v, where there is one) to their slots.
extern "C" __global__ void kv_write(
    const float *k, int k_row, Cached *k_cache, int k_width, const float *v, int v_row, Cached *v_cache, int v_width,
    const int *slots) {
    int token = blockIdx.y;
    begin();
    int slot = get(slots + token);
    EACH(i, k_width) k_cache[(size_t)slot * k_width + i] = cached(get(k + (size_t)token * k_row + i));
    EACH(i, v_width) v_cache[(size_t)slot * v_width + i] = cached(get(v + (size_t)token * v_row + i));
}

// q turned into y; k turned, and v as it is, to their slots.
extern "C" __global__ void rope_kv_write(
    const float *q, int q_row, float *y, int y_row, int n, Turn q_turn, const float *k, int k_row, Cached *k_cache,
    int k_width, Turn k_turn, const float *v, int v_row, Cached *v_cache, int v_width, const int *slots) {
    int token = blockIdx.y, other;
    float a, b;
    begin();
    q += (size_t)token * q_row;
    k += (size_t)token * k_row;
    y += (size_t)token * y_row;
    int row = get(q_turn.positions + token), slot = get(slots + token);
    EACH(i, n) {
        if (!turned(q_turn, q, token, row, i, a, b, other)) continue;
        y[i] = a;
        if (other >= 0) y[other] = b;
    }
    k_cache += (size_t)slot * k_width;
    EACH(i, k_width) {
        if (!turned(k_turn, k, token, row, i, a, b, other)) continue;
        k_cache[i] = cached(a);
        if (other >= 0) k_cache[other] = cached(b);
    }
    EACH(i, v_width) v_cache[(size_t)slot * v_width + i] = cached(get(v + (size_t)token * v_row + i));
}
