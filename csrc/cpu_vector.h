// Vectors of floats, as wide as the instruction set this file is compiled for, and functions of them.
//
// Compiled once per instruction set, so everything is in an unnamed namespace: no copy may be shared.
#pragma once

#include <cstdint>
#include <cstring>

namespace newllm {
namespace {

// ROWS is how many rows of two vectors each a tile of a product keeps in registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 14;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 4;
#endif

using Vector = float __attribute__((vector_size(4 * LANES)));
using Integers = int32_t __attribute__((vector_size(4 * LANES)));

// x in all lanes. (Adding to zero would not do: the compiler has to keep what that makes of -0.)
inline Vector all(float x) { return x - Vector{}; }

inline Vector load(const float* from) {
    Vector x;
    memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float* to, Vector x) { memcpy(to, &x, sizeof x); }

// The ends of rows, out of the way of the loops over whole vectors.

[[gnu::noinline]] Vector load_part(const float* from, int64_t count) {
    float x[LANES] = {};
    for (int64_t i = 0; i < count; ++i) x[i] = from[i];
    return load(x);
}

[[gnu::noinline]] void store_part(float* to, Vector x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = x[i];
}

[[gnu::noinline]] Vector first_part(Vector x, int64_t count) {
    for (int64_t i = count < 0 ? 0 : count; i < LANES; ++i) x[i] = 0;
    return x;
}

// The first `count` of LANES floats, zeros after them; count may be negative or above LANES.
inline Vector load(const float* from, int64_t count) {
    return count >= LANES ? load(from) : load_part(from, count);
}

inline void store(float* to, Vector x, int64_t count) {
    if (count >= LANES) store(to, x);
    else store_part(to, x, count);
}

// x with zeros from lane `count` on.
inline Vector first(Vector x, int64_t count) { return count >= LANES ? x : first_part(x, count); }

// By halves: a chain of LANES additions would take longer than all else that a short row needs.
inline float sum(Vector x) {
    using Four = float __attribute__((vector_size(16)));
    Four parts[LANES / 4];
    memcpy(parts, &x, sizeof x);
    for (int half = LANES / 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

inline Vector absolute(Vector x) { return (Vector)((Integers)x & 0x7fffffff); }

inline Vector with_sign(Vector x, Vector sign) {
    return (Vector)((Integers)x | ((Integers)sign & (int32_t)0x80000000));
}

// Comparisons with NaN are false, so a NaN passes all bounds below.
inline Vector at_most(Vector x, float bound) { return x > bound ? all(bound) : x; }

inline Vector at_least(Vector x, float bound) { return x < bound ? all(bound) : x; }

template <int N>
inline Vector polynomial(Vector x, const float (&coefficients)[N]) {
    Vector y = all(coefficients[N - 1]);
    for (int i = N - 2; i >= 0; --i) y = y * x + coefficients[i];
    return y;
}

// The polynomials were fitted for the least largest error; theirs is below 5e-8 of what the functions return.

inline Vector exponential(Vector x) {
    static constexpr float powers[] = {1.0f,           1.0f,           0.5f,          0.16666415f,
                                       0.041666083f,   0.008375135f,   0.0013956057f};
    x = at_least(at_most(x, 88.0f), -87.0f);
    const Vector magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vector shifted = x * 1.44269504f + magic;
    const Vector rounded = shifted - magic;
    const Vector rest = x - rounded * 0.693359375f + rounded * 2.12194440e-4f;  // ln 2 in two parts
    const Integers power = ((Integers)shifted << 23) + (Integers)all(1.0f);
    return polynomial(rest, powers) * (Vector)power;
}

inline Vector error_function(Vector x) {
    static constexpr float near[] = {1.1283792f,    -0.37612632f,    0.112836726f,  -0.026858104f,
                                     0.005197797f,  -0.0008105964f,  8.21542e-05f};
    // Logarithm of 1 - erf(x) from 0.85 to 4.1, where it rounds to 1.
    static constexpr float far[] = {1.5629714e-4f,  -1.1294249f,    -0.6335318f,    -0.10807357f,
                                    0.024984086f,   -0.004119049f,  4.2361423e-4f,  -2.0148154e-5f};
    const Vector size = absolute(x);
    const Vector small = x * polynomial(x * x, near);
    const Vector large = 1.0f - exponential(polynomial(at_most(size, 4.1f), far));
    return size > 0.9f ? with_sign(large, x) : small;
}

inline Vector gelu(Vector x) { return x * 0.5f * (1.0f + error_function(x * 0.70710678f)); }

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

inline Vector tanh_of(Vector x) {
    static constexpr float near[] = {-0.33333328f, 0.13332795f, -0.053854066f, 0.021010067f, -0.006113174f};
    const Vector size = absolute(x), square = x * x;
    const Vector small = x + x * square * polynomial(square, near);
    const Vector large = 1.0f - 2.0f / (1.0f + exponential(size * 2.0f));
    return size > 0.625f ? with_sign(large, x) : small;
}

}  // namespace
}  // namespace newllm
