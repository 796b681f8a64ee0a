#include "url.h"

#include <arpa/inet.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <stdexcept>

namespace remote_ops {

Places::Places(const std::vector<std::string>& urls, std::string variable) : variable_(std::move(variable)) {
  if (urls.empty() == variable_.empty()) throw std::invalid_argument("expected either urls or endpoint");
  auto parsed = std::make_shared<std::vector<Url>>();
  for (const std::string& url : urls) parsed->push_back(Url::Parse(url));
  urls_ = std::move(parsed);
}

Urls Places::Now() const {
  if (variable_.empty()) return urls_;
  const char* found = std::getenv(variable_.c_str());
  const std::string text = found ? found : "";
  std::lock_guard<std::mutex> lock(mutex_);
  if (text == read_ && !urls_->empty()) return urls_;
  auto parsed = std::make_shared<std::vector<Url>>();
  std::istringstream words(text);
  for (std::string url; words >> url;) {
    try {
      parsed->push_back(Url::Parse(url));
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("the environment variable " + variable_ + " holds " + error.what());
    }
  }
  if (parsed->empty()) {
    throw std::invalid_argument("the environment variable " + variable_ + ", which is to hold the URL of the model, is not set");
  }
  read_ = text;
  urls_ = std::move(parsed);
  return urls_;
}

void Url::SetHost(const std::string& place, int usual_port) {
  if (place[0] == '[') {
    throw std::invalid_argument("an IPv6 address, which TensorFlow's libcurl cannot connect to: expected the name of a host or an IPv4 address, got '" +
                                text + "'");
  }
  const size_t colon = std::min(place.find(':'), place.size());
  host = place.substr(0, colon);
  const std::string number = place.substr(std::min(colon + 1, place.size()));
  const bool is_number = number.size() <= 5 && std::all_of(number.begin(), number.end(), [](unsigned char c) { return std::isdigit(c); });
  port = number.empty() ? usual_port : is_number ? std::stoi(number) : 0;
  if (port < 1 || port > 65535) throw std::invalid_argument("a port that is no number below 65536: '" + text + "'");
  const bool is_plain = std::all_of(host.begin(), host.end(), [](unsigned char c) { return std::isalnum(c) || c == '.' || c == '-' || c == '_'; });
  if (host.empty() || !is_plain) throw std::invalid_argument("a URL without a host, or with one that is no name: '" + text + "'");
  in_addr address;
  is_named = inet_aton(host.c_str(), &address) == 0;
}

Url Url::Parse(const std::string& full) {
  Url url;
  const size_t query = full.find('?');
  url.text = full.substr(0, query) + (query == std::string::npos ? "" : "?...");
  for (unsigned char c : full) {
    if (c <= 32 || c >= 127) throw std::invalid_argument("a URL with a space, a control character or one beyond ASCII");
  }
  const size_t mark = full.find("://");
  const std::string scheme = full.substr(0, mark == std::string::npos ? 0 : mark);
  if (scheme != "http" && scheme != "https" && scheme != "http+unix") {
    throw std::invalid_argument("no URL of a model: expected http://, https:// or http+unix://, got '" + url.text + "'");
  }
  const size_t start = mark + 3, end = std::min(full.find_first_of("/?#", start), full.size());
  const std::string place = full.substr(start, end - start);
  if (place.find('@') != std::string::npos) throw std::invalid_argument("a URL with a user name or password");
  if (place.empty()) throw std::invalid_argument("a URL without a host: '" + url.text + "'");
  if (scheme != "http+unix") {
    url.curl = full;
    url.SetHost(place, scheme == "https" ? 443 : 80);
    return url;
  }
  for (size_t i = 0; i < place.size(); ++i) {
    if (place[i] == '%' && i + 2 < place.size() && std::isxdigit((unsigned char)place[i + 1]) && std::isxdigit((unsigned char)place[i + 2])) {
      url.unix_path.push_back(static_cast<char>(std::stoi(place.substr(i + 1, 2), nullptr, 16)));
      i += 2;
    } else {
      url.unix_path.push_back(place[i]);
    }
  }
  if (url.unix_path.empty() || url.unix_path[0] != '/' || url.unix_path.find('\0') != std::string::npos) {
    throw std::invalid_argument("expected http+unix://%2Fpath.sock/model, got '" + url.text + "'");
  }
  // A made-up host for each socket, so that curl does not take the connection to one for that to another.
  char host[48];
  std::snprintf(host, sizeof host, "unix-%zx.invalid", std::hash<std::string>{}(url.unix_path));
  url.host = host;
  url.port = 80;
  const std::string target = full.substr(end);
  url.curl = "http://" + url.host + (target.empty() || target[0] != '/' ? "/" : "") + target;
  return url;
}

}  // namespace remote_ops
