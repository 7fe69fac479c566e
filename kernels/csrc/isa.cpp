#include "isa.h"

#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "wkv.h"

namespace wkv {
namespace {

bool runs_here([[maybe_unused]] std::string_view isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == "avx2") return avx2;
    if (isa == "avx512")
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return true;
}

struct Isas {
    std::vector<std::string> names;
    std::string available;
    int chosen = -1;

    Isas() {
#define WKV_NAME(isa) names.emplace_back(#isa);
        WKV_FOR_EACH_ISA(WKV_NAME)
#undef WKV_NAME
        const char* forced = std::getenv("WKV_ISA");
        for (size_t i = 0; i < names.size(); ++i) {
            if (!runs_here(names[i])) continue;
            available += (available.empty() ? "" : " ") + names[i];
            if (chosen < 0 && (forced == nullptr || names[i] == forced)) chosen = static_cast<int>(i);
        }
    }
};

const Isas& isas() {
    static const Isas value;
    return value;
}

}  // namespace

int isa_index() {
    return isas().chosen;
}

}  // namespace wkv

const char* wkv_version() {
    return WKV_VERSION;
}

const char* wkv_isa() {
    const wkv::Isas& isas = wkv::isas();
    return isas.chosen < 0 ? nullptr : isas.names[isas.chosen].c_str();
}

const char* wkv_isas() {
    return wkv::isas().available.c_str();
}
