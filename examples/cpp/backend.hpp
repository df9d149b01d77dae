// What runs a bundle's graph.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "bundle.hpp"

namespace capt {

class Backend {
public:
    virtual ~Backend() = default;

    /// Return the calibrated probability of each class.
    ///
    /// `pixels` are those of one photo, from `preprocess`. Throws BundleError: the graph fails.
    virtual std::vector<float> run(const Bytes& pixels) = 0;
};

/// Start ONNX Runtime on the CPU. Throws BundleError: it cannot load the graph.
std::unique_ptr<Backend> open_onnxruntime(const Bundle& bundle);

/// Return the precisions that ONNX Runtime runs on the CPU, the best suited first.
inline std::vector<std::string> onnxruntime_precisions() {
    return {"fp32", "int8-cpu", "fp16", "int8"};
}

#ifdef CAPT_TENSORRT
/// An engine that capt-build has put into its cache.
struct Engine {
    std::string plan;
    std::string precision;       // of the graph that it was built from
    std::string graph_sha256;    // likewise
    std::string weights_sha256;  // of the graph's second file, or empty
    bool with_code = false;      // whether it brings the runtime of its version
};

/// Read an engine. Throws BundleError: it is no entry of capt-build's cache, or was changed.
Engine read_engine(const std::filesystem::path& path);

/// Start TensorRT on the current GPU. Throws BundleError: the engine is not of this bundle, or
/// TensorRT cannot load it.
std::unique_ptr<Backend> open_tensorrt(const Bundle& bundle, const Engine& engine);
#endif

}  // namespace capt
