// The threads shared by every kernel: torch's OpenMP team where there is one, else a small pool of our own.
#pragma once

#include <cstdint>

namespace wkv {

using TaskFunction = void (*)(void* context, int64_t task);

// Runs function(context, i) for every i in [0, n_tasks) on at most n_threads threads, the caller among them, and
// returns when all are done. Tasks are taken in order, one at a time. Tasks must not throw. Safe from several threads
// at once (each has its team; of the pool, one caller gets it and the others work alone), inside a task (the inner loop
// is serial) and after fork().
void parallel_for(int64_t n_tasks, int64_t n_threads, TaskFunction function, void* context);

template <class F>
void parallel_for(int64_t n_tasks, int64_t n_threads, F&& f) {
    parallel_for(n_tasks, n_threads, [](void* context, int64_t task) { (*static_cast<F*>(context))(task); }, &f);
}

// Tells the processor that this thread spins.
inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Memory of the calling thread, 64-byte aligned, valid until its next call; kept for reuse while it is small.
// Throws std::bad_alloc.
float* scratch(int64_t n_floats);

}  // namespace wkv
