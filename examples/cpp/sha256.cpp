#include "sha256.hpp"

#include <array>
#include <cmath>
#include <cstdint>

namespace capt {
namespace {

using Word = std::uint32_t;

Word turned(Word word, int bits) { return word >> bits | word << (32 - bits); }

/// The first 32 bits of the fractional parts of square and cube roots of the first 64 primes.
struct Constants {
    std::array<Word, 8> start{};
    std::array<Word, 64> rounds{};

    Constants() {
        int count = 0;
        for (int number = 2; count < 64; ++number) {
            bool prime = true;
            for (int divisor = 2; divisor * divisor <= number; ++divisor) {
                prime = prime && number % divisor != 0;
            }
            if (!prime) continue;
            if (count < 8) start[count] = fraction(std::sqrt(static_cast<double>(number)));
            rounds[count++] = fraction(std::cbrt(static_cast<double>(number)));
        }
    }
    static Word fraction(double root) {
        return static_cast<Word>((root - std::floor(root)) * 4294967296.0);
    }
};

void digest_block(const std::uint8_t* block, std::array<Word, 8>& state, const Constants& table) {
    std::array<Word, 64> words{};
    for (int index = 0; index < 16; ++index) {
        const std::uint8_t* byte = block + 4 * index;
        words[index] = Word{byte[0]} << 24 | Word{byte[1]} << 16 | Word{byte[2]} << 8 | byte[3];
    }
    for (int index = 16; index < 64; ++index) {
        const Word early = words[index - 15], late = words[index - 2];
        words[index] = words[index - 16] + words[index - 7] +
                       (turned(early, 7) ^ turned(early, 18) ^ early >> 3) +
                       (turned(late, 17) ^ turned(late, 19) ^ late >> 10);
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (int index = 0; index < 64; ++index) {
        const Word first = h + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) +
                           ((e & f) ^ (~e & g)) + table.rounds[index] + words[index];
        const Word second =
            (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
    }
    const std::array<Word, 8> added{a, b, c, d, e, f, g, h};
    for (int index = 0; index < 8; ++index) state[index] += added[index];
}

}  // namespace

std::string sha256(std::string_view bytes) {
    static const Constants table;
    std::array<Word, 8> state = table.start;
    const std::size_t whole = bytes.size() / 64 * 64;
    const auto* data = reinterpret_cast<const std::uint8_t*>(bytes.data());
    for (std::size_t place = 0; place < whole; place += 64) {
        digest_block(data + place, state, table);
    }
    std::string rest(bytes.substr(whole));
    rest += '\x80';
    while (rest.size() % 64 != 56) rest += '\0';
    for (int shift = 56; shift >= 0; shift -= 8) {
        rest += static_cast<char>(std::uint64_t{bytes.size()} * 8 >> shift);
    }
    for (std::size_t place = 0; place < rest.size(); place += 64) {
        digest_block(reinterpret_cast<const std::uint8_t*>(rest.data()) + place, state, table);
    }
    std::string digits;
    for (Word word : state) {
        for (int shift = 28; shift >= 0; shift -= 4) {
            digits += "0123456789abcdef"[word >> shift & 15];
        }
    }
    return digits;
}

}  // namespace capt
