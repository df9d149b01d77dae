// The two kinds of errors: of one photo, and of everything.
#pragma once

#include <stdexcept>

namespace capt {

/// A photo that cannot be read. The others go on.
struct PhotoError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// A bundle, engine or backend that cannot be used.
struct BundleError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace capt
