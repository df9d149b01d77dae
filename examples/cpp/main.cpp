// Classify photos with a bundle: a JSON line for each, with calibrated probabilities.

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>

#include "backend.hpp"
#include "errors.hpp"

namespace {

constexpr const char* usage =
#ifdef CAPT_TENSORRT
    "usage: capt_classify [--engine FILE] BUNDLE PHOTO...\n"
#else
    "usage: capt_classify BUNDLE PHOTO...\n"
#endif
    "example: capt_classify pets.capt cat.jpg dog.png\n";

/// Return one line: with the answer, or with the photo's error.
nlohmann::ordered_json classify(const capt::Bundle& bundle, capt::Backend& backend,
                                const std::string& photo) {
    try {
        const auto pixels = capt::preprocess(capt::load_photo(photo), bundle.preprocess);
        const auto probabilities = backend.run(pixels);
        const auto best = std::max_element(probabilities.begin(), probabilities.end());
        return {{"path", photo},
                {"label", bundle.class_names[best - probabilities.begin()]},
                {"confidence", *best},
                {"probabilities", probabilities}};
    } catch (const capt::PhotoError& error) {
        return {{"path", photo}, {"error", error.what()}};
    }
}

int run(std::vector<std::string> arguments) {
    std::string engine_path;
#ifdef CAPT_TENSORRT
    if (arguments.size() > 2 && arguments[0] == "--engine") {
        engine_path = arguments[1];
        arguments.erase(arguments.begin(), arguments.begin() + 2);
    }
#endif
    if (arguments.size() < 2 || arguments[0].rfind("--", 0) == 0) {
        std::cerr << usage;
        return 2;
    }
    capt::Bundle bundle;
    std::unique_ptr<capt::Backend> backend;
    if (engine_path.empty()) {
        bundle = capt::open_bundle(arguments[0], capt::onnxruntime_precisions());
        backend = capt::open_onnxruntime(bundle);
    }
#ifdef CAPT_TENSORRT
    else {
        const capt::Engine engine = capt::read_engine(engine_path);
        bundle = capt::open_bundle(arguments[0], {engine.precision});
        backend = capt::open_tensorrt(bundle, engine);
    }
#endif
    bundle.graph.clear();  // the backend has its own
    if (!bundle.verified) std::cerr << "warning: was exported although its check had failed\n";
    bool failed = false;
    for (auto photo = arguments.begin() + 1; photo != arguments.end(); ++photo) {
        const auto line = classify(bundle, *backend, *photo);
        failed = failed || line.contains("error");
        // File names need not be UTF-8.
        const auto replace = nlohmann::ordered_json::error_handler_t::replace;
        std::cout << line.dump(-1, ' ', false, replace) << std::endl;
    }
    if (!std::cout) throw std::runtime_error("cannot write the answers");
    return failed ? 1 : 0;
}

}  // namespace

int main(int count, char** arguments) {
    try {
        return run({arguments + 1, arguments + count});
    } catch (const std::exception& error) {  // ONNX Runtime throws types of its own
        std::cerr << "error: " << error.what() << "\n";
        return 2;
    }
}
