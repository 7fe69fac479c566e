// The fused step: one parallel region for all layers. A layer is a sequence of phases, a phase is cut into parts, and
// the threads take the parts of all phases in one order. Nobody waits for a thread that holds no part, so a thread that
// the system delays, or that never comes, costs little.
#include "rwkv_step.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "thread_pool.h"

namespace wkv {
namespace {

constexpr int64_t kMaxThreads = 64;
// Weights that are worth another thread for a whole step, and another part within a phase, in bytes.
constexpr int64_t kThreadWork = 1 << 18, kPartWork = 1 << 15;
// Parts of the value phase. Their sums are added in this order whatever the number of threads, and so round alike.
// Equal parts are ready in this order too.
constexpr int64_t kValueParts = 24;
// About ten microseconds. Phases follow each other faster, unless a thread has lost its core.
constexpr int kSpins = 200;

struct Kernels {
    void (*begin)(const RwkvStep&);
    void (*prepare)(const RwkvStep&, RwkvPhase, int64_t, float*);
    void (*run)(const RwkvStep&, RwkvPhase, int64_t, int64_t, int64_t, float*);
    void (*add)(const RwkvStep&, int64_t, float*);
    void (*end)(const RwkvStep&);
};

const Kernels& kernels() {
#define WKV_ROW(isa) \
    {isa::rwkv_step_begin, isa::rwkv_step_prepare, isa::rwkv_step_run, isa::rwkv_step_add, isa::rwkv_step_end},
    static constexpr Kernels table[] = {WKV_FOR_EACH_ISA(WKV_ROW)};
#undef WKV_ROW
    return table[isa_index()];
}

// Where the parts of a phase begin, and its end. Large parts come first, so that taking them costs little; small ones
// last, so that the threads finish together.
std::vector<int64_t> cut(int64_t length, int64_t smallest, int64_t multiple, int64_t n_threads) {
    std::vector<int64_t> bounds{0};
    while (bounds.back() < length) {
        const int64_t rest = length - bounds.back();
        int64_t part = n_threads == 1 ? rest : std::max(smallest, rest / (2 * n_threads));
        part = (part + multiple - 1) / multiple * multiple;
        bounds.push_back(bounds.back() + std::min(rest, part));
    }
    return bounds;
}

class Schedule {
  public:
    Schedule(const RwkvStep& step, int64_t n_threads) : step_(step) {
        const rwkv_step_args& args = step.args;
        const int64_t size = args.dtype == WKV_FLOAT32 ? 4 : 2;
        const auto rows = [&](int64_t row) {
            return std::max<int64_t>(16, kPartWork / (std::max<int64_t>(1, row) * size));
        };
        const auto set = [&](RwkvPhase phase, int64_t smallest, int64_t multiple) {
            bounds_[phase] = cut(step.length(phase), smallest, multiple, n_threads);
            per_layer_ += n_parts(phase);
        };
        // Adapters are few rows, often of float32.
        const auto set_inner = [&](RwkvPhase phase, int64_t row) {
            set(phase, std::max<int64_t>(1, kPartWork / (4 * row)), 1);
        };
        set_inner(kProjectInner, args.C);
        set_inner(kHeadsInner, args.C);
        set_inner(kOutputInner, step.A);
        set_inner(kKeyInner, args.C);
        set_inner(kValueInner, args.F);
        set(kLow, rows(args.C), 16);
        set(kMix, rows(step.ranks[0]), 16);
        set(kProject, rows(args.C), 16);
        // Heads of one channel are those of RWKV-4.
        set(kHeads, args.K == 1 ? kWkv4Widest : 1, args.K == 1 ? 16 : 1);
        set(kOutput, rows(step.A), 16);
        set(kKey, rows(args.C), 16);
        const int64_t parts = std::min(args.F, kValueParts);
        for (int64_t i = 0; i <= parts; ++i) bounds_[kValue].push_back(args.F * i / parts);
        per_layer_ += parts;
        total_ = per_layer_ * args.L;
    }

    // Takes parts until there are none.
    void work(float* local) {
        int64_t layer = 0, phase = 0, first = 0, prepared = -1;
        for (int64_t part; (part = next_.fetch_add(1, std::memory_order_relaxed)) < total_;) {
            while (part >= first + n_parts(phase)) {
                first += n_parts(phase++);
                if (phase == kRwkvPhases) phase = 0, ++layer;
            }
            wait_until(done_, first);
            const auto which = static_cast<RwkvPhase>(phase);
            const int64_t next = is_inner(phase) ? phase + 1 : phase;
            if (prepared != layer * kRwkvPhases + next) {
                kernels().prepare(step_, static_cast<RwkvPhase>(next), layer, local);
                prepared = layer * kRwkvPhases + next;
            }
            const int64_t* bounds = &bounds_[phase][part - first];
            kernels().run(step_, which, layer, bounds[0], bounds[1], local);
            if (which == kValue) add_in_turn(layer, part - first, local);
            const int64_t done = done_.fetch_add(1) + 1;
            if (done == first + n_parts(phase)) done_.notify_all();
        }
    }

  private:
    int64_t n_parts(int64_t phase) const { return static_cast<int64_t>(bounds_[phase].size()) - 1; }

    void add_in_turn(int64_t layer, int64_t part, float* local) {
        const int64_t turn = layer * n_parts(kValue) + part;
        wait_until(added_, turn);
        kernels().add(step_, layer, local);
        // Not a mere store: it must be seen before notify_all looks for waiting threads, or one could sleep for ever.
        added_.fetch_add(1);
        added_.notify_all();
    }

    static void wait_until(const std::atomic<uint32_t>& count, int64_t wanted) {
        for (int i = 0; i < kSpins; ++i) {
            if (count.load(std::memory_order_acquire) >= wanted) return;
            pause();
        }
        for (uint32_t seen; (seen = count.load(std::memory_order_acquire)) < wanted;)
            count.wait(seen, std::memory_order_acquire);
    }

    const RwkvStep& step_;
    std::vector<int64_t> bounds_[kRwkvPhases];
    int64_t per_layer_ = 0, total_ = 0;
    alignas(64) std::atomic<int64_t> next_{0};
    // Parts that are done, and parts of value phases that are added to the residual.
    alignas(64) std::atomic<uint32_t> done_{0};
    alignas(64) std::atomic<uint32_t> added_{0};
};

int64_t choose_threads(const RwkvStep& step) {
    const rwkv_step_args& args = step.args;
    const int64_t ranks = step.ranks[0] + step.ranks[1] + step.ranks[2] + step.ranks[3];
    const int64_t weights = args.L * (4 * step.A * args.C + (args.C + step.A) * ranks + 2 * args.C * args.F);
    const int64_t useful = weights * (args.dtype == WKV_FLOAT32 ? 4 : 2) / kThreadWork;
    return std::max<int64_t>(1, std::min({args.n_threads, useful, kMaxThreads}));
}

}  // namespace
}  // namespace wkv

int rwkv_step(const rwkv_step_args* args) try {
    using namespace wkv;
    RwkvStep step(*args);
    const int64_t n_threads = choose_threads(step), shared = padded(step.shared_size()), local = step.local_size();
    float* memory = scratch(shared + n_threads * local);
    std::memset(memory, 0, shared * sizeof(float));
    step.place(memory);
    Schedule schedule(step, n_threads);
    kernels().begin(step);
    parallel_for(n_threads, n_threads, [&](int64_t i) { schedule.work(memory + shared + i * local); });
    kernels().end(step);
    return WKV_OK;
} catch (const std::bad_alloc&) {
    return WKV_NO_MEMORY;
}
