// Weights of a layer for the decoding driver, and products with them in double precision.
#pragma once

#include <map>
#include <string>
#include <utility>

#include "numbers.h"

namespace test {

using Values = std::vector<double>;

// Tensors by name, and their values. Matrices (1, 1, output channels, input channels), vectors (1, 1, 1, n).
struct Weights {
    int64_t dtype;
    std::map<std::string, Tensor> tensors = {};
    std::map<std::string, Exact> values = {};
    // What adapters add, in the order of their matrices; by matrix, the terms' names and scales.
    std::vector<wkv_low_rank> terms = {};
    std::map<std::string, std::vector<std::pair<std::string, double>>> scales = {};

    void* add(const std::string& name, int64_t n_out, int64_t n_in, double scale) {
        Tensor& x = tensors.emplace(name, Tensor({1, 1, n_out, n_in}, dtype)).first->second.fill(-scale, scale);
        values.emplace(name, x.exact());
        return x.data();
    }
    void* vector(const std::string& name, int64_t n) { return add(name, 1, n, 1); }
    void* matrix(const std::string& name, int64_t n_out, int64_t n_in) {
        return add(name, n_out, n_in, 2 / std::sqrt(n_in));
    }
    void* flipped(const std::string& name, int64_t n_in, int64_t n_out) {
        return add(name, n_in, n_out, 2 / std::sqrt(n_in));
    }

    const Values& operator[](const std::string& name) const { return values.at(name).values; }
    // Adds a low-rank term to a matrix (output channels, input channels), or in `by_input` one that is transposed.
    void adapt(int64_t matrix, const std::string& name, int64_t rank, const int64_t (&dtypes)[2], bool by_input) {
        const Sizes sizes = values.at(name).sizes;
        const int64_t n_out = sizes[by_input ? 3 : 2], n_in = sizes[by_input ? 2 : 3], own = dtype;
        const std::string term = name + "+" + std::to_string(terms.size());
        wkv_low_rank x{matrix, rank, 0.25 + terms.size() % 3, nullptr, nullptr, dtypes[0], dtypes[1]};
        dtype = dtypes[0], x.down = this->matrix(term + "_down", rank, n_in);
        dtype = dtypes[1], x.up = this->matrix(term + "_up", n_out, rank);
        dtype = own;
        scales[name].emplace_back(term, x.scale);
        terms.push_back(x);
    }

    Values times(const std::string& name, const Values& x) const {
        const Exact& w = values.at(name);
        Values y = of_terms(name, x, w.sizes[2]);
        for (int64_t i = 0; i < w.sizes[2]; ++i)
            for (int64_t j = 0; j < w.sizes[3]; ++j) y[i] += w(0, 0, i, j) * x[j];
        return y;
    }
    // x times the rows of the matrix from `first` on.
    Values through(const std::string& name, const Values& x, int64_t first = 0) const {
        const Exact& w = values.at(name);
        Values y = of_terms(name, x, w.sizes[3]);
        for (size_t i = 0; i < x.size(); ++i)
            for (int64_t j = 0; j < w.sizes[3]; ++j) y[j] += x[i] * w(0, 0, first + i, j);
        return y;
    }
    Values of_terms(const std::string& name, const Values& x, int64_t n_out) const {
        Values y(n_out);
        const auto found = scales.find(name);
        if (found == scales.end()) return y;
        for (const auto& [term, scale] : found->second) {
            const Values update = low_rank(term, x, nullptr);
            for (int64_t i = 0; i < n_out; ++i) y[i] += scale * update[i];
        }
        return y;
    }
    // bias + up f(down x)
    Values low_rank(const std::string& name, const Values& x, double (*f)(double)) const {
        Values inner = times(name + "_down", x);
        for (double& value : inner) value = f ? f(value) : value;
        Values y = times(name + "_up", inner);
        if (values.count(name + "_bias"))
            for (size_t i = 0; i < y.size(); ++i) y[i] += (*this)[name + "_bias"][i];
        return y;
    }
    // The n values from x on with mean 0 and variance 1, times the weight, plus the bias, from `first` on.
    void normalise(double* x, int64_t n, const std::string& name, double eps, int64_t first = 0) const {
        double mean = 0, variance = 0;
        for (int64_t i = 0; i < n; ++i) mean += x[i] / n;
        for (int64_t i = 0; i < n; ++i) variance += std::pow(x[i] - mean, 2) / n;
        for (int64_t i = 0; i < n; ++i) {
            x[i] = (x[i] - mean) / std::sqrt(variance + eps) * (*this)[name + "_weight"][first + i];
            x[i] += (*this)[name + "_bias"][first + i];
        }
    }
    // The token x and the one before, of which the parameter counts the latter, or in `current` the former.
    Values mix(const std::string& name, const Values& x, const Values& before, bool current = false) const {
        Values y = x;
        for (size_t i = 0; i < y.size(); ++i)
            y[i] += (before[i] - x[i]) * (current ? 1 - (*this)[name][i] : (*this)[name][i]);
        return y;
    }
};

}  // namespace test
