// How many sendings may be added to the calls of a client: the rules and numbers of Budget in remote_ops/policy.py.
//
// It sends nothing and reads no clock.

#ifndef REMOTE_OPS_BUDGET_H_
#define REMOTE_OPS_BUDGET_H_

#include <algorithm>
#include <chrono>
#include <mutex>

namespace remote_ops {

// Every call earns `ratio` of a sending. Some are lent at the start, and one a second while there are fewer than those;
// what is lent is earned back first. Safe to use from several threads.
class Budget {
 public:
  using Instant = std::chrono::steady_clock::time_point;

  Budget(double ratio, Instant now) : ratio_(ratio), saved_(ratio > 0 ? kReserve : 0), lent_(saved_), at_(now) {}

  // There is one more call.
  void Earn() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (lent_ < ratio_) saved_ = std::min(kMost, saved_ + ratio_ - lent_);
    lent_ = std::max(0.0, lent_ - ratio_);
  }

  // One more sending: whether there is one left.
  bool Spend(Instant now) {
    std::lock_guard<std::mutex> lock(mutex_);
    double loan = 0;
    if (ratio_ > 0 && saved_ < kReserve) {
      const double waited = std::chrono::duration<double>(now - at_).count();
      loan = std::min(kReserve - saved_, kPerSecond * std::max(0.0, waited));
    }
    if (saved_ + loan < 1 - 1e-9) return false;
    saved_ += loan - 1;
    lent_ = std::min(kReserve, lent_ + loan);
    at_ = now;
    return true;
  }

 private:
  static constexpr double kReserve = 10, kPerSecond = 1, kMost = 100;
  const double ratio_;
  std::mutex mutex_;
  double saved_, lent_;
  Instant at_;
};

}  // namespace remote_ops

#endif  // REMOTE_OPS_BUDGET_H_
