// Reading adapters beside the step loop: matrices to their places in a slot (lora.cpp's layout), looked through for NaN on the way; the
// digest of a file's bytes; and a thread that uses one core. lora_native.py and aside.py call.
#ifdef _OPENMP
#include <omp.h>
#endif

#include "vectors.h"

namespace {

INLINE bool is_finite(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return (u & 0x7f800000) != 0x7f800000;
}

// to = from * scale, or its transpose with a gain for each row; false when a value is not finite
template <class S, class D>
bool pack(D* to, const S* from, int64_t rows, int64_t columns, bool transpose, float scale, const float* gains) {
    uint32_t bad = 0;
    if (!transpose) {
        for (int64_t i = 0; i < rows * columns; i++) {
            const float value = to_float(from[i]);
            bad |= !is_finite(value);
            put(to + i, value * scale);
        }
        return !bad;
    }
    float block[64];
    for (int64_t start = 0; start < rows; start += 64) {
        const int64_t count = start + 64 < rows ? 64 : rows - start;
        for (int64_t c = 0; c < columns; c++) {
            for (int64_t r = 0; r < count; r++) {
                block[r] = to_float(from[(start + r) * columns + c]);
                bad |= !is_finite(block[r]);
            }
            if (gains)
                for (int64_t r = 0; r < count; r++) put(to + c * rows + start + r, block[r] * (gains[start + r] * scale));
            else
                for (int64_t r = 0; r < count; r++) put(to + c * rows + start + r, block[r] * scale);
        }
    }
    return !bad;
}

struct Move {
    void* to;
    const void* from;
    const float* gains;
    int64_t rows, columns;
    float scale;
    int32_t from_bf16, to_bf16, transpose;
};

// BLAKE2s (RFC 7693) of sixteen messages at once; element i of every vector belongs to message i
constexpr uint32_t START[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
constexpr uint8_t ORDER[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

template <int N>
INLINE v16u rotate(v16u x) { return x >> N | x << (32 - N); }

INLINE void mix(v16u& a, v16u& b, v16u& c, v16u& d, v16u x, v16u y) {
    a += b + x, d = rotate<16>(d ^ a), c += d, b = rotate<12>(b ^ c);
    a += b + y, d = rotate<8>(d ^ a), c += d, b = rotate<7>(b ^ c);
}

// one block of each message; `end`: bytes of each so far
void hash_block(v16u* state, const char* block, uint64_t end, bool last) {
    v16u m[16], v[16];
    memcpy(m, block, sizeof m);
    for (int i = 0; i < 8; i++) v[i] = state[i], v[8 + i] = v16u{} + START[i];
    v[12] ^= (uint32_t)end, v[13] ^= (uint32_t)(end >> 32);
    if (last) v[14] = ~v[14];
#pragma GCC unroll 10
    for (int r = 0; r < 10; r++) {  // unrolled, or the words do not stay where they are
        const uint8_t *o = ORDER[r], *p = o + 8;
        for (int i = 0; i < 4; i++) mix(v[i], v[4 + i], v[8 + i], v[12 + i], m[o[2 * i]], m[o[2 * i + 1]]);
        for (int i = 0; i < 4; i++) mix(v[i], v[4 + (i + 1) % 4], v[8 + (i + 2) % 4], v[12 + (i + 3) % 4], m[p[2 * i]], m[p[2 * i + 1]]);
    }
    for (int i = 0; i < 8; i++) state[i] ^= v[i] ^ v[8 + i];
}

}  // namespace

// Copies every matrix to its place; -1, or the number of the first that has NaN or infinity.
extern "C" int32_t swift_lora_pack(const Move* moves, int32_t count) {
    for (int32_t i = 0; i < count; i++) {
        const Move& m = moves[i];
        bool finite;
        if (m.from_bf16)
            finite = m.to_bf16 ? pack((bf16*)m.to, (const bf16*)m.from, m.rows, m.columns, m.transpose, m.scale, m.gains)
                               : pack((float*)m.to, (const bf16*)m.from, m.rows, m.columns, m.transpose, m.scale, m.gains);
        else
            finite = m.to_bf16 ? pack((bf16*)m.to, (const float*)m.from, m.rows, m.columns, m.transpose, m.scale, m.gains)
                               : pack((float*)m.to, (const float*)m.from, m.rows, m.columns, m.transpose, m.scale, m.gains);
        if (!finite) return i;
    }
    return -1;
}

// The digests of the sixteen lanes of the data (adapters/digest.py): result [word][lane].
extern "C" void swift_digest(const char* data, int64_t size, void* result) {
    v16u state[8];
    for (int i = 0; i < 8; i++) state[i] = v16u{} + (START[i] ^ (i ? 0 : 0x01010020));
    const int64_t blocks = size > 1024 ? (size + 1023) / 1024 : 1;
    for (int64_t i = 0; i + 1 < blocks; i++) hash_block(state, data + i * 1024, 64 * (i + 1), false);
    const int64_t done = (blocks - 1) * 1024;
    char last[1024] = {};
    memcpy(last, data + done, size - done);
    hash_block(state, last, 64 * blocks, true);
    memcpy(result, state, sizeof state);
}

// The calling thread has no helpers from now on (aside.py).
extern "C" void swift_one_thread() {
#ifdef _OPENMP
    omp_set_num_threads(1);
#endif
}
