// Rotary position embedding: by which angles a token turns.
// TURN says where they come from: a table of cosines and sines by position (0), the same with a second half for
// sequences longer than `trained` (1: longrope), or computed here from the length of the sequence (2: dynamic).
struct Turn {
    const float *table, *freq_factors;
    const int *positions, *query_start, *total_len;
    int head_dim, start, half, interleaved;
    int sequences, trained, length;  // rows of the table before its second half
    float rotary_dim, theta, factor;
};

#ifdef NORMS
struct Norms {  // heads of queries and of keys are normed before they turn
    const float *q_gain, *k_gain;
    float eps, offset;
};
#define NORMED , const Norms norms
#else
#define NORMED
#endif

// The cosine and sine for pair i of a token at position `row`.
DEV float2 angle(const Turn &r, int token, int row, int i) {
#if TURN == 2
    float base = r.theta;
    int total = get(r.total_len + sequence_of(r.query_start, r.sequences, token));
    if (total > r.trained) {
        float growth = r.factor * total / r.trained - (r.factor - 1.f);
        base *= (float)pow((double)growth, (double)r.rotary_dim / (r.rotary_dim - 2.));
    }
    float frequency = 1.f / (float)pow((double)base, (double)(2 * i / r.rotary_dim));
    if (r.freq_factors) frequency /= r.freq_factors[i];
    double sine, cosine;
    sincos((double)(row * frequency), &sine, &cosine);
    return make_float2((float)cosine, (float)sine);
#else
#if TURN == 1
    if (get(r.total_len + sequence_of(r.query_start, r.sequences, token)) > r.trained) row += r.length;
#endif
    const float *p = r.table + (size_t)row * 2 * r.half + i;
    return make_float2(p[0], p[r.half]);
#endif
}

// How eight features of a head turn, from feature i on, all in the first or all in the second half (`half` style):
// v * cosine + head[other ..] * sine.
struct Eighth {
    float cosine[8], sine[8];
    int other;
};
DEV Eighth eighth_of(const Turn &r, int token, int row, int i) {
    Eighth e;
    int within = i - r.start;
    bool inside = within >= 0 && within < 2 * r.half, first = within < r.half;
    e.other = !inside ? i : first ? i + r.half : i - r.half;
    #pragma unroll
    for (int j = 0; j < 8; j++) {
        float2 cs = make_float2(1.f, 0.f);
        if (inside) cs = angle(r, token, row, (first ? within : within - r.half) + j);
        e.cosine[j] = cs.x, e.sine[j] = first ? -cs.y : cs.y;
    }
    return e;
}
