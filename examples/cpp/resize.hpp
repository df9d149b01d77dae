// Resizing with the arithmetic of Pillow, to the last bit.
#pragma once

#include "photo.hpp"

namespace capt {

enum class Filter { bilinear, bicubic };

/// Left, top, right and bottom of a part of an image, in pixels; Pillow, too, rounds them to float.
struct Box {
    float left, top, right, bottom;
};

/// Resize the part of an image that `box` bounds, as Pillow's `Image.resize`.
///
/// The filter is widened where the image shrinks (antialiasing). Images with alpha are resized with
/// their colours multiplied by it; those with a palette or two levels take the nearest pixel.
Image resize(const Image& image, int width, int height, Filter filter, const Box& box);

}  // namespace capt
