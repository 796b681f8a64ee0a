// Carries one call and its answer between here and its URLs, over kept connections, on threads of its own, or on that of
// a caller who waits anyway.
//
// A `Loop` is one curl multi handle and the thread that drives it; all that a `Call` changes while it is under way, only
// that thread changes. It knows GraphPipe's errors, because they say whether to try again, and nothing of TensorFlow.

#ifndef REMOTE_OPS_HTTP_H_
#define REMOTE_OPS_HTTP_H_

#include <curl/curl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "budget.h"
#include "graphpipe.h"
#include "replicas.h"
#include "url.h"

namespace remote_ops {

// The canonical codes of gRPC, which TensorFlow shares.
enum Code : int {
  kOk = 0,
  kCancelled = 1,
  kUnknown = 2,
  kInvalidArgument = 3,
  kDeadlineExceeded = 4,
  kNotFound = 5,
  kPermissionDenied = 7,
  kResourceExhausted = 8,
  kUnimplemented = 12,
  kInternal = 13,
  kUnavailable = 14,
  kUnauthenticated = 16,
};

// Why a call failed.
struct Failure {
  Code code = kOk;
  std::string message;
  bool retryable = false;
  bool away = false;          // the replica cannot answer: others are to be asked for a while
  bool unsent = false;        // no connection to it was made
  double retry_after_s = -1;  // how long it asked to be left alone; -1 if it did not
};

inline Failure Unsent(std::string message) { return {kUnavailable, std::move(message), true, true, true}; }
inline Failure Away(std::string message) { return {kUnavailable, std::move(message), true, true}; }
inline Failure Passing(Code code, std::string message) { return {code, std::move(message), true}; }
inline Failure Final(Code code, std::string message) { return {code, std::move(message)}; }

struct Tls {
  std::string ca, cert, key, password;
  bool verify = true;
};

// How often a call is sent, and how long one sending may take. 0 seconds: only the call's own deadline holds.
struct Policy {
  int attempts = 3;
  double base_s = 0.05, max_s = 2.0;  // the longest wait before the second sending, which doubles, and before any
  double budget = 0.2;                // sendings that may be added, as a share of the calls
  double connect_timeout_s = 0, attempt_timeout_s = 0;
};

// What all calls of one client share.
struct Target {
  Places places;
  std::vector<std::pair<std::string, std::string>> headers;  // values may name environment variables as ${NAME}
  Tls tls;
  const Policy policy;
  mutable Budget budget;

  Target(const std::vector<std::string>& urls, std::string variable, const Policy& policy = {})
      : places(urls, std::move(variable)), policy(policy), budget(policy.budget, Clock::now()) {}
};

// Bytes that grow without being cleared first, on the boundary that TensorFlow wants its tensors on.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  bool Reserve(size_t room) {
    if (room <= room_) return true;
    void* grown = nullptr;
    if (posix_memalign(&grown, graphpipe::kAlignment, room)) return false;
    if (size_) std::memcpy(grown, data_, size_);
    std::free(data_);
    data_ = static_cast<char*>(grown);
    room_ = room;
    return true;
  }
  bool Append(const char* from, size_t size) {
    if (size > room_ - size_ && !Reserve(std::max(size_ + size, 2 * room_))) return false;
    if (size) std::memcpy(data_ + size_, from, size);
    size_ += size;
    return true;
  }
  void Clear() { size_ = 0; }
  std::string_view view() const { return {data_, size_}; }
  size_t room() const { return room_; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0, room_ = 0;
};

class Loop;

// One call. Set the first group before `Begin`; read the second once `done` is called, which happens exactly once, on
// the loop's thread.
struct Call {
  std::shared_ptr<const Target> target;
  Urls urls;
  std::vector<std::string_view> pieces;  // the request's body, in order
  double timeout_s = 30;
  std::function<void()> done;

  Failure failure;
  const std::shared_ptr<Buffer> body = std::make_shared<Buffer>();
  graphpipe::Response response;  // views `body`

  // The loop's own.
  Loop* loop = nullptr;
  bool blocking = false;
  unsigned turn = 0;
  int attempt = 0;
  size_t place = 0;           // of the replica that this attempt goes to
  std::vector<size_t> tried;  // the places so far, each once
  Instant started, deadline, sent, next;
  bool over = false, resolving = false;
  std::string addresses;
  CURL* easy = nullptr;
  curl_slist* headers = nullptr;
  curl_slist* resolved = nullptr;
  uint64_t body_bytes = 0;
  size_t piece = 0, offset = 0;
  int begun = 0;  // how often curl began to send it in this attempt
  bool too_large = false, has_head = false;
  char curl_error[CURL_ERROR_SIZE] = {};
  const Url& url() const { return (*urls)[place]; }
  const Policy& policy() const { return target->policy; }
};

// The life of a call: `Begin` starts its clock and gives it a loop; then `Start` hands it over, or `Drop` lets it be.
// A call that is `blocking` gets a loop without a thread: `Start` drives it on the caller's, until the call is over.
void Begin(Call* call, bool blocking);
void Start(std::shared_ptr<Call> call);
void Drop(Call* call);

// Gives a call up that was begun: it ends as cancelled, unless it has ended already.
void Cancel(const std::shared_ptr<Call>& call);

// Gives up all calls of this process.
void CancelAll();

}  // namespace remote_ops

#endif  // REMOTE_OPS_HTTP_H_
