// The trie of libwkv from several threads at once: texts must survive it.
#include <cstdint>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "numbers.h"

namespace {

using test::require;

void run_trie() {
    std::string bytes;
    std::vector<int64_t> ends;
    const auto add = [&](const std::string& piece) {
        bytes += piece;
        ends.push_back(bytes.size());
    };
    add("");
    for (int c = 0; c < 256; ++c) add(std::string(1, static_cast<char>(c)));
    for (const char* piece : {"th", "the", "there", "\xe4\xbd\xa0", "\xf0\x9f\x99\x82", "  ", "\n\n"}) add(piece);
    std::vector<uint64_t> words(1 << 12);
    const int64_t used = wkv_trie_build(reinterpret_cast<const uint8_t*>(bytes.data()), ends.data(), ends.size(),
                                        words.data(), words.size());
    require(used > 0, "wkv_trie_build failed");
    words.resize(used);
    words.shrink_to_fit();

    const std::vector<std::string> texts{"", "there  is\n\n", "\xf0\x9f\x99\x82\xe4\xbd\xa0\xe4",
                                         std::string(1000, '\xff')};
    std::string joined;
    std::vector<int64_t> text_ends;
    for (const std::string& text : texts) {
        joined += text;
        text_ends.push_back(joined.size());
    }
    std::vector<int32_t> ids(joined.size()), spans(2 * joined.size());
    std::vector<int64_t> counts(texts.size());
    for (int32_t* with_spans : {static_cast<int32_t*>(nullptr), spans.data()}) {
        wkv_trie_encode(words.data(), reinterpret_cast<const uint8_t*>(joined.data()), text_ends.data(), texts.size(),
                        ids.data(), with_spans, counts.data(), 2);
        for (size_t i = 0; i < texts.size(); ++i) {
            std::string decoded;
            for (int64_t j = 0; j < counts[i]; ++j) {
                const int32_t id = ids[text_ends[i] - texts[i].size() + j];
                decoded += bytes.substr(ends[id - 1], ends[id] - ends[id - 1]);
            }
            require(decoded == texts[i], "a text does not survive the trie");
        }
    }
}

}  // namespace

int main() {
    require(wkv_isa() != nullptr, "no instruction set");
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i) callers.emplace_back(run_trie);
    for (std::thread& caller : callers) caller.join();
    std::printf("%s %s\n", wkv_isa(), wkv_version());
}
