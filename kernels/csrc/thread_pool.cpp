#include "thread_pool.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace wkv {
namespace {

constexpr int64_t kMaxThreads = 256;
// About three microseconds: enough to bridge two kernels in a row, too short to hold a core that another pool wants.
constexpr int kSpins = 64;

// Waits until value differs from old: first spinning, then asleep.
uint32_t wait_change(std::atomic<uint32_t>& value, uint32_t old) {
    for (int i = 0; i < kSpins; ++i) {
        const uint32_t now = value.load(std::memory_order_acquire);
        if (now != old) return now;
        pause();
    }
    value.wait(old, std::memory_order_acquire);
    return value.load(std::memory_order_acquire);
}

class Pool {
  public:
    // False when another caller has the pool.
    bool run(int64_t n_tasks, int64_t n_threads, TaskFunction function, void* context) {
        const std::unique_lock lock(busy_, std::try_to_lock);
        if (!lock.owns_lock()) return false;
        const int64_t helpers = grow(n_threads - 1);
        function_ = function;
        context_ = context;
        n_tasks_ = n_tasks;
        next_.store(0, std::memory_order_relaxed);
        state_.store(static_cast<uint32_t>(helpers) << 16, std::memory_order_release);
        for (int64_t i = 0; i < helpers; ++i) {
            workers_[i]->wake.fetch_add(1);
            workers_[i]->wake.notify_one();
        }
        work();
        // No worker joins from here on, so one that has not woken up yet is not waited for.
        uint32_t active = state_.fetch_and(kActive, std::memory_order_acq_rel) & kActive;
        while (active != 0) active = wait_change(state_, active);
        return true;
    }

  private:
    struct alignas(64) Worker {
        std::atomic<uint32_t> wake{0};
    };
    static constexpr uint32_t kActive = 0xffff;

    int64_t grow(int64_t wanted) {
        wanted = std::min(wanted, kMaxThreads);
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        while (static_cast<int64_t>(workers_.size()) < wanted) {
            auto worker = std::make_unique<Worker>();
            try {
                std::thread(&Pool::serve, this, worker.get()).detach();
            } catch (const std::system_error&) {
                break;
            }
            workers_.push_back(std::move(worker));
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return std::min<int64_t>(wanted, workers_.size());
    }

    void serve(Worker* worker) {
        for (uint32_t seen = 0;;) {
            seen = wait_change(worker->wake, seen);
            if (!join()) continue;
            work();
            if ((state_.fetch_sub(1) & kActive) == 1) state_.notify_one();
        }
    }

    bool join() {
        uint32_t state = state_.load(std::memory_order_acquire);
        while (state >> 16) {
            const uint32_t joined = state - (1u << 16) + 1;
            if (state_.compare_exchange_weak(state, joined, std::memory_order_acq_rel)) return true;
        }
        return false;
    }

    void work() {
        for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < n_tasks_;)
            function_(context_, task);
    }

    std::mutex busy_;
    std::vector<std::unique_ptr<Worker>> workers_;
    TaskFunction function_ = nullptr;
    void* context_ = nullptr;
    int64_t n_tasks_ = 0;
    alignas(64) std::atomic<int64_t> next_{0};
    // Workers inside the job in the low half, places still open in the high half.
    alignas(64) std::atomic<uint32_t> state_{0};
};

// torch's own threads, where torch runs on an OpenMP with GNU's interface. Between two of its operators they spin, and
// a second set of threads would have to share their cores.
using RunTeam = void (*)(void (*)(void*), void*, unsigned, unsigned);

RunTeam openmp() {
    static const auto found = reinterpret_cast<RunTeam>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

// A child of fork has no team any more, and OpenMP would wait for it for ever.
std::atomic<bool> forked{false};

// The whole team wakes up, for OpenMP ends the threads that a smaller one leaves out; more than n_threads get no task.
void run_on_team(RunTeam run, int64_t n_tasks, int64_t n_threads, TaskFunction function, void* context) {
    struct Job {
        int64_t n_tasks, n_threads;
        TaskFunction function;
        void* context;
        std::atomic<int64_t> joined{0}, next{0};
    } job{n_tasks, n_threads, function, context};
    const auto work = [](void* data) {
        Job& job = *static_cast<Job*>(data);
        if (job.joined.fetch_add(1, std::memory_order_relaxed) >= job.n_threads) return;
        for (int64_t task; (task = job.next.fetch_add(1, std::memory_order_relaxed)) < job.n_tasks;)
            job.function(job.context, task);
    };
    run(work, &job, 0, 0);
}

// Never freed: sleeping workers may outlive every destructor, and the threads of a parent do not exist in its child.
std::atomic<Pool*> instance{nullptr};
thread_local bool inside_task = false;

Pool& pool() {
    Pool* current = instance.load(std::memory_order_acquire);
    if (current != nullptr) return *current;
    auto fresh = std::make_unique<Pool>();
    if (instance.compare_exchange_strong(current, fresh.get(), std::memory_order_acq_rel)) return *fresh.release();
    return *current;
}

// From the moment the library loads, for the team may be torch's before it is ours.
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] {
    instance.store(nullptr);
    forked.store(true);
});

struct Scratch {
    static constexpr int64_t kKept = int64_t{4} << 20;
    float* data = nullptr;
    int64_t size = 0;

    ~Scratch() { std::free(data); }

    float* get(int64_t wanted) {
        if (wanted > size || (size > kKept && wanted <= kKept)) {
            std::free(data);
            size = 0;
            data = static_cast<float*>(std::aligned_alloc(64, (wanted * sizeof(float) + 63) / 64 * 64));
            if (data == nullptr) throw std::bad_alloc();
            size = wanted;
        }
        return data;
    }
};

}  // namespace

void parallel_for(int64_t n_tasks, int64_t n_threads, TaskFunction function, void* context) {
    n_threads = std::min(n_threads, n_tasks);
    if (n_threads > 1 && !inside_task) {
        struct Job {
            TaskFunction function;
            void* context;
        } job{function, context};
        const auto guarded = [](void* data, int64_t task) {
            const Job& job = *static_cast<Job*>(data);
            inside_task = true;
            job.function(job.context, task);
            inside_task = false;
        };
        if (const RunTeam team = openmp(); team != nullptr && !forked.load())
            return run_on_team(team, n_tasks, n_threads, guarded, &job);
        if (pool().run(n_tasks, n_threads, guarded, &job)) return;
    }
    for (int64_t task = 0; task < n_tasks; ++task) function(context, task);
}

float* scratch(int64_t n_floats) {
    static thread_local Scratch memory;
    return memory.get(n_floats);
}

}  // namespace wkv
