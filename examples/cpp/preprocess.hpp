// From a photo to the pixels that the graph takes; docs/FORMAT.md, `preprocess`.
#pragma once

#include "photo.hpp"
#include "resize.hpp"

namespace capt {

enum class ResizeMode { shortest, longest, squash };

/// The preprocessing of a bundle.
struct Preprocess {
    int height = 0;
    int width = 0;
    Filter filter = Filter::bicubic;
    ResizeMode mode = ResizeMode::shortest;
    std::uint8_t fill = 0;  // of the border that `longest` adds
};

/// Return the pixels of a photo: (height, width, 3), RGB, 0-255.
Bytes preprocess(const Image& photo, const Preprocess& config);

}  // namespace capt
