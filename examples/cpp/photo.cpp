#include "photo.hpp"

#include <algorithm>
#include <fstream>
#include <system_error>

#include "errors.hpp"

namespace capt {
namespace {

constexpr std::uint64_t largest_pixels = (1ull << 29) / 3;  // as capt_deploy.data.images
constexpr std::uintmax_t largest_file = 1ull << 31;         // bytes

/// Return the EXIF orientation, 1 to 8; 1 where there is none or EXIF is damaged.
int orientation(const Bytes& exif) {
    if (exif.size() < 8) return 1;
    const bool little = exif[0] == 'I';
    const auto number = [&](std::size_t place, int bytes) {
        std::uint64_t value = 0;
        for (int index = 0; index < bytes; ++index) {
            value = value << 8 | exif[place + (little ? bytes - 1 - index : index)];
        }
        return value;
    };
    const std::uint64_t directory = number(4, 4);
    if (directory + 2 > exif.size()) return 1;
    const std::uint64_t entries = number(directory, 2);
    for (std::uint64_t entry = 0; entry < entries; ++entry) {
        const std::uint64_t place = directory + 2 + 12 * entry;
        if (place + 12 > exif.size()) return 1;
        if (number(place, 2) != 0x0112) continue;
        const std::uint64_t type = number(place + 2, 2);  // 3: 16 bits, 4: 32 bits
        const std::uint64_t value = type == 3   ? number(place + 8, 2)
                                    : type == 4 ? number(place + 8, 4)
                                                : 1;
        return 1 <= value && value <= 8 ? static_cast<int>(value) : 1;
    }
    return 1;
}

/// Return an image turned or mirrored so that its orientation is 1.
Image upright(const Image& stored, int orientation) {
    if (orientation == 1) return stored;
    const int channels = stored.channels();
    const int right = stored.width - 1, bottom = stored.height - 1;
    Image turned = stored;
    if (orientation >= 5) std::swap(turned.width, turned.height);
    std::uint8_t* target = turned.pixels.data();
    for (int y = 0; y < turned.height; ++y) {
        for (int x = 0; x < turned.width; ++x, target += channels) {
            const std::uint8_t* source = nullptr;
            switch (orientation) {
                case 2: source = stored.at(right - x, y); break;
                case 3: source = stored.at(right - x, bottom - y); break;
                case 4: source = stored.at(x, bottom - y); break;
                case 5: source = stored.at(y, x); break;
                case 6: source = stored.at(y, bottom - x); break;
                case 7: source = stored.at(right - y, bottom - x); break;
                default: source = stored.at(right - y, x); break;
            }
            std::copy_n(source, channels, target);
        }
    }
    return turned;
}

}  // namespace

int Image::channels() const {
    switch (mode) {
        case Mode::grey_alpha: return 2;
        case Mode::rgb: return 3;
        case Mode::rgba:
        case Mode::cmyk: return 4;
        default: return 1;
    }
}

const std::uint8_t* Image::at(int x, int y) const {
    return pixels.data() + (static_cast<std::size_t>(y) * width + x) * channels();
}

std::string read_file(const std::filesystem::path& path, std::uintmax_t limit) {
    std::error_code failure;
    const auto status = std::filesystem::status(path, failure);
    if (!std::filesystem::exists(status)) throw std::runtime_error("no such file");
    // A pipe would block, a device never end.
    if (!std::filesystem::is_regular_file(status)) throw std::runtime_error("is no regular file");
    const std::uintmax_t size = std::filesystem::file_size(path, failure);
    if (failure) throw std::runtime_error("cannot be read (" + failure.message() + ")");
    if (size > limit) {
        throw std::runtime_error("expected at most " + std::to_string(limit) + " bytes, came " +
                                 std::to_string(size));
    }
    std::string content(size, '\0');
    std::ifstream stream(path, std::ios::binary);
    if (!stream.read(content.data(), static_cast<std::streamsize>(size))) {
        throw std::runtime_error("cannot be read");
    }
    return content;
}

void check_size(std::uint64_t width, std::uint64_t height) {
    if (width == 0 || height == 0) throw PhotoError("expected at least one pixel");
    if (width * height > largest_pixels) {
        throw PhotoError("too many pixels: expected at most " + std::to_string(largest_pixels) +
                         ", came " + std::to_string(width) + " x " + std::to_string(height) +
                         "; make it smaller");
    }
}

Image load_photo(const std::filesystem::path& path) {
    std::string file;
    try {
        file = read_file(path, largest_file);
    } catch (const std::runtime_error& error) {
        throw PhotoError(error.what());
    }
    Decoded decoded;
    if (file.rfind("\xff\xd8\xff", 0) == 0) {
        decoded = decode_jpeg(file);
    } else if (file.rfind("\x89PNG\r\n\x1a\n", 0) == 0) {
        decoded = decode_png(file);
    } else {
        throw PhotoError("no JPEG or PNG, or damaged; convert it to one of these");
    }
    return upright(decoded.image, orientation(decoded.exif));
}

}  // namespace capt
