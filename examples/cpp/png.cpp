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

// No object with a destructor may live in the three functions with a setjmp: a jump skips it.

bool read_header(Decoder& decoder) {
    if (setjmp(png_jmpbuf(decoder.png))) return false;
    png_read_info(decoder.png, decoder.info);
    return true;
}

bool read_pixels(Decoder& decoder, std::vector<png_bytep>& rows) {
    if (setjmp(png_jmpbuf(decoder.png))) return false;
    png_read_image(decoder.png, rows.data());
    return true;
}

/// Read what follows the pixels, as far as that goes: they are not lost for damage behind them.
void read_end(Decoder& decoder) {
    if (setjmp(png_jmpbuf(decoder.png))) return;
    png_read_end(decoder.png, decoder.info);
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
    png_get_PLTE(decoder.png, decoder.info, &colours, &count);
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
    if (!read_header(decoder)) throw PhotoError("damaged PNG (" + decoder.message + ")");
    const auto width = png_get_image_width(decoder.png, decoder.info);
    const auto height = png_get_image_height(decoder.png, decoder.info);
    check_size(width, height);
    Decoded decoded;
    Image& image = decoded.image;
    image.width = static_cast<int>(width);
    image.height = static_cast<int>(height);
    image.mode = set_up(decoder.png, decoder.info);
    if (image.mode == Mode::palette) image.palette = palette_of(decoder);
    png_set_interlace_handling(decoder.png);
    png_read_update_info(decoder.png, decoder.info);

    const std::size_t row_bytes = png_get_rowbytes(decoder.png, decoder.info);
    Bytes pixels(row_bytes * height);
    std::vector<png_bytep> rows(height);
    for (std::size_t row = 0; row < height; ++row) rows[row] = pixels.data() + row * row_bytes;
    if (!read_pixels(decoder, rows)) throw PhotoError("damaged PNG (" + decoder.message + ")");
    if (row_bytes == 2 * width && image.mode == Mode::grey) {  // 16 bits of grey
        for (std::size_t index = 0; index < pixels.size() / 2; ++index) {
            pixels[index] = (pixels[2 * index] << 8 | pixels[2 * index + 1]) / 257;
        }
        pixels.resize(pixels.size() / 2);
    }
    image.pixels = std::move(pixels);

    read_end(decoder);
    png_bytep exif = nullptr;
    png_uint_32 size = 0;
    if (png_get_eXIf_1(decoder.png, decoder.info, &size, &exif)) {
        decoded.exif.assign(exif, exif + size);
    }
    return decoded;
}

}  // namespace capt
