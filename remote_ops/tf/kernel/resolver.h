// The addresses of hosts: looked up on threads of their own, since TensorFlow's libcurl would stop its loop for it.
//
// IPv4 alone: that libcurl has no other.

#ifndef REMOTE_OPS_RESOLVER_H_
#define REMOTE_OPS_RESOLVER_H_

#include <arpa/inet.h>
#include <netdb.h>
#include <sys/socket.h>

#include <chrono>
#include <functional>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

namespace remote_ops {

// What is known of a host: its addresses, separated by commas, or why there are none.
struct Addresses {
  std::string text, error;
};

inline Addresses LookUp(const std::string& host) {
  addrinfo hints = {}, *found = nullptr;
  hints.ai_family = AF_INET;
  hints.ai_socktype = SOCK_STREAM;
  const int error = getaddrinfo(host.c_str(), nullptr, &hints, &found);
  Addresses addresses;
  if (error) {
    addresses.error = gai_strerror(error);
    return addresses;
  }
  for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
    char text[INET_ADDRSTRLEN];
    const auto* address = reinterpret_cast<const sockaddr_in*>(one->ai_addr);
    if (inet_ntop(AF_INET, &address->sin_addr, text, sizeof text) == nullptr) continue;
    addresses.text += (addresses.text.empty() ? "" : ",") + std::string(text);
  }
  freeaddrinfo(found);
  if (addresses.text.empty()) addresses.error = "no IPv4 address";
  return addresses;
}

// Keeps what it found for a minute. Never destroyed: its threads may outlast everybody. Safe to use from several threads.
class Resolver {
 public:
  using Then = std::function<void(const Addresses&)>;

  // The addresses of a host, where they are known; empty if they have to be asked for.
  std::string Known(const std::string& host) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = hosts_.find(host);
    return found != hosts_.end() && Clock::now() < found->second.until ? found->second.addresses : "";
  }

  // Has a thread find them out; whoever asks meanwhile waits for the same one.
  void Ask(const std::string& host, Then then) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (hosts_.size() >= kMost) Prune();
      Host& entry = hosts_[host];
      entry.waiting.push_back(std::move(then));
      if (entry.waiting.size() > 1) return;
    }
    try {
      std::thread([this, host] { Answer(host, LookUp(host)); }).detach();
    } catch (const std::system_error& error) {
      Answer(host, {"", error.what()});
    }
  }

  // Ask anew next time: nobody was there.
  void Doubt(const std::string& host) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = hosts_.find(host);
    if (found != hosts_.end()) found->second.until = {};
  }

 private:
  using Clock = std::chrono::steady_clock;

  struct Host {
    std::string addresses;
    Clock::time_point until;
    std::vector<Then> waiting;  // empty: nobody looks it up
  };

  void Answer(const std::string& host, Addresses found) {
    std::vector<Then> waiting;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      Host& entry = hosts_[host];
      waiting.swap(entry.waiting);
      if (found.error.empty()) {
        entry.addresses = found.text;
        entry.until = Clock::now() + std::chrono::seconds(60);
      } else if (!entry.addresses.empty()) {
        found = {entry.addresses, ""};  // those of before are a better answer than none
      }
    }
    for (const Then& then : waiting) then(found);
  }

  void Prune() {
    for (auto host = hosts_.begin(); host != hosts_.end();) {
      host = host->second.waiting.empty() ? hosts_.erase(host) : std::next(host);
    }
  }

  static constexpr size_t kMost = 1000;
  std::mutex mutex_;
  std::unordered_map<std::string, Host> hosts_;
};

}  // namespace remote_ops

#endif  // REMOTE_OPS_RESOLVER_H_
