#include "preprocess.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace capt {
namespace {

// A 1 x 20000 image would be blown up to gigabytes before its centre is cropped.
constexpr double largest_resized_pixels = 64'000'000;

/// Whole numbers, but of a long strip they do not fit into an integer.
struct Size {
    double width, height;
};

/// Return the size to which a photo is resized before the crop.
Size target_of(const Image& photo, const Preprocess& config) {
    const double side = config.width, width = photo.width, height = photo.height;
    if (config.mode == ResizeMode::squash) return {side, static_cast<double>(config.height)};
    if (config.mode == ResizeMode::shortest && config.height == config.width) {
        // The long side is truncated, not rounded.
        const double scaled = std::floor(side * std::max(width, height) / std::min(width, height));
        return width <= height ? Size{side, scaled} : Size{scaled, side};
    }
    const double ratios[] = {height / config.height, width / config.width};
    const double ratio = config.mode == ResizeMode::longest ? std::max(ratios[0], ratios[1])
                                                            : std::min(ratios[0], ratios[1]);
    // Halves are rounded to the even number, as in Python.
    return {std::max(1.0, std::nearbyint(width / ratio)),
            std::max(1.0, std::nearbyint(height / ratio))};
}

/// Return the largest part around the centre of a photo that has the proportions of a target.
Box centre_of(const Image& photo, const Preprocess& config) {
    const double ratio = static_cast<double>(config.width) / config.height;
    double width = photo.width, height = photo.height;
    if (width / height >= ratio) {
        width = ratio * height;
    } else {
        height = width / ratio;
    }
    const double left = (photo.width - width) * 0.5, top = (photo.height - height) * 0.5;
    return {static_cast<float>(left), static_cast<float>(top), static_cast<float>(left + width),
            static_cast<float>(top + height)};
}

/// Return the colour of a pixel.
void write_rgb(const Image& image, const std::uint8_t* pixel, std::uint8_t* target) {
    switch (image.mode) {
        case Mode::palette: std::memcpy(target, &image.palette[3 * pixel[0]], 3); break;
        case Mode::bilevel:
        case Mode::grey:
        case Mode::grey_alpha: std::memset(target, pixel[0], 3); break;
        case Mode::rgb:
        case Mode::rgba: std::memcpy(target, pixel, 3); break;
        case Mode::cmyk:
            for (int channel = 0; channel < 3; ++channel) {
                const int white = 255 - pixel[3], product = pixel[channel] * white + 128;
                target[channel] = std::max(0, white - (((product >> 8) + product) >> 8));
            }
            break;
    }
}

}  // namespace

Bytes preprocess(const Image& photo, const Preprocess& config) {
    const Size target = target_of(photo, config);
    const bool shortest = config.mode == ResizeMode::shortest;
    // open_clip ignores the filter where it crops to a rectangle.
    const Filter filter =
        shortest && config.height != config.width ? Filter::bicubic : config.filter;
    const bool huge = target.width * target.height > largest_resized_pixels;
    const Box whole{0, 0, static_cast<float>(photo.width), static_cast<float>(photo.height)};
    const Image image =
        shortest && huge
            ? resize(photo, config.width, config.height, filter, centre_of(photo, config))
            : resize(photo, static_cast<int>(target.width), static_cast<int>(target.height),
                     filter, whole);

    // Of what is too large the centre is taken; what is too small gets a border, whose odd pixel is
    // at the right and at the bottom.
    const auto offset = [](int size, int wanted) {
        return size >= wanted ? static_cast<int>(std::nearbyint((size - wanted) / 2.0))
                              : -((wanted - size) / 2);
    };
    const int left = offset(image.width, config.width), top = offset(image.height, config.height);
    const std::uint8_t fill = config.mode == ResizeMode::longest ? config.fill : 0;
    const std::uint8_t level = image.mode == Mode::bilevel && fill > 0 ? 255 : fill;
    const std::uint8_t border[] = {level, level, level, level};
    Bytes pixels(static_cast<std::size_t>(config.width) * config.height * 3);
    std::uint8_t* place = pixels.data();
    for (int y = top; y < top + config.height; ++y) {
        for (int x = left; x < left + config.width; ++x, place += 3) {
            const bool inside = 0 <= x && x < image.width && 0 <= y && y < image.height;
            write_rgb(image, inside ? image.at(x, y) : border, place);
        }
    }
    return pixels;
}

}  // namespace capt
