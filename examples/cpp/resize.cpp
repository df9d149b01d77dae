#include "resize.hpp"

#include <algorithm>
#include <cmath>

namespace capt {
namespace {

constexpr int precision_bits = 32 - 8 - 2;  // of a weight: 8 bits are the pixel's, 2 for overshoot

/// Return the filter's weight at a distance, in pixels of the image that is not widened.
double weight_at(Filter filter, double distance) {
    const double x = std::abs(distance);
    if (filter == Filter::bilinear) return x < 1.0 ? 1.0 - x : 0.0;
    constexpr double a = -0.5;  // of Keys' cubic convolution
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

/// The source pixels of one target pixel, and their weights as integers that add up to 2^22.
struct Window {
    int first;
    std::vector<int> weights;
};

/// Return the windows of `target` pixels over the part from `start` to `end` of a `source` axis.
std::vector<Window> windows(int source, double start, double end, int target, Filter filter) {
    const double scale = (end - start) / target;
    const double widening = std::max(scale, 1.0);
    const double support = (filter == Filter::bilinear ? 1.0 : 2.0) * widening;
    std::vector<Window> all(target);
    std::vector<double> weights;
    for (int index = 0; index < target; ++index) {
        const double centre = start + (index + 0.5) * scale;
        const double inverse = 1.0 / widening;
        const int first = std::max(static_cast<int>(centre - support + 0.5), 0);
        const int last = std::min(static_cast<int>(centre + support + 0.5), source);
        double sum = 0.0;
        weights.clear();
        for (int x = 0; x < last - first; ++x) {
            weights.push_back(weight_at(filter, (x + first - centre + 0.5) * inverse));
            sum += weights.back();
        }
        all[index].first = first;
        for (double weight : weights) {
            const double share = (sum == 0.0 ? weight : weight / sum) * (1 << precision_bits);
            all[index].weights.push_back(static_cast<int>(share + (share < 0 ? -0.5 : 0.5)));
        }
    }
    return all;
}

std::uint8_t clipped(int sum) {
    return static_cast<std::uint8_t>(std::clamp(sum >> precision_bits, 0, 255));
}

Image resized_across(const Image& image, const std::vector<Window>& all) {
    const int channels = image.channels();
    Image result = image;
    result.width = static_cast<int>(all.size());
    result.pixels.resize(static_cast<std::size_t>(result.width) * image.height * channels);
    std::uint8_t* target = result.pixels.data();
    for (int y = 0; y < image.height; ++y) {
        for (const Window& window : all) {
            for (int channel = 0; channel < channels; ++channel) {
                const std::uint8_t* source = image.at(window.first, y) + channel;
                int sum = 1 << (precision_bits - 1);
                for (int weight : window.weights) sum += *source * weight, source += channels;
                *target++ = clipped(sum);
            }
        }
    }
    return result;
}

Image resized_down(const Image& image, const std::vector<Window>& all) {
    const std::size_t row = static_cast<std::size_t>(image.width) * image.channels();
    Image result = image;
    result.height = static_cast<int>(all.size());
    result.pixels.resize(row * result.height);
    std::vector<int> sums(row);
    std::uint8_t* target = result.pixels.data();
    for (const Window& window : all) {
        std::fill(sums.begin(), sums.end(), 1 << (precision_bits - 1));
        const std::uint8_t* source = image.at(0, window.first);
        for (int weight : window.weights) {
            for (std::size_t index = 0; index < row; ++index) sums[index] += *source++ * weight;
        }
        for (int sum : sums) *target++ = clipped(sum);
    }
    return result;
}

/// Return the source pixel of each target pixel.
std::vector<int> nearest(double start, double end, int target) {
    const double step = (end - start) / target;
    double place = start + step * 0.5;
    std::vector<int> sources;
    for (int index = 0; index < target; ++index, place += step) {
        sources.push_back(static_cast<int>(place));
    }
    return sources;
}

Image resized_nearest(const Image& image, int width, int height, const Box& box) {
    Image result = image;
    result.width = width;
    result.height = height;
    result.pixels.clear();
    const std::vector<int> columns = nearest(box.left, box.right, width);
    for (int row : nearest(box.top, box.bottom, height)) {
        for (int column : columns) {
            result.pixels.push_back(*image.at(std::min(column, image.width - 1),
                                              std::min(row, image.height - 1)));
        }
    }
    return result;
}

std::uint8_t divided_by_255(int product) {
    const int rounded = product + 128;
    return static_cast<std::uint8_t>(((rounded >> 8) + rounded) >> 8);
}

/// Multiply colours by alpha, which is the last channel.
void premultiply(Image& image) {
    const int channels = image.channels();
    for (auto pixel = image.pixels.begin(); pixel != image.pixels.end(); pixel += channels) {
        for (int channel = 0; channel + 1 < channels; ++channel) {
            pixel[channel] = divided_by_255(pixel[channel] * pixel[channels - 1]);
        }
    }
}

void unpremultiply(Image& image) {
    const int channels = image.channels();
    for (auto pixel = image.pixels.begin(); pixel != image.pixels.end(); pixel += channels) {
        const int alpha = pixel[channels - 1];
        if (alpha == 0 || alpha == 255) continue;
        for (int channel = 0; channel + 1 < channels; ++channel) {
            pixel[channel] = static_cast<std::uint8_t>(std::min(255 * pixel[channel] / alpha, 255));
        }
    }
}

}  // namespace

Image resize(const Image& image, int width, int height, Filter filter, const Box& box) {
    const bool across =
        width != image.width || box.left != 0 || box.right != static_cast<double>(width);
    const bool down =
        height != image.height || box.top != 0 || box.bottom != static_cast<double>(height);
    if (!across && !down) return image;
    if (image.mode == Mode::palette || image.mode == Mode::bilevel) {
        return resized_nearest(image, width, height, box);
    }
    const bool alpha = image.mode == Mode::grey_alpha || image.mode == Mode::rgba;
    Image result = image;
    if (alpha) premultiply(result);
    const auto go_across = [&] {
        if (!across) return;
        result = resized_across(result, windows(image.width, box.left, box.right, width, filter));
    };
    // Each pass rounds, so that their order matters. It is that of Pillow 13.
    const bool down_first =
        height < image.height && image.height - height > 2 * (image.width - width);
    if (!down_first) go_across();
    if (down) {
        result = resized_down(result, windows(image.height, box.top, box.bottom, height, filter));
    }
    if (down_first) go_across();
    if (alpha) unpremultiply(result);
    return result;
}

}  // namespace capt
