// The codec alone, for tests: reads files of messages and says of each whether it is accepted, and as what.
//
// A file holds records: one byte, 0 for a response and 1 for a request; the length as four bytes, little-endian; the
// message. A line comes out for each. With `encode` for the first argument, one request is written to standard output.

#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>

#include "graphpipe.h"

using namespace remote_ops::graphpipe;

namespace {

std::string Hex(std::string_view bytes) {
  static const char digits[] = "0123456789abcdef";
  std::string text;
  for (unsigned char byte : bytes) (text += digits[byte >> 4]) += digits[byte & 15];
  return text;
}

std::string Shown(const std::vector<Incoming>& tensors) {
  std::string text;
  for (const Incoming& tensor : tensors) {
    text += " tensor " + std::to_string(tensor.type) + " " + ShapeText(tensor.shape);
    if (tensor.type == kString) {
      for (std::string_view item : tensor.strings) text += " '" + Hex(item) + "'";
    } else {
      text += " " + Hex(tensor.data);
    }
  }
  return text;
}

std::string Shown(const Response& response) {
  std::string text = "response";
  for (const Error& error : response.errors) text += " error " + std::to_string(error.code) + " '" + Hex(error.message) + "'";
  return text + Shown(response.tensors);
}

// What graphpipe.py does with a request; the kernel never reads one, but its parts are the same.
std::string ReadRequest(std::string_view message) {
  Reader reader(message);
  const Table request = reader.ReadTable(0);
  const uint8_t tag = request.fields[0] ? reader.Read<uint8_t>(request.at + request.fields[0]) : 0;
  if ((tag != 1 && tag != 2) || !request.fields[1]) throw Malformed("a request of another type", request.at);
  const Table infer = reader.ReadTable(request.at + request.fields[1]);
  if (tag == 2) return "metadata request";
  std::string text = "request";
  text += " '" + Hex(infer.fields[0] ? reader.Raw(infer.at + infer.fields[0]) : "") + "'";
  for (int field : {1, 3}) {
    text += " names";
    if (!infer.fields[field]) continue;
    for (const std::string& name : reader.Texts(infer.at + infer.fields[field])) text += " '" + Hex(name) + "'";
  }
  return text + (infer.fields[2] ? Shown(reader.Tensors(infer.at + infer.fields[2])) : "");
}

void Check(bool is_request, std::string_view message) {
  try {
    std::printf("%s\n", (is_request ? ReadRequest(message) : Shown(DecodeResponse(message))).c_str());
  } catch (const Malformed& error) {
    std::printf("reject: %s\n", error.what());
  }
}

int Encode() {
  const std::vector<std::string> strings = {std::string("a\0b", 3), "", "four"};
  const std::string blob = StringBlob(strings, strings.size());
  const float floats[] = {0, 1, 2, 3, 4, 5};
  const std::string_view data(reinterpret_cast<const char*>(floats), sizeof floats);
  const std::vector<Outgoing> tensors = {{10, {2, 3}, data}, {kString, {3}, blob}, {8, {0, 2}, {}}, {1, {}, data.substr(0, 1)}};
  const auto heads = EncodeRequest(std::string_view("cfg\0\xff", 5), {"x", "gr\xc3\xb6\xc3\x9f", "", "d"}, tensors, {"y"});
  for (size_t i = 0; i < heads.size(); ++i) {
    std::fwrite(heads[i].data(), 1, heads[i].size(), stdout);
    if (tensors[i].data.size()) std::fwrite(tensors[i].data.data(), 1, tensors[i].data.size(), stdout);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "encode") return Encode();
  for (int i = 1; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    char kind;
    while (file.get(kind)) {
      uint32_t size = 0;
      file.read(reinterpret_cast<char*>(&size), 4);
      // Exactly as large as the message, so that a sanitizer sees every byte too far.
      std::unique_ptr<char[]> message(new char[size]);
      file.read(message.get(), size);
      Check(kind == 1, {message.get(), size});
    }
  }
  return 0;
}
