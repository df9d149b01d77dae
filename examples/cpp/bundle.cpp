#include "bundle.hpp"

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string_view>

#include "errors.hpp"
#include "sha256.hpp"

namespace capt {
namespace {

using nlohmann::json;
using Keys = std::set<std::string>;

constexpr int known_version = 1;
constexpr int deepest_json = 100;
constexpr std::uintmax_t manifest_limit = 64 << 20;  // bytes
constexpr std::uintmax_t graph_limit = (1ull << 31) - 1;
constexpr std::uintmax_t weights_limit = 1ull << 40;

const Keys manifest_keys{"schema_version", "class_names",     "tuned",     "preprocess",
                         "graphs",         "calibration",     "training",  "confusion_pairs",
                         "files",          "verified",        "top_label", "open_vocabulary",
                         "vector_scaling"};
const Keys preprocess_keys{"size",        "mean",       "std", "mode", "interpolation",
                           "resize_mode", "fill_color"};
const Keys graph_keys{"file", "opset", "layout", "dtype", "weights"};
const Keys file_keys{"sha256", "bytes"};
// The graph applies what these hold, but an unknown key in them may still change its meaning.
const std::map<std::string, Keys> applied_keys{
    {"top_label", {"positions", "values", "below", "above"}},
    {"vector_scaling", {"scales", "biases"}},
    {"open_vocabulary",
     {"prompts", "context_length", "pad", "cuttable", "cleaning", "logit_bias", "file", "tokenizer",
      "weights"}}};
const Keys calibration_keys{"temperature", "zero_shot_temperature", "distance_aware"};

json parse(const std::string& text) {
    return json::parse(text, [](int depth, json::parse_event_t, json&) {
        if (depth > deepest_json) throw BundleError("JSON that is nested too deep");
        return true;
    });
}

/// An unknown key may change the meaning of all others.
void check_keys(const json& object, const Keys& known, const std::string& place) {
    for (const auto& entry : object.items()) {
        if (known.count(entry.key()) == 0) {
            throw BundleError(place + ": unknown key '" + entry.key() + "'; a newer capt wrote it");
        }
    }
}

void check_manifest(const json& manifest) {
    const json version = manifest.value("schema_version", json());
    if (version != known_version) {
        throw BundleError("schema version " + version.dump() + ", this reader knows " +
                          std::to_string(known_version) + "; export the bundle again");
    }
    check_keys(manifest, manifest_keys, "manifest");
    check_keys(manifest.at("preprocess"), preprocess_keys, "preprocess");
    for (const auto& graph : manifest.at("graphs")) check_keys(graph, graph_keys, "graphs");
    for (const auto& entry : manifest.at("calibration")) {
        check_keys(entry, calibration_keys, "calibration");
    }
    for (const auto& entry : manifest.at("files")) check_keys(entry, file_keys, "files");
    for (const auto& [name, keys] : applied_keys) {
        if (manifest.count(name) && !manifest.at(name).is_null()) {
            check_keys(manifest.at(name), keys, name);
        }
    }
    const json& names = manifest.at("class_names");
    if (names.empty() || manifest.at("tuned").size() != names.size()) {
        throw BundleError("expected one `tuned` flag for each of its class names");
    }
}

/// Return one of the words of a table, or throw.
template <typename Value>
Value choice(const json& object, const std::string& key, const std::string& usual,
             const std::map<std::string, Value>& table) {
    const std::string word = object.value(key, usual);
    if (const auto found = table.find(word); found != table.end()) return found->second;
    throw BundleError("preprocess: unknown " + key + " '" + word + "'");
}

Preprocess read_preprocess(const json& values) {
    Preprocess config;
    const auto size = values.at("size").get<std::vector<int>>();
    const int fill = values.value("fill_color", 0);
    const auto fits = [](int side) { return 1 <= side && side <= 8192; };
    if (size.size() != 2 || !fits(size[0]) || !fits(size[1]) || fill < 0 || fill > 255) {
        throw BundleError("preprocess: expected a size of 1 to 8192 pixels, a fill_color of 0-255");
    }
    config.height = size[0];
    config.width = size[1];
    config.fill = static_cast<std::uint8_t>(fill);
    config.filter = choice<Filter>(values, "interpolation", "bicubic",
                                   {{"bicubic", Filter::bicubic}, {"bilinear", Filter::bilinear}});
    config.mode = choice<ResizeMode>(values, "resize_mode", "shortest",
                                     {{"shortest", ResizeMode::shortest},
                                      {"longest", ResizeMode::longest},
                                      {"squash", ResizeMode::squash}});
    choice<int>(values, "mode", "RGB", {{"RGB", 0}});
    return config;
}

/// Return the content of a file that the manifest lists, checked against its size and hash.
std::string read_listed(const std::filesystem::path& folder, const json& files,
                        const std::string& name, std::uintmax_t limit) {
    const std::filesystem::path path(name);
    bool inside = !name.empty() && path.is_relative() && name.find('\0') == std::string::npos;
    for (const auto& part : path) inside = inside && part != "..";
    if (!inside) throw BundleError("'" + name + "' leads out of the bundle; do not trust it");
    if (files.count(name) == 0) throw BundleError("the manifest does not list '" + name + "'");
    std::string content = read_file(folder / path, limit);
    const json& record = files.at(name);
    if (record.at("bytes") != content.size() || record.at("sha256") != sha256(content)) {
        throw BundleError(name + " is not the file that was exported; export it again");
    }
    return content;
}

/// Reads an ONNX file as far as needed: its metadata. It is a protobuf message.
class Fields {
public:
    explicit Fields(std::string_view message) : rest_(message) {}

    /// Return the next field that holds bytes with its number, nothing at the end.
    std::optional<std::pair<std::uint64_t, std::string_view>> next() {
        while (!rest_.empty()) {
            const std::uint64_t tag = varint();
            switch (tag & 7) {
                case 0: varint(); break;
                case 1: take(8); break;
                case 2: return std::pair{tag >> 3, take(varint())};
                case 5: take(4); break;
                default: throw BundleError("the graph is no ONNX file");
            }
        }
        return std::nullopt;
    }

private:
    std::string_view take(std::uint64_t size) {
        if (size > rest_.size()) throw BundleError("the graph is cut off");
        const std::string_view taken = rest_.substr(0, size);
        rest_.remove_prefix(size);
        return taken;
    }
    std::uint64_t varint() {
        std::uint64_t value = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            const auto byte = static_cast<std::uint8_t>(take(1)[0]);
            value |= static_cast<std::uint64_t>(byte & 0x7f) << shift;
            if (byte < 0x80) return value;
        }
        throw BundleError("the graph is no ONNX file");
    }

    std::string_view rest_;
};

std::string metadata(std::string_view onnx, std::string_view key) {
    constexpr std::uint64_t metadata_props = 14;  // in ONNX's ModelProto
    Fields model(onnx);
    while (const auto field = model.next()) {
        if (field->first != metadata_props) continue;
        std::string_view parts[3];  // key and value have the numbers 1 and 2
        Fields property(field->second);
        while (const auto part = property.next()) {
            if (part->first <= 2) parts[part->first] = part->second;
        }
        if (parts[1] == key) return std::string(parts[2]);
    }
    return "";
}

/// Return a manifest without its files, and without keys that are null, which means absent.
json comparable(json manifest) {
    manifest.erase("files");
    for (auto entry = manifest.begin(); entry != manifest.end();) {
        entry = entry->is_null() ? manifest.erase(entry) : std::next(entry);
    }
    return manifest;
}

Bundle read(const std::filesystem::path& folder, const std::vector<std::string>& precisions) {
    if (!std::filesystem::is_directory(folder)) {
        throw BundleError("expected a bundle's folder; unpack a zip first");
    }
    const json manifest = parse(read_file(folder / "manifest.json", manifest_limit));
    check_manifest(manifest);
    Bundle bundle;
    bundle.class_names = manifest.at("class_names").get<std::vector<std::string>>();
    bundle.preprocess = read_preprocess(manifest.at("preprocess"));
    bundle.verified = manifest.value("verified", true);

    const json& graphs = manifest.at("graphs");
    for (const std::string& precision : precisions) {
        if (bundle.precision.empty() && graphs.count(precision)) bundle.precision = precision;
    }
    if (bundle.precision.empty()) throw BundleError("no graph in " + json(precisions).dump());
    const json& graph = graphs.at(bundle.precision);
    if (graph.value("layout", "NHWC") != "NHWC" || graph.value("dtype", "uint8") != "uint8") {
        throw BundleError("its graph takes another input than NHWC uint8; a newer capt wrote it");
    }
    const json& files = manifest.at("files");
    const auto name = graph.at("file").get<std::string>();
    bundle.graph = read_listed(folder, files, name, graph_limit);
    bundle.graph_sha256 = files.at(name).at("sha256").get<std::string>();
    // The hashes do not cover the manifest, and other class names would mislabel every photo.
    if (comparable(parse(metadata(bundle.graph, "capt_manifest"))) != comparable(manifest)) {
        throw BundleError("its manifest was changed after the export; export it again");
    }
    if (graph.count("weights") && !graph.at("weights").is_null()) {
        const auto second = graph.at("weights").get<std::string>();
        read_listed(folder, files, second, weights_limit);
        bundle.weights = folder;
        bundle.weights_sha256 = files.at(second).at("sha256").get<std::string>();
    }
    return bundle;
}

}  // namespace

Bundle open_bundle(const std::filesystem::path& folder,
                   const std::vector<std::string>& precisions) {
    try {
        return read(folder, precisions);
    } catch (const std::exception& error) {  // nlohmann::json throws types of its own
        throw BundleError(folder.string() + ": " + error.what());
    }
}

}  // namespace capt
