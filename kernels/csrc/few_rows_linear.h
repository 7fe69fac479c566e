// What the two halves of few_rows_linear share: few_rows_linear.cpp cuts the work, few_rows_linear_simd.cpp does a
// part.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "wkv.h"
#include "wkv_task.h"

namespace wkv {

#define WKV_DECLARE(isa)                                                                                      \
    namespace isa {                                                                                           \
    /* x as float32, rows padded(n_in) apart. */                                                              \
    void few_rows_read(const wkv_few_rows_linear_args& args, float* x);                                       \
    void few_rows_multiply(const wkv_few_rows_linear_args& args, const float* x, int64_t begin, int64_t end); \
    }
WKV_FOR_EACH_ISA(WKV_DECLARE)
#undef WKV_DECLARE

}  // namespace wkv
