// Greedy longest match over bytes, with a trie stored as a double array (Aoe 1989).
//
// A node is one 64-bit word: the id of the piece that ends there (0: none), the byte that led to it, and its base. The
// child of a node for byte c lies at base + c, and is a child of that node exactly when the byte stored there is c: no
// two nodes share a base, and base 0 is that of the nodes without children. A step costs one load.
#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>
#include <vector>

#include "thread_pool.h"
#include "wkv.h"

namespace {

// From the low end: 32 bits id, 9 bits byte (kNoByte in an empty word), 23 bits base.
constexpr uint64_t kNoByte = 256;
constexpr uint64_t kEmpty = kNoByte << 32;
constexpr int64_t kMaxWords = int64_t{1} << 23;

uint64_t make_node(int64_t id, uint64_t byte) {
    return static_cast<uint64_t>(id) | byte << 32;
}
uint32_t id_of(uint64_t node) {
    return static_cast<uint32_t>(node);
}
uint64_t byte_of(uint64_t node) {
    return node >> 32 & 511;
}
uint64_t base_of(uint64_t node) {
    return node >> 41;
}

// Finds a base for each node in turn. Words are linked into a list of empty ones, so that full stretches cost nothing.
class Places {
  public:
    explicit Places(int64_t capacity) : next_(capacity + 1), used_base_(capacity, false) {
        std::iota(next_.begin(), next_.end(), 0);
    }

    // The least base at or after the search start whose words for all bytes are empty; -1 when there is none.
    int64_t find(const std::vector<int>& bytes, const uint64_t* words, int64_t capacity) {
        int64_t misses = 0;
        for (int64_t place = empty_from(start_); place + 256 <= capacity; place = empty_from(place + 1)) {
            const int64_t base = place - bytes.front();
            const auto taken = [&](int byte) { return words[base + byte] != kEmpty; };
            if (base > 0 && !used_base_[base] && std::none_of(bytes.begin(), bytes.end(), taken)) {
                // Few bytes fit almost anywhere; where even they failed often, the stretch is as good as full.
                if (misses > 64 && bytes.size() <= 2) start_ = place;
                used_base_[base] = true;
                return base;
            }
            ++misses;
        }
        return -1;
    }

    void fill(int64_t place) { next_[place] = place + 1; }

  private:
    int64_t empty_from(int64_t place) {
        int64_t root = place;
        while (next_[root] != root) root = next_[root];
        while (next_[place] != root && place != root) {
            const int64_t after = next_[place];
            next_[place] = root;
            place = after;
        }
        return root;
    }

    // next_[i] == i for an empty word, else a word nearer to the next empty one.
    std::vector<int64_t> next_;
    std::vector<bool> used_base_;
    int64_t start_ = 0;
};

struct Pieces {
    const uint8_t* bytes;
    const int64_t* ends;

    int64_t begin(int64_t i) const { return i == 0 ? 0 : ends[i - 1]; }
    int64_t size(int64_t i) const { return ends[i] - begin(i); }
    uint8_t at(int64_t i, int64_t offset) const { return bytes[begin(i) + offset]; }
    bool less(int64_t i, int64_t j) const {
        return std::lexicographical_compare(bytes + begin(i), bytes + ends[i], bytes + begin(j), bytes + ends[j]);
    }
};

// The pieces sorted[first..last) share their first `depth` bytes, which lead to the word at `place`.
struct Range {
    int64_t first, last, depth, place;
};

int64_t build(const Pieces& pieces, int64_t n_pieces, uint64_t* words, int64_t capacity) {
    capacity = std::min(capacity, kMaxWords);
    if (capacity < 512) return -1;
    std::vector<int64_t> sorted;
    for (int64_t i = 0; i < n_pieces; ++i) {
        if (pieces.size(i) > 0) sorted.push_back(i);
    }
    std::sort(sorted.begin(), sorted.end(), [&](int64_t i, int64_t j) { return pieces.less(i, j); });
    std::fill(words, words + capacity, kEmpty);

    Places places(capacity);
    // The root lies at word 0, which no byte leads to.
    places.fill(0);
    int64_t n_words = 1;
    std::vector<Range> ranges{{0, static_cast<int64_t>(sorted.size()), 0, 0}};
    std::vector<int> bytes;
    for (size_t next = 0; next < ranges.size(); ++next) {
        auto [first, last, depth, place] = ranges[next];
        while (first < last && pieces.size(sorted[first]) == depth) ++first;
        bytes.clear();
        for (int64_t i = first; i < last; ++i) {
            const int byte = pieces.at(sorted[i], depth);
            if (bytes.empty() || bytes.back() != byte) bytes.push_back(byte);
        }
        if (bytes.empty()) continue;
        const int64_t base = places.find(bytes, words, capacity);
        if (base < 0) return -1;
        words[place] |= static_cast<uint64_t>(base) << 41;
        n_words = std::max(n_words, base + 256);
        for (const int byte : bytes) {
            int64_t end = first;
            while (end < last && pieces.at(sorted[end], depth) == byte) ++end;
            const int64_t piece = sorted[first];
            words[base + byte] = make_node(pieces.size(piece) == depth + 1 ? piece : 0, byte);
            places.fill(base + byte);
            ranges.push_back({first, end, depth + 1, base + byte});
            first = end;
        }
    }
    return n_words;
}

// True for the first byte of a character in UTF-8.
bool starts_character(uint8_t byte) {
    return (byte & 0xc0) != 0x80;
}

int64_t encode(const uint64_t* words, const uint8_t* text, int64_t size, int32_t* ids, int32_t* spans) {
    const uint64_t root = base_of(words[0]);
    const uint8_t* const end = text + size;
    int32_t* out = ids;
    int32_t characters = 0;
    while (text < end) {
        uint64_t node = words[root + *text];
        uint32_t id = id_of(node);
        const uint8_t* stop = text + 1;
        for (const uint8_t* at = stop; at < end; ++at) {
            node = words[base_of(node) + *at];
            if (byte_of(node) != *at) break;
            if (id_of(node) != 0) {
                id = id_of(node);
                stop = at + 1;
            }
        }
        *out++ = static_cast<int32_t>(id);
        if (spans != nullptr) {
            *spans++ = characters - !starts_character(*text);
            characters += static_cast<int32_t>(std::count_if(text, stop, starts_character));
            *spans++ = characters;
        }
        text = stop;
    }
    return out - ids;
}

}  // namespace

int64_t wkv_trie_build(const uint8_t* bytes, const int64_t* ends, int64_t n_pieces, uint64_t* words, int64_t capacity) {
    try {
        return build({bytes, ends}, n_pieces, words, capacity);
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

void wkv_trie_encode(const uint64_t* words, const uint8_t* bytes, const int64_t* ends, int64_t n_texts, int32_t* ids,
                     int32_t* spans, int64_t* counts, int64_t n_threads) {
    // Texts are handed out by the block in which they start: many short ones at a time, a long one alone.
    constexpr int64_t kBlock = 1 << 15;
    if (n_texts == 0) return;
    const auto first_text = [&](int64_t block) {
        const int64_t* after = std::lower_bound(ends, ends + n_texts - 1, block * kBlock);
        return block == 0 ? 0 : after - ends + 1;
    };
    const int64_t n_blocks = (n_texts == 1 ? 0 : ends[n_texts - 2] / kBlock) + 1;
    wkv::parallel_for(n_blocks, n_threads, [&](int64_t block) {
        const int64_t last = block + 1 == n_blocks ? n_texts : first_text(block + 1);
        for (int64_t i = first_text(block); i < last; ++i) {
            const int64_t begin = i == 0 ? 0 : ends[i - 1];
            int32_t* const text_spans = spans == nullptr ? nullptr : spans + 2 * begin;
            counts[i] = encode(words, bytes + begin, ends[i] - begin, ids + begin, text_spans);
        }
    });
}
