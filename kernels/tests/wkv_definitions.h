// The recurrences and their gradients, one sequence and head, as loops in double precision.
//
// Letters as in wkv.h: S state (K, V), d = exp(log_w), sa = a S; g for gradients, G = dL/dS.
#pragma once

#include <map>
#include <string>

#include "numbers.h"

namespace test {

using Values = std::map<std::string, Exact>;

// Head h of sequence n: the tokens [begin, end) of batch row i.
struct Sequence {
    int64_t n, i, begin, end, h;
};

// A value of a token, or the one that all tokens or rows share.
inline double& at(Exact& x, int64_t i, int64_t t, int64_t h, int64_t p) {
    return x(x.sizes[0] == 1 ? 0 : i, x.sizes[1] == 1 ? 0 : t, h, p);
}

template <class F>
void each(int64_t K, int64_t V, F&& f) {
    for (int64_t p = 0; p < K; ++p)
        for (int64_t q = 0; q < V; ++q) f(p, q);
}

inline void define_wkv7(Values& x, const Sequence& s) {
    Exact &r = x.at("r"), &log_w = x.at("log_w"), &k = x.at("k"), &v = x.at("v"), &a = x.at("a"), &b = x.at("b");
    Exact &go = x.at("grad of o"), &o = x.at("o"), &gr = x.at("gradient of r"), &gw = x.at("gradient of log_w");
    Exact &gk = x.at("gradient of k"), &gv = x.at("gradient of v"), &ga = x.at("gradient of a");
    Exact& gb = x.at("gradient of b");
    const int64_t n = s.n, i = s.i, h = s.h, T = s.end - s.begin, K = r.sizes[3], V = v.sizes[3];
    Exact S({1, T + 1, K, V}), sa({1, 1, T, V}), G({1, 1, K, V});
    each(K, V, [&](int64_t p, int64_t q) { S(0, 0, p, q) = x.at("state")(n, h, p, q); });
    for (int64_t t = 0; t < T; ++t) {
        const int64_t j = s.begin + t;
        each(K, V, [&](int64_t p, int64_t q) { sa(0, 0, t, q) += a(i, j, h, p) * S(0, t, p, q); });
        each(K, V, [&](int64_t p, int64_t q) {
            S(0, t + 1, p, q) = std::exp(log_w(i, j, h, p)) * S(0, t, p, q) + b(i, j, h, p) * sa(0, 0, t, q) +
                                k(i, j, h, p) * v(i, j, h, q);
            o(i, j, h, q) += r(i, j, h, p) * S(0, t + 1, p, q);
        });
    }
    each(K, V, [&](int64_t p, int64_t q) {
        x.at("final state")(n, h, p, q) = S(0, T, p, q);
        G(0, 0, p, q) = x.at("grad of final state")(n, h, p, q);
    });
    for (int64_t t = T - 1; t >= 0; --t) {
        const int64_t j = s.begin + t;
        std::vector<double> grad_sa(V);
        each(K, V, [&](int64_t p, int64_t q) {
            G(0, 0, p, q) += r(i, j, h, p) * go(i, j, h, q);
            grad_sa[q] += b(i, j, h, p) * G(0, 0, p, q);
        });
        each(K, V, [&](int64_t p, int64_t q) {
            const double d = std::exp(log_w(i, j, h, p)), g = G(0, 0, p, q);
            gr(i, j, h, p) += S(0, t + 1, p, q) * go(i, j, h, q);
            gw(i, j, h, p) += d * g * S(0, t, p, q);
            gk(i, j, h, p) += g * v(i, j, h, q);
            gv(i, j, h, q) += g * k(i, j, h, p);
            ga(i, j, h, p) += S(0, t, p, q) * grad_sa[q];
            gb(i, j, h, p) += g * sa(0, 0, t, q);
            G(0, 0, p, q) = d * g + a(i, j, h, p) * grad_sa[q];
        });
    }
    each(K, V, [&](int64_t p, int64_t q) { x.at("gradient of state")(n, h, p, q) = G(0, 0, p, q); });
}

inline void define_wkv6(Values& x, const Sequence& s) {
    Exact &r = x.at("r"), &log_w = x.at("log_w"), &u = x.at("u"), &k = x.at("k"), &v = x.at("v"), &o = x.at("o");
    Exact &go = x.at("grad of o"), &gr = x.at("gradient of r"), &gw = x.at("gradient of log_w");
    Exact &gu = x.at("gradient of u"), &gk = x.at("gradient of k"), &gv = x.at("gradient of v");
    const int64_t n = s.n, i = s.i, h = s.h, T = s.end - s.begin, K = r.sizes[3], V = v.sizes[3];
    Exact S({1, T + 1, K, V}), G({1, 1, K, V});
    each(K, V, [&](int64_t p, int64_t q) { S(0, 0, p, q) = x.at("state")(n, h, p, q); });
    for (int64_t t = 0; t < T; ++t) {
        const int64_t j = s.begin + t;
        each(K, V, [&](int64_t p, int64_t q) {
            const double kv = k(i, j, h, p) * v(i, j, h, q);
            o(i, j, h, q) += r(i, j, h, p) * (S(0, t, p, q) + u(0, 0, h, p) * kv);
            S(0, t + 1, p, q) = std::exp(at(log_w, i, j, h, p)) * S(0, t, p, q) + kv;
        });
    }
    each(K, V, [&](int64_t p, int64_t q) {
        x.at("final state")(n, h, p, q) = S(0, T, p, q);
        G(0, 0, p, q) = x.at("grad of final state")(n, h, p, q);
    });
    for (int64_t t = T - 1; t >= 0; --t) {
        const int64_t j = s.begin + t;
        each(K, V, [&](int64_t p, int64_t q) {
            const double d = std::exp(at(log_w, i, j, h, p)), g = G(0, 0, p, q), gy = go(i, j, h, q);
            const double bonus = r(i, j, h, p) * gy * u(0, 0, h, p);
            gr(i, j, h, p) += gy * (S(0, t, p, q) + u(0, 0, h, p) * k(i, j, h, p) * v(i, j, h, q));
            gu(0, 0, h, p) += gy * r(i, j, h, p) * k(i, j, h, p) * v(i, j, h, q);
            gk(i, j, h, p) += v(i, j, h, q) * (g + bonus);
            gv(i, j, h, q) += k(i, j, h, p) * (g + bonus);
            at(gw, i, j, h, p) += d * g * S(0, t, p, q);
            G(0, 0, p, q) = d * g + r(i, j, h, p) * gy;
        });
    }
    each(K, V, [&](int64_t p, int64_t q) { x.at("gradient of state")(n, h, p, q) = G(0, 0, p, q); });
}

// Sums of values and weights as they are, for small keys; p only for the state that comes out.
inline void define_wkv4(Values& x, const Sequence& s) {
    Exact &log_w = x.at("log_w"), &u = x.at("u"), &k = x.at("k"), &v = x.at("v"), &o = x.at("o"), &in = x.at("state");
    Exact &go = x.at("grad of o"), &gw = x.at("gradient of log_w"), &gu = x.at("gradient of u");
    Exact &gk = x.at("gradient of k"), &gv = x.at("gradient of v"), &final = x.at("final state");
    Exact &g_final = x.at("grad of final state"), &g_state = x.at("gradient of state");
    const int64_t n = s.n, i = s.i, T = s.end - s.begin;
    for (int64_t c = 0; c < k.sizes[3]; ++c) {
        double p = in(n, 0, c, 1) == 0 ? -1e38 : in(n, 0, c, 2);
        const double first = std::exp(p);
        std::vector<double> A{in(n, 0, c, 0) * first}, B{in(n, 0, c, 1) * first};
        for (int64_t t = 0; t < T; ++t) {
            const int64_t j = s.begin + t;
            const double key = k(i, j, 0, c), w = at(log_w, i, j, 0, c), e = std::exp(u(0, 0, 0, c) + key);
            o(i, j, 0, c) = (A[t] + e * v(i, j, 0, c)) / (B[t] + e);
            A.push_back(std::exp(w) * A[t] + std::exp(key) * v(i, j, 0, c));
            B.push_back(std::exp(w) * B[t] + std::exp(key));
            p = std::max(p + w, key);
        }
        const double last = T == 0 ? 1 / first : std::exp(-p);
        final(n, 0, c, 0) = T == 0 ? in(n, 0, c, 0) : A[T] * last;
        final(n, 0, c, 1) = T == 0 ? in(n, 0, c, 1) : B[T] * last;
        final(n, 0, c, 2) = p;
        double gA = g_final(n, 0, c, 0) * last, gB = g_final(n, 0, c, 1) * last;
        for (int64_t t = T - 1; t >= 0; --t) {
            const int64_t j = s.begin + t;
            const double key = std::exp(k(i, j, 0, c)), e = std::exp(u(0, 0, 0, c)) * key;
            const double d = std::exp(at(log_w, i, j, 0, c)), y = o(i, j, 0, c), g = go(i, j, 0, c) / (B[t] + e);
            // v - y without the digits that a difference would lose.
            const double through_bonus = e * g * (B[t] * v(i, j, 0, c) - A[t]) / (B[t] + e);
            gu(0, 0, 0, c) += through_bonus;
            gk(i, j, 0, c) = through_bonus + key * (gA * v(i, j, 0, c) + gB);
            gv(i, j, 0, c) = e * g + key * gA;
            at(gw, i, j, 0, c) += d * (gA * A[t] + gB * B[t]);
            gA = d * gA + g, gB = d * gB - g * y;
        }
        g_state(n, 0, c, 0) = T == 0 ? g_final(n, 0, c, 0) : gA * first;
        g_state(n, 0, c, 1) = T == 0 ? g_final(n, 0, c, 1) : gB * first;
        g_state(n, 0, c, 2) = T == 0 ? 0 : (gA * A[0] + gB * B[0]);
    }
}

}  // namespace test
