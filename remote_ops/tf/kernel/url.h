// Where a request goes: URLs, and what an environment variable says of them.
//
// It connects to nobody.

#ifndef REMOTE_OPS_URL_H_
#define REMOTE_OPS_URL_H_

#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace remote_ops {

// Where a request goes. `text` is for messages: a query, which may hold a secret, is left out of it.
struct Url {
  std::string text;
  std::string curl;       // what curl is given
  std::string unix_path;  // empty for all but http+unix
  std::string host;
  int port = 0;
  bool is_named = false;  // the host has to be looked up

  // Throws std::invalid_argument.
  static Url Parse(const std::string& full);

 private:
  void SetHost(const std::string& place, int usual_port);
};

using Urls = std::shared_ptr<const std::vector<Url>>;

// Where the calls of a client go: to fixed URLs, or to what an environment variable holds, separated by spaces.
class Places {
 public:
  // Throws std::invalid_argument.
  Places(const std::vector<std::string>& urls, std::string variable);

  // The URLs of a call that begins now; a variable is read each time, and parsed when it has changed. Throws
  // std::invalid_argument.
  Urls Now() const;
  // For messages.
  std::string text() const { return variable_.empty() ? urls_->front().text : "${" + variable_ + "}"; }

 private:
  std::string variable_;
  mutable std::mutex mutex_;  // guards the rest, which is constant where there is no variable
  mutable std::string read_;
  mutable Urls urls_;
};

}  // namespace remote_ops

#endif  // REMOTE_OPS_URL_H_
