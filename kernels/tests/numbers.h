// What the drivers share: tensors of every dtype, drawn at random, and their comparison with double precision.
//
// A driver's arguments are the tolerances for float32, bfloat16 and float16: root mean square error, relative to the
// expected values' own.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "wkv.h"

namespace test {

inline void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

inline double tolerances[3];

inline void read_tolerances(int argc, char** argv) {
    require(argc == 4, "usage: DRIVER FLOAT32 BFLOAT16 FLOAT16, the largest relative errors");
    for (int i = 0; i < 3; ++i) tolerances[i] = std::atof(argv[i + 1]);
}

// Multiples of 2^-7 in [low, high]: every dtype holds those between -2 and 2.
inline double draw(double low, double high) {
    static std::mt19937 generator(0);
    return std::round(128 * std::uniform_real_distribution<double>(low, high)(generator)) / 128;
}

inline double read_half(uint16_t bits, int mantissa_bits) {
    const int largest = (1 << (15 - mantissa_bits)) - 1, exponent = (bits & 0x7fff) >> mantissa_bits;
    const int mantissa = bits & ((1 << mantissa_bits) - 1), bias = largest / 2 + mantissa_bits;
    const double sign = bits >> 15 ? -1 : 1;
    if (exponent == largest) return sign * (mantissa ? NAN : INFINITY);
    return sign * std::ldexp(exponent ? mantissa + (1 << mantissa_bits) : mantissa, std::max(exponent, 1) - bias);
}

// For numbers as `draw` makes them.
inline uint16_t write_half(double x, int mantissa_bits) {
    if (x == 0) return 0;
    int exponent;
    const int mantissa = static_cast<int>(std::ldexp(std::frexp(std::fabs(x), &exponent), mantissa_bits + 1));
    const int bias = ((1 << (15 - mantissa_bits)) - 1) / 2;
    return (x < 0 ? 0x8000 : 0) + ((exponent - 1 + bias) << mantissa_bits) + mantissa - (1 << mantissa_bits);
}

// Up to four dimensions, the first ones 1 where there are fewer.
using Sizes = std::array<int64_t, 4>;

// Row-major values in double precision.
struct Exact {
    Sizes sizes;
    std::vector<double> values;

    explicit Exact(const Sizes& sizes) : sizes(sizes), values(sizes[0] * sizes[1] * sizes[2] * sizes[3]) {}
    double& operator()(int64_t i, int64_t j, int64_t k, int64_t l) {
        return values[((i * sizes[1] + j) * sizes[2] + k) * sizes[3] + l];
    }
    double operator()(int64_t i, int64_t j, int64_t k, int64_t l) const {
        return const_cast<Exact&>(*this)(i, j, k, l);
    }
};

// Memory that ends with the last number; NaN in the gaps between rows, and everywhere before something is drawn.
struct Tensor {
    Sizes sizes, strides;
    int64_t dtype;
    std::vector<char> memory;

    Tensor(const Sizes& sizes, int64_t dtype, int64_t gap = 0) : sizes(sizes), strides{0, 0, 0, 1}, dtype(dtype) {
        for (int i = 2; i >= 0; --i) strides[i] = sizes[i + 1] * strides[i + 1] + gap;
        int64_t last = 0;
        bool empty = false;
        for (int i = 0; i < 4; ++i) last += (sizes[i] - 1) * strides[i], empty = empty || sizes[i] == 0;
        memory.assign(empty ? 0 : (last + 1) * item(), '\xff');
    }
    int64_t item() const { return dtype == WKV_FLOAT32 ? 4 : 2; }
    int mantissa_bits() const { return dtype == WKV_BFLOAT16 ? 7 : 10; }
    void* data() { return memory.data(); }

    template <class F>
    void each(const F& f) const {
        for (int64_t i = 0; i < sizes[0]; ++i)
            for (int64_t j = 0; j < sizes[1]; ++j)
                for (int64_t k = 0; k < sizes[2]; ++k)
                    for (int64_t l = 0; l < sizes[3]; ++l)
                        f(item() * (i * strides[0] + j * strides[1] + k * strides[2] + l * strides[3]));
    }
    Tensor& fill(double low, double high) {
        each([&](int64_t at) {
            const double x = draw(low, high);
            const float single = static_cast<float>(x);
            const uint16_t half = dtype == WKV_FLOAT32 ? 0 : write_half(x, mantissa_bits());
            std::memcpy(&memory[at], dtype == WKV_FLOAT32 ? static_cast<const void*>(&single) : &half, item());
        });
        return *this;
    }
    Exact exact() const {
        Exact x(sizes);
        double* next = x.values.data();
        each([&](int64_t at) {
            float single;
            uint16_t half;
            std::memcpy(dtype == WKV_FLOAT32 ? static_cast<void*>(&single) : &half, &memory[at], item());
            *next++ = dtype == WKV_FLOAT32 ? single : read_half(half, mantissa_bits());
        });
        return x;
    }
};

inline void expect(const Tensor& actual, const Exact& expected, const char* what) {
    const Exact found = actual.exact();
    require(found.sizes == expected.sizes, what);
    double error = 0, size = 0;
    for (size_t i = 0; i < found.values.size(); ++i) {
        error += std::pow(found.values[i] - expected.values[i], 2);
        size += std::pow(expected.values[i], 2);
    }
    // Written so that NaN fails.
    if (std::sqrt(error) <= tolerances[actual.dtype] * std::sqrt(size)) return;
    const Sizes& n = actual.sizes;
    std::fprintf(stderr, "%s (%ld, %ld, %ld, %ld), dtype %ld: relative error %.2e\n", what, n[0], n[1], n[2], n[3],
                 actual.dtype, std::sqrt(error / size));
    std::exit(1);
}

}  // namespace test
