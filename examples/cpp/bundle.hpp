// A bundle, as docs/FORMAT.md specifies it: the manifest and one of its graphs.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "preprocess.hpp"

namespace capt {

struct Bundle {
    std::vector<std::string> class_names;  // in the order of the graph's columns
    Preprocess preprocess;
    bool verified = true;           // false if it was exported although its check had failed
    std::string precision;          // of the graph
    std::string graph;              // content of its ONNX file
    std::string graph_sha256;
    std::filesystem::path weights;  // folder of weights that are in a second file, or empty
    std::string weights_sha256;     // of that file, or empty
};

/// Open a bundle folder and read one graph.
///
/// `precisions` are those that a backend runs, the best suited first.
///
/// Throws BundleError: it is no bundle, of another version, changed, or has no such graph.
Bundle open_bundle(const std::filesystem::path& folder, const std::vector<std::string>& precisions);

}  // namespace capt
