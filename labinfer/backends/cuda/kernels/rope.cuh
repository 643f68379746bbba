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

// How feature i of a head turns: v * cosine + head[other] * sine.
struct Feature {
    float cosine, sine;
    int other;
};
DEV Feature feature_of(const Turn &r, int token, int row, int i) {
    int within = i - r.start;
    if (within < 0 || within >= 2 * r.half) return {1.f, 0.f, i};
    bool first = r.interleaved ? within % 2 == 0 : within < r.half;
    float2 cs = angle(r, token, row, r.interleaved ? within / 2 : within % r.half);
    int step = r.interleaved ? 1 : r.half;
    return {cs.x, first ? -cs.y : cs.y, first ? i + step : i - step};
}
