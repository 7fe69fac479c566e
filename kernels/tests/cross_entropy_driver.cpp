// The cross-entropy of libwkv and its gradient on odd sizes and strides, compared with loops in double precision.
#include "numbers.h"

namespace {

using namespace test;

void run(int64_t n_rows, int64_t n_classes, int64_t dtype, int64_t gap, double pull, int64_t n_threads) {
    Tensor logits({1, 1, n_rows, n_classes}, dtype, gap), losses({1, 1, 1, n_rows}, WKV_FLOAT32);
    Exact x = logits.fill(-2, 2).exact(), expected(losses.sizes);
    std::vector<int64_t> targets;
    for (int64_t i = 0; i < n_rows; ++i) {
        targets.push_back(i * 7919 % n_classes);
        int64_t largest = 0;
        double sum = 0;
        for (int64_t c = 0; c < n_classes; ++c) {
            sum += std::exp(x(0, 0, i, c));
            if (x(0, 0, i, c) > x(0, 0, i, largest)) largest = c;
        }
        expected(0, 0, 0, i) = std::log(sum) - x(0, 0, i, targets[i]);
        const double pulled = pull * x(0, 0, i, largest);
        for (int64_t c = 0; c < n_classes; ++c) x(0, 0, i, c) = std::exp(x(0, 0, i, c)) / sum - (c == targets[i]);
        x(0, 0, i, largest) += pulled;
    }
    wkv_cross_entropy_args args{};
    args.n_rows = n_rows, args.n_classes = n_classes, args.dtype = dtype, args.n_threads = n_threads;
    args.logits = logits.data(), args.row = logits.strides[2], args.targets = targets.data(), args.pull = pull;
    args.losses = static_cast<float*>(losses.data());
    require(wkv_cross_entropy(&args) == WKV_OK, "wkv_cross_entropy failed");
    expect(losses, expected, "cross_entropy: losses");
    expect(logits, x, "cross_entropy: gradient");
}

}  // namespace

int main(int argc, char** argv) {
    read_tolerances(argc, argv);
    require(wkv_isa() != nullptr, "no instruction set");
    for (int64_t dtype : {WKV_FLOAT32, WKV_BFLOAT16, WKV_FLOAT16}) {
        run(1, 2, dtype, 0, 0, 1);
        run(3, 37, dtype, 5, 0.25, 1);
        run(40, 1000, dtype, 1, 1e-2, 3);
    }
    std::printf("%s %s\n", wkv_isa(), wkv_version());
}
