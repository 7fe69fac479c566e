// Sums over the terms of several tasks.
#include "wkv_rows.h"

namespace wkv {
namespace WKV_SIMD {

void sum_rows(const float* rows, int64_t n_rows, int64_t stride, const wkv_tensor& to, int64_t batch, int64_t token,
              int64_t head, int64_t n) {
    for (int64_t j = 0; j < n; j += kLanes) {
        Vec sum{};
        for (int64_t i = 0; i < n_rows; ++i) sum += load(rows + i * stride + j);
        float lanes[kLanes];
        store(lanes, sum);
        pack(address(to, batch, token, head, j), lanes, to.dtype, n - j < kLanes ? n - j : kLanes);
    }
}

}  // namespace WKV_SIMD
}  // namespace wkv
