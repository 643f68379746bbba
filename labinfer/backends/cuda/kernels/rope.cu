// Rotary position embedding, and the way of keys and values into the cache. One row of blocks (y) for each token.
// Turns a head by the lanes of a warp: number i of it is x(i), and put(i, v) takes what it becomes.
template <class Load, class Put> DEV void turn_head(const Turn &r, int token, int row, Load x, Put put) {
    for (int i = threadIdx.x % 32; i < r.head_dim; i += 32) {
        int within = i - r.start, pair = r.interleaved ? within / 2 : within, other = r.interleaved ? i + 1 : i + r.half;
        if (within < 0 || within >= 2 * r.half) {
            put(i, x(i));
            continue;
        }
        if (r.interleaved ? within % 2 : within >= r.half) continue;  // turned with its partner
        float2 cs = angle(r, token, row, pair);
        float first = x(i), second = x(other);
        put(i, first * cs.x - second * cs.y);
        put(other, second * cs.x + first * cs.y);
    }
}
// A head's numbers; with NORMS normed.
struct Head {
    const float *x;
#ifdef NORMS
    const float *gain;
    float scale, offset;
    DEV float operator()(int i) const { return get(x + i) * scale * (gain ? gain[i] + offset : 1.f); }
#else
    DEV float operator()(int i) const { return get(x + i); }
#endif
};
#ifdef NORMS
DEV Head head_of(const float *x, int n, const float *gain, const Norms &norms) {
    float squares = 0.f;
    for (int i = threadIdx.x % 32; i < n; i += 32) squares += get(x + i) * get(x + i);
    return {x, gain, rsqrtf(warp_sum(squares) / n + norms.eps), norms.offset};
}
#define HEAD(x, n, gain) head_of(x, n, norms.gain, norms)
#else
#define HEAD(x, n, gain) (Head{x})
#endif

#define EACH(i, n) for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)

extern "C" __global__ void rope(const float *x, int x_row, float *y, int y_row, int heads, Turn r) {
    int token = blockIdx.y, head = blockIdx.x * blockDim.x / 32 + threadIdx.x / 32;
    begin();
    if (head >= heads) return;
    x += (size_t)token * x_row + head * r.head_dim;
    y += (size_t)token * y_row + head * r.head_dim;
    turn_head(r, token, get(r.positions + token), [=](int i) { return get(x + i); }, [=](int i, float v) { y[i] = v; });
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

// q, normed and turned, into y; k likewise, and v as it is, to their slots. A warp takes a head, or 128 numbers of v.
extern "C" __global__ void rope_kv_write(
    const float *q, int q_row, float *y, int y_row, int heads, Turn q_turn, const float *k, int k_row, Cached *k_cache,
    int k_heads, Turn k_turn, const float *v, int v_row, Cached *v_cache, int v_width, const int *slots NORMED) {
    int token = blockIdx.y, head = blockIdx.x * blockDim.x / 32 + threadIdx.x / 32, dim = q_turn.head_dim, k_dim = k_turn.head_dim;
    begin();
    int row = get(q_turn.positions + token), slot = get(slots + token);
    if (head < heads) {
        y += (size_t)token * y_row + head * dim;
        turn_head(q_turn, token, row, HEAD(q + (size_t)token * q_row + head * dim, dim, q_gain), [=](int i, float v) { y[i] = v; });
        return;
    }
    head -= heads;
    if (head < k_heads) {
        k_cache += ((size_t)slot * k_heads + head) * k_dim;
        turn_head(k_turn, token, row, HEAD(k + (size_t)token * k_row + head * k_dim, k_dim, k_gain),
                  [=](int i, float v) { k_cache[i] = cached(v); });
        return;
    }
    int first = (head - k_heads) * 128 + threadIdx.x % 32;
    for (int i = first; i < min(v_width, first + 128); i += 32) v_cache[(size_t)slot * v_width + i] = cached(get(v + (size_t)token * v_row + i));
}
