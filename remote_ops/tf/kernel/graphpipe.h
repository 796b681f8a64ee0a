// GraphPipe messages <-> tensors, verified, without copying a tensor byte: the rules of remote_ops/graphpipe.py.
//
// It knows nothing of TensorFlow, sockets or time. What is decoded views the message, which must outlive it.

#ifndef REMOTE_OPS_GRAPHPIPE_H_
#define REMOTE_OPS_GRAPHPIPE_H_

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace remote_ops {
namespace graphpipe {

constexpr uint64_t kMaxMessageBytes = (uint64_t{1} << 31) - 1;
constexpr uint32_t kMaxTensors = 4096;
constexpr uint32_t kMaxStrings = 10'000'000;
constexpr uint32_t kMaxRank = 32;
constexpr size_t kAlignment = 64;
constexpr uint8_t kString = 12;
constexpr uint8_t kInferRequest = 1;

// Bytes of one element, by wire type; 0 for Null and String.
constexpr uint64_t kItemBytes[kString + 1] = {0, 1, 1, 2, 2, 4, 4, 8, 8, 2, 4, 8, 0};

// What is wrong with a message.
struct Malformed : std::runtime_error {
  Malformed(const std::string& what, uint64_t offset)
      : std::runtime_error(what + " - at byte " + std::to_string(offset)) {}
};

inline std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// --------------------------------------------------------------------------- writing

// A tensor to be sent. `data` is its elements; of strings it is the vector that `StringBlob` laid out.
struct Outgoing {
  uint8_t type;
  std::vector<int64_t> shape;
  std::string_view data;
};

// Grows the tables of one message; a slot holds an offset that `Place` fills in once its target has a place.
class Head {
 public:
  Head() : bytes(4, '\0') {}

  void Place(size_t slot, size_t align = 4, size_t shift = 0) {
    Pad(align, shift);
    Put32(slot, static_cast<uint32_t>(bytes.size() - slot));
  }

  // Writes a vtable and a zeroed table of `size` bytes; returns where the table starts.
  size_t Table(size_t slot, uint16_t size, const std::vector<uint16_t>& fields) {
    Pad(2, 0);
    const size_t vtable = bytes.size();
    Append16(static_cast<uint16_t>(2 * fields.size() + 4));
    Append16(size);
    for (uint16_t field : fields) Append16(field);
    Place(slot);
    const size_t at = bytes.size();
    bytes.append(size, '\0');
    Put32(at, static_cast<uint32_t>(at - vtable));
    return at;
  }

  void String(size_t slot, std::string_view value) {
    Place(slot);
    Append32(static_cast<uint32_t>(value.size()));
    bytes.append(value);
    bytes.push_back('\0');
  }

  // Writes a vector of `count` offsets; returns the slot of the first.
  size_t Offsets(size_t slot, size_t count) {
    Place(slot);
    Append32(static_cast<uint32_t>(count));
    const size_t first = bytes.size();
    bytes.append(4 * count, '\0');
    return first;
  }

  void Strings(size_t slot, const std::vector<std::string>& values) {
    size_t at = Offsets(slot, values.size());
    for (const std::string& value : values) {
      String(at, value);
      at += 4;
    }
  }

  void Shape(size_t slot, const std::vector<int64_t>& shape) {
    Place(slot, 8, 4);
    Append32(static_cast<uint32_t>(shape.size()));
    for (int64_t size : shape) bytes.append(reinterpret_cast<const char*>(&size), 8);
  }

  void Put32(size_t at, uint32_t value) { std::memcpy(&bytes[at], &value, 4); }
  void Append32(uint32_t value) { bytes.append(reinterpret_cast<const char*>(&value), 4); }

  std::string bytes;

 private:
  void Pad(size_t align, size_t shift) { bytes.append((align - (bytes.size() + shift) % align) % align, '\0'); }
  void Append16(uint16_t value) { bytes.append(reinterpret_cast<const char*>(&value), 2); }
};

// The vector of strings as it stands on the wire; its offsets are relative, so it fits anywhere 4-aligned.
template <typename Strings>
std::string StringBlob(const Strings& items, size_t count) {
  uint64_t total = 4 + 4 * static_cast<uint64_t>(count);
  for (size_t i = 0; i < count; ++i) total += (items[i].size() + 8) & ~uint64_t{3};
  if (total > kMaxMessageBytes) throw std::length_error("a message ends at 2 GiB: these strings are longer");
  std::string blob(total, '\0');
  auto put = [&blob](uint64_t at, uint64_t value) {
    const uint32_t word = static_cast<uint32_t>(value);
    std::memcpy(&blob[at], &word, 4);
  };
  put(0, count);
  uint64_t at = 4 + 4 * static_cast<uint64_t>(count);
  for (size_t i = 0; i < count; ++i) {
    put(4 + 4 * i, at - (4 + 4 * i));
    put(at, items[i].size());
    if (items[i].size()) std::memcpy(&blob[at + 4], items[i].data(), items[i].size());
    at += (items[i].size() + 8) & ~uint64_t{3};
  }
  return blob;
}

// The parts of an InferRequest: `heads[i]` precedes the data of tensor i. Without tensors there is one head.
// Throws std::length_error if the message would pass 2 GiB.
inline std::vector<std::string> EncodeRequest(std::string_view config, const std::vector<std::string>& input_names,
                                              const std::vector<Outgoing>& tensors,
                                              const std::vector<std::string>& output_names) {
  Head head;
  const size_t request = head.Table(0, 12, {8, 4});
  head.bytes[request + 8] = kInferRequest;
  const size_t infer = head.Table(request + 4, 20, {4, 8, 12, 16});
  head.String(infer + 4, config);
  head.Strings(infer + 8, input_names);
  head.Strings(infer + 16, output_names);
  const size_t first = head.Offsets(infer + 12, tensors.size());
  std::vector<size_t> slots;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::vector<uint16_t> fields =
        tensors[i].type == kString ? std::vector<uint16_t>{12, 4, 0, 8} : std::vector<uint16_t>{12, 4, 8};
    const size_t table = head.Table(first + 4 * i, 16, fields);
    head.bytes[table + 12] = static_cast<char>(tensors[i].type);
    head.Shape(table + 4, tensors[i].shape);
    slots.push_back(table + 8);
  }
  std::vector<std::string> gaps;
  uint64_t position = head.bytes.size();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const bool is_string = tensors[i].type == kString;
    const uint64_t size = tensors[i].data.size();
    const uint64_t shift = is_string ? 0 : 4, align = is_string ? 4 : kAlignment;
    const uint64_t start = position + (align - (position + shift) % align) % align;
    if (start + size + shift > kMaxMessageBytes) {
      throw std::length_error("a message ends at 2 GiB: expected at most " + std::to_string(kMaxMessageBytes) +
                              " bytes, got " + std::to_string(start + size + shift) + " or more");
    }
    std::string gap(start - position, '\0');
    const uint32_t length = static_cast<uint32_t>(size);
    if (!is_string) gap.append(reinterpret_cast<const char*>(&length), 4);
    head.Put32(slots[i], static_cast<uint32_t>(start - slots[i]));
    gaps.push_back(std::move(gap));
    position = start + size + shift;
  }
  if (gaps.empty()) return {head.bytes};
  gaps[0] = head.bytes + gaps[0];
  return gaps;
}

// --------------------------------------------------------------------------- reading

// A tensor that was received. `data` views the message; `strings` views it too, one per element.
struct Incoming {
  uint8_t type = 0;
  std::vector<int64_t> shape;
  std::string_view data;
  std::vector<std::string_view> strings;
};

struct Error {
  int64_t code = 0;
  std::string message;
};

// Either tensors or errors: where a peer sends both, errors win.
struct Response {
  std::vector<Incoming> tensors;
  std::vector<Error> errors;
};

inline bool IsUtf8(std::string_view text) {
  const auto* at = reinterpret_cast<const unsigned char*>(text.data());
  const auto* end = at + text.size();
  while (at < end) {
    const unsigned char lead = *at++;
    if (lead < 0x80) continue;
    const int more = lead >= 0xC2 && lead <= 0xDF ? 1 : (lead & 0xF0) == 0xE0 ? 2 : lead >= 0xF0 && lead <= 0xF4 ? 3 : 0;
    if (more == 0 || end - at < more) return false;
    // Overlong forms, surrogates, and what lies beyond U+10FFFF.
    if ((lead == 0xE0 && *at < 0xA0) || (lead == 0xED && *at > 0x9F)) return false;
    if ((lead == 0xF0 && *at < 0x90) || (lead == 0xF4 && *at > 0x8F)) return false;
    for (int i = 0; i < more; ++i) {
      if ((*at++ & 0xC0) != 0x80) return false;
    }
  }
  return true;
}

// A product of sizes that are not negative; saturates far beyond any message.
inline uint64_t Product(const std::vector<int64_t>& shape, uint64_t item, bool skip_zeros) {
  constexpr uint64_t kHuge = uint64_t{1} << 62;
  for (int64_t size : shape) {
    if (size == 0 && !skip_zeros) return 0;
  }
  uint64_t product = item;
  for (int64_t size : shape) {
    if (size == 0) continue;
    if (static_cast<uint64_t>(size) > kHuge / product) return kHuge;
    product *= static_cast<uint64_t>(size);
  }
  return product;
}

struct Table {
  uint64_t at;
  uint64_t fields[6];  // where each lies in the table, 0 = absent
};

struct Vector {
  uint64_t first;
  uint32_t count;
};

// One message being read, and what is left of the budget for decoded bytes: offsets may share targets, so a small
// message can describe a huge one. All that is decoded counts, and every item of a vector besides.
class Reader {
 public:
  explicit Reader(std::string_view message) : data_(message), limit_(2 * message.size() + (1 << 20)), left_(limit_) {}

  // Follows the offset at `slot` to a table.
  Table ReadTable(uint64_t slot) const {
    Table table = {};
    table.at = slot + Read<uint32_t>(slot);
    const int64_t vtable = static_cast<int64_t>(table.at) - Read<int32_t>(table.at);
    if (vtable < 0) throw Malformed("a vtable lies before the message", table.at);
    const uint64_t start = static_cast<uint64_t>(vtable);
    const uint32_t vtable_size = Read<uint16_t>(start), size = Read<uint16_t>(start + 2);
    if (vtable_size < 4 || (vtable_size & 1) || size < 4 || table.at + size > data_.size() ||
        start + vtable_size > data_.size()) {
      throw Malformed("a table of " + std::to_string(size) + " bytes with a vtable of " + std::to_string(vtable_size) +
                          " bytes does not fit",
                      table.at);
    }
    for (uint32_t i = 0; i < 6 && 4 + 2 * i < vtable_size; ++i) {
      table.fields[i] = Read<uint16_t>(start + 4 + 2 * i);
      if (table.fields[i] >= size) {
        throw Malformed("a field at " + std::to_string(table.fields[i]) + " lies outside its table of " +
                            std::to_string(size) + " bytes",
                        table.at);
      }
    }
    return table;
  }

  // Follows the offset at `slot` to a vector, all of it inside the message.
  Vector ReadVector(uint64_t slot, uint64_t item_size) const {
    const uint64_t at = slot + Read<uint32_t>(slot);
    const uint32_t count = Read<uint32_t>(at);
    if (at + 4 + count * item_size > data_.size()) {
      throw Malformed("a vector of " + std::to_string(count) + " items of " + std::to_string(item_size) +
                          " bytes runs past the end",
                      at);
    }
    return {at + 4, count};
  }

  std::string_view Raw(uint64_t slot) {
    const Vector bytes = ReadVector(slot, 1);
    if (bytes.count) Spend(uint64_t{bytes.count} + 8, bytes.first);
    return data_.substr(bytes.first, bytes.count);
  }

  std::string Text(uint64_t slot) {
    const std::string_view raw = Raw(slot);
    if (!IsUtf8(raw)) throw Malformed("a name or text is not UTF-8", slot);
    return std::string(raw);
  }

  std::vector<std::string> Texts(uint64_t slot) {
    const Vector items = ReadVector(slot, 4);
    Spend(8 * uint64_t{items.count}, items.first);
    std::vector<std::string> texts;
    for (uint32_t i = 0; i < items.count; ++i) texts.push_back(Text(items.first + 4 * uint64_t{i}));
    return texts;
  }

  std::vector<Incoming> Tensors(uint64_t slot) {
    const Vector items = ReadVector(slot, 4);
    if (items.count > kMaxTensors) {
      throw Malformed(std::to_string(items.count) + " tensors in one message", items.first);
    }
    std::vector<Incoming> tensors;
    for (uint32_t i = 0; i < items.count; ++i) tensors.push_back(Tensor(items.first + 4 * uint64_t{i}));
    return tensors;
  }

  std::vector<Error> Errors(uint64_t slot) {
    const Vector items = ReadVector(slot, 4);
    if (items.count > kMaxTensors) throw Malformed(std::to_string(items.count) + " errors in one message", items.first);
    std::vector<Error> errors;
    for (uint32_t i = 0; i < items.count; ++i) {
      const Table table = ReadTable(items.first + 4 * uint64_t{i});
      Error error;
      if (table.fields[1]) error.message = std::string(Raw(table.at + table.fields[1]));
      if (table.fields[0]) error.code = Read<int64_t>(table.at + table.fields[0]);
      errors.push_back(std::move(error));
    }
    return errors;
  }

  template <typename T>
  T Read(uint64_t at) const {
    if (at > data_.size() || data_.size() - at < sizeof(T)) {
      throw Malformed("the message ends early: " + std::to_string(data_.size()) + " bytes hold no whole message",
                      data_.size());
    }
    T value;
    std::memcpy(&value, data_.data() + at, sizeof(T));
    return value;
  }

 private:
  void Spend(uint64_t size, uint64_t at) {
    if (size > left_) {
      throw Malformed(std::to_string(data_.size()) + " bytes that decode to more than " + std::to_string(limit_), at);
    }
    left_ -= size;
  }

  std::vector<int64_t> Shape(uint64_t slot) const {
    const Vector sizes = ReadVector(slot, 8);
    if (sizes.count > kMaxRank) throw Malformed("a tensor with " + std::to_string(sizes.count) + " axes", sizes.first);
    std::vector<int64_t> shape(sizes.count);
    if (sizes.count) std::memcpy(shape.data(), data_.data() + sizes.first, 8 * sizes.count);
    return shape;
  }

  Incoming Tensor(uint64_t slot) {
    const Table table = ReadTable(slot);
    const uint64_t at = table.at;
    Incoming tensor;
    if (table.fields[0]) tensor.type = Read<uint8_t>(at + table.fields[0]);
    if (table.fields[1]) tensor.shape = Shape(at + table.fields[1]);
    for (int64_t size : tensor.shape) {
      if (size < 0) {
        throw Malformed("a tensor of shape " + ShapeText(tensor.shape) + ": negative sizes have no data", at);
      }
    }
    const uint64_t data_at = table.fields[2] ? at + table.fields[2] : 0;
    const uint64_t strings_at = table.fields[3] ? at + table.fields[3] : 0;
    if (tensor.type == kString) {
      ReadStrings(&tensor, at, data_at, strings_at);
      return tensor;
    }
    if (tensor.type == 0 || tensor.type > kString) {
      throw Malformed("a tensor of type " + std::to_string(tensor.type) +
                          (tensor.type ? " (unknown)" : " (Null)") + ": expected 1 to 12",
                      at);
    }
    if (strings_at && ReadVector(strings_at, 4).count) {
      throw Malformed("a tensor of type " + std::to_string(tensor.type) + " with string_val", at);
    }
    const Vector bytes = data_at ? ReadVector(data_at, 1) : Vector{0, 0};
    const uint64_t expected = Product(tensor.shape, kItemBytes[tensor.type], false);
    if (bytes.count != expected) {
      throw Malformed("a tensor of type " + std::to_string(tensor.type) + " " + ShapeText(tensor.shape) +
                          ": expected " + std::to_string(expected) + " bytes of data, got " +
                          std::to_string(bytes.count),
                      at);
    }
    Spend(bytes.count, at);
    if (!bytes.count) CheckEmpty(tensor.shape, kItemBytes[tensor.type], at);
    tensor.data = data_.substr(bytes.first, bytes.count);
    return tensor;
  }

  void ReadStrings(Incoming* tensor, uint64_t at, uint64_t data_at, uint64_t strings_at) {
    if (data_at && ReadVector(data_at, 1).count) throw Malformed("a tensor of type String with data", at);
    const Vector items = strings_at ? ReadVector(strings_at, 4) : Vector{0, 0};
    const uint64_t expected = Product(tensor->shape, 1, false);
    if (items.count != expected) {
      throw Malformed("a tensor string " + ShapeText(tensor->shape) + ": expected " + std::to_string(expected) +
                          " strings, got " + std::to_string(items.count),
                      at);
    }
    if (items.count > kMaxStrings) throw Malformed(std::to_string(items.count) + " strings in one tensor", at);
    if (!items.count) return CheckEmpty(tensor->shape, 8, at);
    Spend(8 * uint64_t{items.count}, at);
    tensor->strings.reserve(items.count);
    for (uint32_t i = 0; i < items.count; ++i) tensor->strings.push_back(Raw(items.first + 4 * uint64_t{i}));
  }

  // A tensor without elements may have no other sizes than a message could hold.
  static void CheckEmpty(const std::vector<int64_t>& shape, uint64_t item, uint64_t at) {
    if (Product(shape, item, true) > kMaxMessageBytes) {
      throw Malformed("a tensor without elements of shape " + ShapeText(shape), at);
    }
  }

  const std::string_view data_;
  const uint64_t limit_;
  uint64_t left_;
};

// Reads the reply to a call. Throws Malformed.
inline Response DecodeResponse(std::string_view message) {
  Reader reader(message);
  const Table table = reader.ReadTable(0);
  Response response;
  if (table.fields[1]) response.errors = reader.Errors(table.at + table.fields[1]);
  if (response.errors.empty() && table.fields[0]) response.tensors = reader.Tensors(table.at + table.fields[0]);
  return response;
}

}  // namespace graphpipe
}  // namespace remote_ops

#endif  // REMOTE_OPS_GRAPHPIPE_H_
