// Tokens grouped by expert: bounds[e] .. bounds[e + 1] are expert e's. Tile number `tile`, of `size` tokens of one group:
// its expert, where it begins and where the group ends; -1 past the last.
DEV int find_group(const int *bounds, int experts, int size, int tile, int &first, int &end) {
    for (int expert = 0; expert < experts; expert++) {
        first = get(bounds + expert), end = get(bounds + expert + 1);
        int count = (end - first + size - 1) / size;
        if (tile < count) {
            first += tile * size;
            return expert;
        }
        tile -= count;
    }
    return -1;
}
