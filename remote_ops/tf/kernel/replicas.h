// Which replica a call goes to next: one that could not be reached lately is passed over while there is another.
//
// It sends nothing and reads no clock.

#ifndef REMOTE_OPS_REPLICAS_H_
#define REMOTE_OPS_REPLICAS_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <string>
#include <unordered_map>

namespace remote_ops {

using Clock = std::chrono::steady_clock;
using Instant = Clock::time_point;

// The URLs of this process that are passed over for now: a second after the first failure, twice as long after each
// further one, up to half a minute. Safe to use from several threads.
class Bans {
 public:
  void Failed(const std::string& url, Instant now) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (bans_.size() >= kMost) Prune(now);
    Ban& ban = bans_[url];
    if (now < ban.until) return;  // calls that were under way together fail together: it is one failure
    const bool again = ban.length.count() > 0 && now < ban.until + kForget;
    ban.length = again ? std::min(2 * ban.length, kLongest) : kShortest;
    ban.until = now + ban.length;
    any_ = true;
  }

  void Worked(const std::string& url) {
    if (!any_) return;
    std::lock_guard<std::mutex> lock(mutex_);
    bans_.erase(url);
    any_ = !bans_.empty();
  }

  bool Holds(const std::string& url, Instant now) {
    if (!any_) return false;
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = bans_.find(url);
    return found != bans_.end() && now < found->second.until;
  }

 private:
  struct Ban {
    Instant until;
    std::chrono::seconds length{0};
  };

  void Prune(Instant now) {
    for (auto ban = bans_.begin(); ban != bans_.end();) {
      ban = now < ban->second.until ? std::next(ban) : bans_.erase(ban);
    }
  }

  static constexpr std::chrono::seconds kShortest{1}, kLongest{30}, kForget{60};
  static constexpr size_t kMost = 1000;
  std::mutex mutex_;
  std::unordered_map<std::string, Ban> bans_;
  std::atomic<bool> any_{false};
};

}  // namespace remote_ops

#endif  // REMOTE_OPS_REPLICAS_H_
