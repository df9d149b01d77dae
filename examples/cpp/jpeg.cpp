#include <cstdio>
// jpeglib.h needs size_t and FILE before it.
#include <jerror.h>
#include <jpeglib.h>

#include <csetjmp>
#include <string_view>

#include "errors.hpp"
#include "photo.hpp"

namespace capt {
namespace {

constexpr int most_scans = 100;  // each one more is another pass over all pixels
constexpr std::string_view exif_start("Exif\0\0", 6);

/// libjpeg's decoder. libjpeg is C and reports errors by a jump out of its functions.
struct Decoder {
    jpeg_decompress_struct jpeg{};
    jpeg_error_mgr errors{};
    jpeg_progress_mgr progress{};
    std::jmp_buf escape{};
    char message[JMSG_LENGTH_MAX] = "";

    Decoder() {
        jpeg.err = jpeg_std_error(&errors);
        jpeg.client_data = this;
        errors.error_exit = fail;
        errors.emit_message = on_message;
        progress.progress_monitor = on_progress;
    }
    ~Decoder() { jpeg_destroy_decompress(&jpeg); }
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    static Decoder& of(j_common_ptr jpeg) { return *static_cast<Decoder*>(jpeg->client_data); }
    static void fail(j_common_ptr jpeg) {
        (*jpeg->err->format_message)(jpeg, of(jpeg).message);
        std::longjmp(of(jpeg).escape, 1);
    }
    // Other warnings are about damage that leaves an image; this one is about a missing part of it.
    static void on_message(j_common_ptr jpeg, int level) {
        if (level < 0 && jpeg->err->msg_code == JWRN_JPEG_EOF) fail(jpeg);
    }
    static void on_progress(j_common_ptr jpeg) {
        if (reinterpret_cast<j_decompress_ptr>(jpeg)->input_scan_number <= most_scans) return;
        std::snprintf(of(jpeg).message, JMSG_LENGTH_MAX, "more than %d scans; save it anew",
                      most_scans);
        std::longjmp(of(jpeg).escape, 1);
    }
};

// No object with a destructor may live in the two functions with a setjmp: a jump skips it.

bool read_header(Decoder& decoder, const std::string& file) {
    if (setjmp(decoder.escape)) return false;
    jpeg_create_decompress(&decoder.jpeg);
    decoder.jpeg.progress = &decoder.progress;
    jpeg_mem_src(&decoder.jpeg, reinterpret_cast<const unsigned char*>(file.data()), file.size());
    jpeg_save_markers(&decoder.jpeg, JPEG_APP0 + 1, 0xffff);
    jpeg_read_header(&decoder.jpeg, TRUE);
    return true;
}

bool read_pixels(Decoder& decoder, Image& image) {
    if (setjmp(decoder.escape)) return false;
    jpeg_start_decompress(&decoder.jpeg);
    while (decoder.jpeg.output_scanline < decoder.jpeg.output_height) {
        JSAMPROW row = const_cast<JSAMPROW>(image.at(0, decoder.jpeg.output_scanline));
        jpeg_read_scanlines(&decoder.jpeg, &row, 1);
    }
    return true;
}

Bytes find_exif(const jpeg_decompress_struct& jpeg) {
    for (auto marker = jpeg.marker_list; marker != nullptr; marker = marker->next) {
        const std::string_view data(reinterpret_cast<const char*>(marker->data),
                                    marker->data_length);
        if (data.substr(0, exif_start.size()) == exif_start) {
            return Bytes(data.begin() + exif_start.size(), data.end());
        }
    }
    return {};
}

PhotoError damaged(const Decoder& decoder) {
    return PhotoError("damaged JPEG (" + std::string(decoder.message) + ")");
}

}  // namespace

/// Decode the first image of a JPEG, with the settings of Pillow.
Decoded decode_jpeg(const std::string& file) {
    Decoder decoder;
    if (!read_header(decoder, file)) throw damaged(decoder);
    jpeg_decompress_struct& jpeg = decoder.jpeg;
    check_size(jpeg.image_width, jpeg.image_height);
    Decoded decoded;
    Image& image = decoded.image;
    image.width = static_cast<int>(jpeg.image_width);
    image.height = static_cast<int>(jpeg.image_height);
    switch (jpeg.num_components) {
        case 1: image.mode = Mode::grey, jpeg.out_color_space = JCS_GRAYSCALE; break;
        case 3: image.mode = Mode::rgb, jpeg.out_color_space = JCS_RGB; break;
        case 4: image.mode = Mode::cmyk, jpeg.out_color_space = JCS_CMYK; break;
        default: throw PhotoError("expected a JPEG of 1, 3 or 4 channels; save it anew");
    }
    decoded.exif = find_exif(jpeg);
    image.pixels.resize(static_cast<std::size_t>(image.width) * image.height * image.channels());
    if (!read_pixels(decoder, image)) throw damaged(decoder);
    if (image.mode == Mode::cmyk) {  // Adobe's programs store these inverted
        for (std::uint8_t& value : image.pixels) value = 255 - value;
    }
    return decoded;
}

}  // namespace capt
