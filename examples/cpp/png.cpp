#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstring>

#include "errors.hpp"
#include "photo.hpp"

namespace capt {
namespace {

/// libpng's decoder. libpng is C and reports errors by a jump out of its functions.
struct Decoder {
    png_structp png = nullptr;
    png_infop info = nullptr;
    const std::string& file;
    std::size_t place = 0;
    std::string message;

    explicit Decoder(const std::string& bytes) : file(bytes) {
        png = png_create_read_struct(PNG_LIBPNG_VER_STRING, this, on_error, on_warning);
        info = png == nullptr ? nullptr : png_create_info_struct(png);
        if (info == nullptr) throw PhotoError("out of memory");
        png_set_read_fn(png, this, on_read);
        png_set_user_limits(png, PNG_UINT_31_MAX, PNG_UINT_31_MAX);  // check_size has others
    }
    ~Decoder() { png_destroy_read_struct(&png, &info, nullptr); }
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    static void on_error(png_structp png, png_const_charp text) {
        static_cast<Decoder*>(png_get_error_ptr(png))->message = text;
        png_longjmp(png, 1);
    }
    static void on_warning(png_structp, png_const_charp) {}
    static void on_read(png_structp png, png_bytep target, std::size_t size) {
        Decoder& decoder = *static_cast<Decoder*>(png_get_io_ptr(png));
        if (size > decoder.file.size() - decoder.place) png_error(png, "cut off");
        std::memcpy(target, decoder.file.data() + decoder.place, size);
        decoder.place += size;
    }
};

/// Call libpng and return whether it went well. All that can fail is called through this function,
/// for libpng jumps back into it. No object with a destructor may live in `calls`: a jump skips it.
template <typename Calls>
bool succeeds(Decoder& decoder, Calls calls) {
    if (setjmp(png_jmpbuf(decoder.png))) return false;
    calls(decoder.png, decoder.info);
    return true;
}

template <typename Calls>
void need(Decoder& decoder, Calls calls) {
    if (!succeeds(decoder, calls)) throw PhotoError("damaged PNG (" + decoder.message + ")");
}

/// Return the mode of a PNG; ask libpng for whole bytes, and for the upper 8 of 16 bits in colour.
Mode set_up(png_structp png, png_infop info) {
    const int depth = png_get_bit_depth(png, info);
    switch (png_get_color_type(png, info)) {
        case PNG_COLOR_TYPE_PALETTE: png_set_packing(png); return Mode::palette;
        case PNG_COLOR_TYPE_GRAY:
            if (depth < 8) png_set_expand_gray_1_2_4_to_8(png);
            return depth == 1 ? Mode::bilevel : Mode::grey;
        case PNG_COLOR_TYPE_GRAY_ALPHA: png_set_strip_16(png); return Mode::grey_alpha;
        case PNG_COLOR_TYPE_RGB: png_set_strip_16(png); return Mode::rgb;
        default: png_set_strip_16(png); return Mode::rgba;
    }
}

Bytes palette_of(Decoder& decoder) {
    Bytes palette(256 * 3);  // what is beyond its end is black
    png_colorp colours = nullptr;
    int count = 0;
    need(decoder, [&](auto png, auto info) { png_get_PLTE(png, info, &colours, &count); });
    for (int index = 0; index < count; ++index) {
        const png_color& colour = colours[index];
        const std::uint8_t rgb[] = {colour.red, colour.green, colour.blue};
        std::copy_n(rgb, 3, palette.begin() + 3 * index);
    }
    return palette;
}

}  // namespace

/// Decode the first image of a PNG, with the settings of Pillow.
Decoded decode_png(const std::string& file) {
    Decoder decoder(file);
    std::size_t width = 0, height = 0, row_bytes = 0;
    need(decoder, [&](auto png, auto info) {
        png_read_info(png, info);
        width = png_get_image_width(png, info);
        height = png_get_image_height(png, info);
    });
    check_size(width, height);
    Decoded decoded;
    Image& image = decoded.image;
    image.width = static_cast<int>(width);
    image.height = static_cast<int>(height);
    int passes = 1;  // more if it is interlaced
    need(decoder, [&](auto png, auto info) {
        image.mode = set_up(png, info);
        passes = png_set_interlace_handling(png);
        png_read_update_info(png, info);
        row_bytes = png_get_rowbytes(png, info);
    });
    if (image.mode == Mode::palette) image.palette = palette_of(decoder);

    Bytes pixels(row_bytes * height);
    need(decoder, [&](auto png, auto) {
        for (std::size_t row = 0; row < passes * height; ++row) {
            png_read_row(png, pixels.data() + row % height * row_bytes, nullptr);
        }
    });
    if (row_bytes == 2 * width && image.mode == Mode::grey) {  // 16 bits of grey
        for (std::size_t index = 0; index < pixels.size() / 2; ++index) {
            pixels[index] = (pixels[2 * index] << 8 | pixels[2 * index + 1]) / 257;
        }
        pixels.resize(pixels.size() / 2);
    }
    image.pixels = std::move(pixels);

    // What follows the pixels, as far as that goes: they are not lost for damage behind them.
    succeeds(decoder, [](auto png, auto info) { png_read_end(png, info); });
    png_bytep exif = nullptr;
    png_uint_32 size = 0;
    succeeds(decoder, [&](auto png, auto info) { png_get_eXIf_1(png, info, &size, &exif); });
    if (exif != nullptr) decoded.exif.assign(exif, exif + size);
    return decoded;
}

}  // namespace capt
