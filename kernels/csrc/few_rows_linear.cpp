// few_rows_linear: reads the vectors once, then cuts the matrix into ranges of rows and runs them on the pool.
#include "few_rows_linear.h"

#include <algorithm>
#include <new>

#include "thread_pool.h"

namespace wkv {
namespace {

// A part of the matrix that is worth a task, in bytes: some thirty microseconds of reading. Every part starts slowly.
constexpr int64_t kPart = 1 << 19;

struct Kernels {
    void (*read)(const wkv_few_rows_linear_args&, float*);
    void (*multiply)(const wkv_few_rows_linear_args&, const float*, int64_t, int64_t);
};

const Kernels& kernels() {
#define WKV_ROW(isa) {isa::few_rows_read, isa::few_rows_multiply},
    static constexpr Kernels table[] = {WKV_FOR_EACH_ISA(WKV_ROW)};
#undef WKV_ROW
    return table[isa_index()];
}

}  // namespace
}  // namespace wkv

int wkv_few_rows_linear(const wkv_few_rows_linear_args* args) try {
    using namespace wkv;
    const int64_t row_size = args->n_in * (args->dtype == WKV_FLOAT32 ? 4 : 2);
    float* x = scratch(args->n_rows * padded(args->n_in));
    kernels().read(*args, x);
    // Whole blocks of rows, whatever the instruction set.
    const int64_t rows = padded(std::max<int64_t>(1, kPart / std::max<int64_t>(1, row_size)));
    const int64_t n_parts = (args->n_out + rows - 1) / rows;
    parallel_for(n_parts, args->n_threads, [&](int64_t part) {
        kernels().multiply(*args, x, part * rows, std::min(args->n_out, (part + 1) * rows));
    });
    return WKV_OK;
} catch (const std::bad_alloc&) {
    return WKV_NO_MEMORY;
}
