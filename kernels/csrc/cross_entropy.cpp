// cross_entropy: cuts the rows into ranges and runs them on the pool.
#include "cross_entropy.h"

#include <algorithm>

#include "thread_pool.h"

namespace wkv {
namespace {

// Logits of a task, some ten microseconds of work.
constexpr int64_t kPart = 1 << 17;

using Rows = void (*)(const wkv_cross_entropy_args&, int64_t, int64_t);

Rows kernel() {
#define WKV_ROW(isa) isa::cross_entropy_rows,
    static constexpr Rows table[] = {WKV_FOR_EACH_ISA(WKV_ROW)};
#undef WKV_ROW
    return table[isa_index()];
}

}  // namespace
}  // namespace wkv

int wkv_cross_entropy(const wkv_cross_entropy_args* args) {
    using namespace wkv;
    const int64_t rows = std::max<int64_t>(1, kPart / std::max<int64_t>(1, args->n_classes));
    const int64_t n_parts = (args->n_rows + rows - 1) / rows;
    parallel_for(n_parts, args->n_threads,
                 [&](int64_t part) { kernel()(*args, part * rows, std::min(args->n_rows, (part + 1) * rows)); });
    return WKV_OK;
}
