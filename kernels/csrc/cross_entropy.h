// What the two halves of cross_entropy share: cross_entropy.cpp cuts the work, cross_entropy_simd.cpp does some rows.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "wkv.h"

namespace wkv {

#define WKV_DECLARE(isa)                                                                     \
    namespace isa {                                                                          \
    void cross_entropy_rows(const wkv_cross_entropy_args& args, int64_t begin, int64_t end); \
    }
WKV_FOR_EACH_ISA(WKV_DECLARE)
#undef WKV_DECLARE

}  // namespace wkv
