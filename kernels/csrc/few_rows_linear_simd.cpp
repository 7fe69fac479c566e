// The output channels [begin, end) of few_rows_linear.
#include "few_rows.h"
#include "few_rows_linear.h"

namespace wkv {
namespace WKV_SIMD {

void few_rows_read(const wkv_few_rows_linear_args& args, float* x) {
    const int64_t ld = padded(args.n_in);
    with_dtype(args.dtype, [&]<int64_t kDtype>() {
        for (int64_t b = 0; b < args.n_rows; ++b) {
            const char* row = static_cast<const char*>(args.x) + b * args.x_row * size_of(kDtype);
            widen_all<kDtype>(x + b * ld, row, args.n_in, ld);
        }
    });
}

void few_rows_multiply(const wkv_few_rows_linear_args& args, const float* x, int64_t begin, int64_t end) {
    with_dtype(args.dtype, [&]<int64_t kDtype>() {
        const auto write = [&](int64_t b, int64_t row, const float* values, int64_t count) {
            char* to = static_cast<char*>(args.y) + (b * args.y_row + row) * size_of(kDtype);
            pack(to, values, kDtype, count);
        };
        multiply_rows<kDtype>(args.weight, args.n_in, begin, end, x, padded(args.n_in), args.n_rows, write);
    });
}

}  // namespace WKV_SIMD
}  // namespace wkv
