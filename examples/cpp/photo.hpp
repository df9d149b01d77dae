// Photos: decoding of JPEG and PNG, upright.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace capt {

using Bytes = std::vector<std::uint8_t>;

/// What the channels of a pixel mean, as Pillow's modes 1, P, L, LA, RGB, RGBA and CMYK.
enum class Mode { bilevel, palette, grey, grey_alpha, rgb, rgba, cmyk };

struct Image {
    int width = 0;
    int height = 0;
    Mode mode = Mode::rgb;
    Bytes pixels;   // (height, width, channels)
    Bytes palette;  // 256 colours as R, G, B; only of Mode::palette

    int channels() const;
    const std::uint8_t* at(int x, int y) const;
};

/// A decoded file: the image as it is stored, and its EXIF from the TIFF header on.
struct Decoded {
    Image image;
    Bytes exif;
};

/// Return the whole content of a regular file.
///
/// Throws std::runtime_error: it is missing, no regular file, or has more bytes than `limit`.
std::string read_file(const std::filesystem::path& path, std::uintmax_t limit);

/// Return a photo, upright (EXIF orientation applied), 8 bits a channel.
///
/// Throws PhotoError: it is no JPEG or PNG, or is damaged or too large.
Image load_photo(const std::filesystem::path& path);

/// Throw PhotoError if an image has no pixels, or more than are decoded.
void check_size(std::uint64_t width, std::uint64_t height);

Decoded decode_jpeg(const std::string& file);
Decoded decode_png(const std::string& file);

}  // namespace capt
