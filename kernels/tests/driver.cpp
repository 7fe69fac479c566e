// Calls wkv7 and the trie of libwkv on odd sizes, strides and threads; meant to be built with sanitizers, and to run
// with malloc filling new memory with NaN. Exits with 1 when a result is not finite or texts do not survive the trie.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "wkv.h"

namespace {

std::mt19937 generator(0);

float uniform(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(generator);
}

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "driver: %s\n", what);
    std::exit(1);
}

// (B, T, H, N) of a dtype, with `gap` unused elements between rows; memory ends with the last row.
struct Rows {
    std::vector<float> floats;
    std::vector<uint16_t> halves;
    wkv_tensor tensor;
    int64_t B, T, H, N;

    Rows(int64_t B, int64_t T, int64_t H, int64_t N, int64_t dtype, int64_t gap, float low, float high)
        : B(B), T(T), H(H), N(N) {
        const int64_t head = N + gap, token = H * head + gap, batch = T * token + gap;
        const int64_t size = B * T * H * N == 0 ? 0 : (B - 1) * batch + (T - 1) * token + (H - 1) * head + N;
        void* data;
        if (dtype == WKV_FLOAT32) {
            for (int64_t i = 0; i < size; ++i) floats.push_back(uniform(low, high));
            data = floats.data();
        } else {
            // Small numbers of both kinds: 0x3000 is 2^-3 in float16 and 2^-31 in bfloat16.
            for (int64_t i = 0; i < size; ++i) halves.push_back(uniform(0, 1) < 0.5f ? 0x3000 : 0xb000);
            data = halves.data();
        }
        tensor = {data, dtype, batch, token, head};
    }

    void require_finite(const char* what) const {
        for (float x : floats) require(std::isfinite(x), what);
        const uint16_t exponent = tensor.dtype == WKV_BFLOAT16 ? 0x7f80 : 0x7c00;
        for (uint16_t x : halves) require((x & exponent) != exponent, what);
    }
};

struct States {
    std::vector<float> floats;
    wkv_state state;

    States(int64_t n, int64_t H, int64_t K, int64_t V) : floats(n * H * K * V) {
        for (float& x : floats) x = uniform(-1, 1);
        state = {floats.data(), H * K * V, K * V};
    }

    void require_finite(const char* what) const {
        for (float x : floats) require(std::isfinite(x), what);
    }
};

void run_wkv7(int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t dtype, int64_t gap, int64_t n_threads,
              const std::vector<int32_t>& cu_seqlens = {}) {
    const int64_t n = cu_seqlens.empty() ? B : static_cast<int64_t>(cu_seqlens.size()) - 1;
    const auto keys = [&](float low, float high) { return Rows(B, T, H, K, dtype, gap, low, high); };
    const auto values = [&] { return Rows(B, T, H, V, dtype, gap, -1, 1); };
    Rows r = keys(-1, 1), k = keys(-1, 1), a = keys(-0.1f, 0), b = keys(0, 0.1f), v = values(), o = values();
    Rows log_w(B, T, H, K, WKV_FLOAT32, gap, -0.6f, 0);
    States state(n, H, K, V), final_state(n, H, K, V);
    wkv7_inputs in{n,        T,        H,        K,        V,          n_threads, nullptr, 0, r.tensor, log_w.tensor,
                   k.tensor, v.tensor, a.tensor, b.tensor, state.state};
    if (!cu_seqlens.empty()) in.cu_seqlens = cu_seqlens.data();
    const wkv7_forward_args forward{in, o.tensor, final_state.state};
    require(wkv7_forward(&forward) == WKV_OK, "wkv7_forward failed");
    o.require_finite("o");
    final_state.require_finite("final_state");

    Rows grad_o = values(), grad_v = values(), grad_r = keys(0, 0), grad_k = keys(0, 0), grad_a = keys(0, 0);
    Rows grad_b = keys(0, 0), grad_log_w(B, T, H, K, WKV_FLOAT32, gap, 0, 0);
    States grad_final_state(n, H, K, V), grad_state(n, H, K, V);
    const wkv7_backward_args backward{in,
                                      grad_o.tensor,
                                      grad_final_state.state,
                                      grad_r.tensor,
                                      grad_log_w.tensor,
                                      grad_k.tensor,
                                      grad_v.tensor,
                                      grad_a.tensor,
                                      grad_b.tensor,
                                      grad_state.state};
    require(wkv7_backward(&backward) == WKV_OK, "wkv7_backward failed");
    for (const Rows* x : {&grad_r, &grad_log_w, &grad_k, &grad_v, &grad_a, &grad_b}) x->require_finite("gradient");
    grad_state.require_finite("grad_state");

    in.state.data = nullptr;
    const wkv7_forward_args fresh{in, o.tensor, final_state.state};
    require(wkv7_forward(&fresh) == WKV_OK, "wkv7_forward failed");
    const wkv7_backward_args no_states{in,
                                       grad_o.tensor,
                                       {},
                                       grad_r.tensor,
                                       grad_log_w.tensor,
                                       grad_k.tensor,
                                       grad_v.tensor,
                                       grad_a.tensor,
                                       grad_b.tensor,
                                       {}};
    require(wkv7_backward(&no_states) == WKV_OK, "wkv7_backward failed");
}

void run_trie() {
    std::string bytes;
    std::vector<int64_t> ends;
    const auto add = [&](const std::string& piece) {
        bytes += piece;
        ends.push_back(bytes.size());
    };
    add("");
    for (int c = 0; c < 256; ++c) add(std::string(1, static_cast<char>(c)));
    for (const char* piece : {"th", "the", "there", "\xe4\xbd\xa0", "\xf0\x9f\x99\x82", "  ", "\n\n"}) add(piece);
    std::vector<uint64_t> words(1 << 12);
    const int64_t used = wkv_trie_build(reinterpret_cast<const uint8_t*>(bytes.data()), ends.data(), ends.size(),
                                        words.data(), words.size());
    require(used > 0, "wkv_trie_build failed");
    words.resize(used);
    words.shrink_to_fit();

    const std::vector<std::string> texts{"", "there  is\n\n", "\xf0\x9f\x99\x82\xe4\xbd\xa0\xe4",
                                         std::string(1000, '\xff')};
    std::string joined;
    std::vector<int64_t> text_ends;
    for (const std::string& text : texts) {
        joined += text;
        text_ends.push_back(joined.size());
    }
    std::vector<int32_t> ids(joined.size()), spans(2 * joined.size());
    std::vector<int64_t> counts(texts.size());
    for (int32_t* with_spans : {static_cast<int32_t*>(nullptr), spans.data()}) {
        wkv_trie_encode(words.data(), reinterpret_cast<const uint8_t*>(joined.data()), text_ends.data(), texts.size(),
                        ids.data(), with_spans, counts.data(), 2);
        for (size_t i = 0; i < texts.size(); ++i) {
            std::string decoded;
            for (int64_t j = 0; j < counts[i]; ++j) {
                const int32_t id = ids[text_ends[i] - texts[i].size() + j];
                decoded += bytes.substr(ends[id - 1], ends[id] - ends[id - 1]);
            }
            require(decoded == texts[i], "a text does not survive the trie");
        }
    }
}

}  // namespace

int main() {
    require(wkv_isa() != nullptr, "no instruction set");
    for (int64_t dtype : {WKV_FLOAT32, WKV_BFLOAT16, WKV_FLOAT16}) {
        run_wkv7(2, 17, 3, 64, 64, dtype, 0, 1);
        run_wkv7(2, 37, 2, 24, 20, dtype, 3, 2);
        run_wkv7(1, 9, 2, 5, 7, dtype, 1, 1);
        run_wkv7(1, 1, 1, 1, 130, dtype, 0, 1);
        run_wkv7(1, 30, 2, 32, 32, dtype, 5, 1, {0, 0, 5, 6, 22, 30, 30});
    }
    run_wkv7(1, 160, 1, 64, 70, WKV_FLOAT32, 0, 3);
    run_wkv7(1, 16, 1, 128, 128, WKV_FLOAT32, 0, 1);
    run_wkv7(2, 0, 3, 16, 16, WKV_FLOAT32, 0, 2);
    run_wkv7(0, 4, 3, 16, 16, WKV_FLOAT32, 0, 2);
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i) callers.emplace_back([] { run_trie(); });
    for (std::thread& caller : callers) caller.join();
    std::printf("%s %s\n", wkv_isa(), wkv_version());
}
