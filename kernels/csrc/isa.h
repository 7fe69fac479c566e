// The instruction sets that *_simd.cpp are compiled for, best first, and the choice among them.
#pragma once

#if defined(__x86_64__)
#define WKV_FOR_EACH_ISA(X) X(avx512) X(avx2) X(sse2)
#elif defined(__aarch64__)
#define WKV_FOR_EACH_ISA(X) X(neon)
#else
#define WKV_FOR_EACH_ISA(X) X(generic)
#endif

namespace wkv {

// Position in WKV_FOR_EACH_ISA of the instruction set in use; -1 if WKV_ISA names one that cannot run here.
int isa_index();

}  // namespace wkv
