// wkv4, wkv6 and wkv7 of libwkv and their gradients on odd sizes, strides and threads, compared with loops in double
// precision (wkv_definitions.h).
#include "wkv_definitions.h"

namespace {

using namespace test;

// Tensors are (B, T, H, N); wkv4 has one head of V channels. Where tokens share a decay, B and T of log_w are 1.
struct Case {
    int64_t B, T, H, K, V, dtype, gap = 0, n_threads = 1;
    bool has_states = true, shared_decay = false;
    std::vector<int32_t> cu_seqlens = {};

    int64_t n_seq() const { return cu_seqlens.empty() ? B : static_cast<int64_t>(cu_seqlens.size()) - 1; }
};

struct Input {
    const char* name;
    double low, high;
};

struct Operator {
    const char* name;
    // In the order of wkv.h.
    std::vector<Input> inputs;
    bool has_heads, can_share;
    double lowest_state;
    void (*define)(Values&, const Sequence&);
    int (*forward)(const void*);
    int (*backward)(const void*);

    Sizes sizes(const Case& c, const std::string& name) const {
        const int64_t H = has_heads ? c.H : 1, K = has_heads ? c.K : c.V;
        if (name == "state") return has_heads ? Sizes{c.n_seq(), H, K, c.V} : Sizes{c.n_seq(), 1, K, 3};
        if (name == "u") return {1, 1, H, K};
        const bool shared = name == "log_w" && c.shared_decay;
        return {shared ? 1 : c.B, shared ? 1 : c.T, H, name == "v" ? c.V : K};
    }
    Tensor tensor(const Case& c, const std::string& name) const {
        if (name == "state") return Tensor(sizes(c, name), WKV_FLOAT32);
        if (name == "log_w" || name == "u") return Tensor(sizes(c, name), WKV_FLOAT32, c.gap);
        return Tensor(sizes(c, name), c.dtype, c.gap);
    }
};

template <class Args, int (*function)(const Args*)>
int call(const void* words) {
    return function(static_cast<const Args*>(words));
}

const Operator kOperators[] = {
    {"wkv4",
     {{"log_w", -0.6, 0}, {"u", -1, 1}, {"k", -1, 1}, {"v", -1, 1}},
     false,
     true,
     0.125,
     define_wkv4,
     call<wkv4_forward_args, wkv4_forward>,
     call<wkv4_backward_args, wkv4_backward>},
    {"wkv6",
     {{"r", -1, 1}, {"log_w", -0.6, 0}, {"u", -1, 1}, {"k", -1, 1}, {"v", -1, 1}},
     true,
     true,
     -1,
     define_wkv6,
     call<wkv6_forward_args, wkv6_forward>,
     call<wkv6_backward_args, wkv6_backward>},
    {"wkv7",
     {{"r", -1, 1}, {"log_w", -0.6, 0}, {"k", -1, 1}, {"v", -1, 1}, {"a", -0.2, 0.1}, {"b", -0.1, 0.2}},
     true,
     false,
     -1,
     define_wkv7,
     call<wkv7_forward_args, wkv7_forward>,
     call<wkv7_backward_args, wkv7_backward>},
};

// The structures of wkv.h as words.
struct Words {
    std::vector<int64_t> words;

    void add(const void* pointer) { words.push_back(reinterpret_cast<int64_t>(pointer)); }
    void add(Tensor& x) {
        add(x.data());
        words.insert(words.end(),
                     {x.dtype, x.sizes[0] == 1 ? 0 : x.strides[0], x.sizes[1] == 1 ? 0 : x.strides[1], x.strides[2]});
    }
    void add_state(Tensor& x, bool present = true) {
        add(present ? x.data() : nullptr);
        words.insert(words.end(), {x.strides[0], x.strides[1]});
    }
};

void run(const Operator& op, const Case& c) {
    std::map<std::string, Tensor> tensors;
    Values values;
    const auto draw = [&](const std::string& name, const std::string& like, double low, double high) {
        tensors.emplace(name, op.tensor(c, like)).first->second.fill(low, high);
        values.emplace(name, tensors.at(name).exact());
    };
    const double scale = c.has_states ? 1 : 0;
    for (const Input& input : op.inputs) draw(input.name, input.name, input.low, input.high);
    draw("state", "state", scale * op.lowest_state, scale);
    draw("grad of o", "v", -1, 1);
    draw("grad of final state", "state", -scale, scale);

    values.emplace("o", Exact(op.sizes(c, "v")));
    values.emplace("final state", Exact(op.sizes(c, "state")));
    values.emplace("gradient of state", Exact(op.sizes(c, "state")));
    for (const Input& input : op.inputs)
        values.emplace(std::string("gradient of ") + input.name, Exact(op.sizes(c, input.name)));
    for (int64_t n = 0; n < c.n_seq(); ++n)
        for (int64_t h = 0; h < (op.has_heads ? c.H : 1); ++h) {
            if (c.cu_seqlens.empty())
                op.define(values, {n, n, 0, c.T, h});
            else
                op.define(values, {n, 0, c.cu_seqlens[n], c.cu_seqlens[n + 1], h});
        }

    Words in;
    in.words = {c.n_seq(), c.T, op.has_heads ? c.H : 1, op.has_heads ? c.K : 1, c.V, c.n_threads};
    in.add(c.cu_seqlens.empty() ? nullptr : c.cu_seqlens.data());
    in.words.push_back(0);
    for (const Input& input : op.inputs) in.add(tensors.at(input.name));
    in.add_state(tensors.at("state"), c.has_states);

    const auto check = [&](const std::string& name) {
        expect(tensors.at(name), values.at(name), (std::string(op.name) + ": " + name).c_str());
    };
    Words forward = in, backward = in;
    tensors.emplace("o", op.tensor(c, "v"));
    tensors.emplace("final state", op.tensor(c, "state"));
    forward.add(tensors.at("o"));
    forward.add_state(tensors.at("final state"));
    require(op.forward(forward.words.data()) == WKV_OK, op.name);
    check("o");
    check("final state");

    backward.add(tensors.at("grad of o"));
    backward.add_state(tensors.at("grad of final state"), c.has_states);
    std::vector<std::string> gradients;
    for (const Input& input : op.inputs) {
        gradients.push_back(std::string("gradient of ") + input.name);
        backward.add(tensors.emplace(gradients.back(), op.tensor(c, input.name)).first->second);
    }
    backward.add_state(tensors.emplace("gradient of state", op.tensor(c, "state")).first->second);
    require(op.backward(backward.words.data()) == WKV_OK, op.name);
    for (const std::string& name : gradients) check(name);
    if (c.has_states) check("gradient of state");
}

}  // namespace

int main(int argc, char** argv) {
    read_tolerances(argc, argv);
    require(wkv_isa() != nullptr, "no instruction set");
    for (const Operator& op : kOperators) {
        for (int64_t dtype : {WKV_FLOAT32, WKV_BFLOAT16, WKV_FLOAT16}) {
            run(op, {2, 17, 3, 64, 64, dtype, 0, 1, false});
            run(op, {2, 37, 2, 24, 20, dtype, 3, 2});
            run(op, {1, 9, 2, 5, 7, dtype, 1});
            run(op, {3, 1, 4, 1, 130, dtype, 0, 1, false});
            run(op, {1, 30, 2, 32, 32, dtype, 5, 1, true, false, {0, 0, 5, 6, 22, 30, 30}});
            if (!op.can_share) continue;
            run(op, {2, 37, 2, 24, 20, dtype, 3, 2, true, true});
            run(op, {1, 30, 2, 32, 32, dtype, 5, 1, true, true, {0, 0, 5, 6, 22, 30, 30}});
        }
        run(op, {1, 160, 1, 64, 70, WKV_FLOAT32, 0, 3});
        run(op, {1, 16, 1, 128, 128, WKV_FLOAT32});
        run(op, {2, 0, 3, 16, 16, WKV_FLOAT32, 0, 2});
        run(op, {0, 4, 3, 16, 16, WKV_FLOAT32, 0, 2});
        if (op.can_share) run(op, {1, 160, 1, 64, 70, WKV_FLOAT32, 0, 3, true, true});
    }
    std::printf("%s %s\n", wkv_isa(), wkv_version());
}
