// Which replica a call goes to next: one that failed lately, or has too much to do, is passed over while there is another.
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

// The URLs of this process that are passed over for now: those that cannot be reached at once, others after five failures
// in a row; for a second, and twice as long each time that they fail again, up to half a minute. Those that ask for it are
// for as long as they ask. Safe to use from several threads.
class Bans {
 public:
  void Failed(const std::string& url, Instant now, bool away) {
    std::lock_guard<std::mutex> lock(mutex_);
    Ban& ban = At(url, now);
    if (now < ban.until) return;  // calls that were under way together fail together: it is one failure
    any_ = true;
    if (++ban.faults < kFaults && !away) return;
    const bool again = ban.length.count() > 0 && now < ban.until + kForget;
    ban.length = again ? std::min(2 * ban.length, kLongest) : kShortest;
    ban.until = now + ban.length;
  }

  // It has too much to do until then, and has `asked` to be left alone if it has said so itself.
  void Busy(const std::string& url, Instant now, Instant until, bool asked) {
    std::lock_guard<std::mutex> lock(mutex_);
    Ban& ban = At(url, now);
    ban.held = until;
    if (asked) ban.asked = until;
    any_ = true;
  }

  // Until when it has asked to be left alone; long ago if it has not.
  Instant AskedUntil(const std::string& url) {
    if (!any_) return {};
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = bans_.find(url);
    return found == bans_.end() ? Instant{} : found->second.asked;
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
    return found != bans_.end() && now < found->second.End();
  }

 private:
  struct Ban {
    int faults = 0;
    Instant until, held, asked;
    std::chrono::seconds length{0};
    Instant End() const { return std::max(until, held); }
  };

  Ban& At(const std::string& url, Instant now) {
    if (bans_.size() >= kMost) Prune(now);
    return bans_[url];
  }

  void Prune(Instant now) {
    for (auto ban = bans_.begin(); ban != bans_.end();) {
      ban = now < ban->second.End() ? std::next(ban) : bans_.erase(ban);
    }
  }

  static constexpr std::chrono::seconds kShortest{1}, kLongest{30}, kForget{60};
  static constexpr size_t kMost = 1000;
  static constexpr int kFaults = 5;
  std::mutex mutex_;
  std::unordered_map<std::string, Ban> bans_;
  std::atomic<bool> any_{false};
};

}  // namespace remote_ops

#endif  // REMOTE_OPS_REPLICAS_H_
