#include "http.h"

#include "resolver.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cctype>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <map>
#include <mutex>
#include <random>
#include <thread>
#include <unordered_map>

namespace remote_ops {
namespace {

constexpr long kUploadBytes = 1 << 20, kReceiveBytes = 1 << 19;
constexpr uint64_t kMaxBodyBytes = uint64_t{1} << 31;
constexpr double kForeverS = 1e9;
constexpr double kHoldS = 1;          // for who is overloaded and does not say how long
constexpr double kLongestHoldS = 60;  // a server may ask for any length
constexpr size_t kLoops = 4;

double Seconds(Clock::duration length) { return std::chrono::duration<double>(length).count(); }
Clock::duration Length(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::clamp(seconds, -kForeverS, kForeverS)));
}
long Milliseconds(double seconds) {
  return static_cast<long>(std::ceil(std::max(0.001, std::min(seconds, kForeverS / 1e3)) * 1e3));
}

// A limit of 0 is none.
double AtMost(double limit, double seconds) { return limit > 0 ? std::min(limit, seconds) : seconds; }

std::string Fixed(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3f s", seconds);
  return text;
}

// --------------------------------------------------------------------------- headers

bool IsName(char c, bool first) { return c == '_' || std::isalpha((unsigned char)c) || (!first && std::isdigit((unsigned char)c)); }

// Fills in ${NAME}; false, with `missing` set, if a variable is not there.
bool Resolve(const std::string& value, std::string* resolved, std::string* missing) {
  resolved->clear();
  for (size_t at = 0; at < value.size();) {
    size_t end = at + 2;
    if (value.compare(at, 2, "${") == 0) {
      while (end < value.size() && IsName(value[end], end == at + 2)) ++end;
    }
    if (end < value.size() && end > at + 2 && value[end] == '}') {
      const std::string name = value.substr(at + 2, end - at - 2);
      const char* found = std::getenv(name.c_str());
      if (found == nullptr) {
        *missing = name;
        return false;
      }
      resolved->append(found);
      at = end + 1;
    } else {
      resolved->push_back(value[at++]);
    }
  }
  return true;
}

bool IsPlain(const std::string& text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c != '\r' && c != '\n' && c != '\0' && !(c & 0x80); });
}

std::string Lower(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower((unsigned char)c));
  return text;
}

// --------------------------------------------------------------------------- what an answer means

// The error classes of errors.py, by the code in the body.
Failure OfAnswer(const graphpipe::Error& error, const std::string& url) {
  const std::string message = error.message + " - from " + url;
  switch (error.code) {
    case kInvalidArgument:
    case kDeadlineExceeded:
    case kNotFound:
    case kUnimplemented:
    case kInternal:
      return Final(static_cast<Code>(error.code), message);
    case kResourceExhausted:
    case kUnavailable:
      return Passing(static_cast<Code>(error.code), message);
    default:
      return Final(kUnknown, message + " (code " + std::to_string(error.code) + ")");
  }
}

bool IsText(const std::string& type) {
  return type.rfind("text/", 0) == 0 || type.find("json") != std::string::npos || type.find("xml") != std::string::npos;
}

// The beginning of a body as words, without markup.
std::string Words(std::string_view body) {
  std::string words;
  bool in_tag = false, space = false;
  for (unsigned char c : body.substr(0, 400)) {
    if (c == '<') in_tag = true;
    if (!in_tag && c > ' ' && c != 127) {
      if (space && !words.empty()) words.push_back(' ');
      space = false;
      words.push_back(static_cast<char>(c));
    } else {
      space = true;
    }
    if (c == '>') in_tag = false;
  }
  words = words.substr(0, 160);
  while (!words.empty() && !graphpipe::IsUtf8(words)) words.pop_back();
  return words;
}

// What Python takes for text, whatever bytes a peer put into a message: what is not UTF-8, or would end it, is replaced.
std::string Readable(std::string_view text) {
  std::string readable;
  while (!text.empty()) {
    size_t size = 1;
    while (size < std::min<size_t>(4, text.size()) && !graphpipe::IsUtf8(text.substr(0, size))) ++size;
    if (!graphpipe::IsUtf8(text.substr(0, size))) size = 0;
    readable += size && text[0] ? text.substr(0, size) : "\xEF\xBF\xBD";
    text.remove_prefix(std::max<size_t>(size, 1));
  }
  return readable;
}

std::string Said(const Call& call, long status, const std::string& type) {
  const std::string answered = call.url().text + " answered " + std::to_string(status);
  if (status >= 300 && status < 400) {
    char* found = nullptr;
    curl_easy_getinfo(call.easy, CURLINFO_REDIRECT_URL, &found);
    std::string location = found ? found : "somewhere";
    return answered + ": it moved to '" + location.substr(0, location.find('?')) + "'; call that";
  }
  if (status == 401 || status == 403) return answered + ": it wants to know who calls; pass headers={'Authorization': ...}";
  const std::string words = IsText(type) ? Words(call.body->view()) : "";
  return answered + (words.empty() ? "" : ": " + words);
}

Failure OfStatus(const Call& call, long status, const std::string& type) {
  try {
    const graphpipe::Response response = graphpipe::DecodeResponse(call.body->view());
    if (!response.errors.empty()) {
      Failure failure = OfAnswer(response.errors[0], call.url().text);
      failure.away = failure.retryable && (status == 502 || status == 503);
      return failure;
    }
  } catch (const graphpipe::Malformed&) {
    // It said it in other words.
  }
  const std::string said = Said(call, status, type);
  switch (status) {
    case 429: return Passing(kResourceExhausted, said);
    case 502:
    case 503: return Away(said);
    case 504: return Final(kDeadlineExceeded, said);
    case 401: return Final(kUnauthenticated, said);
    case 403: return Final(kPermissionDenied, said);
    case 404: return Final(kNotFound, said);
    case 501: return Final(kUnimplemented, said);
    default: return Final(status >= 400 && status < 500 ? kInvalidArgument : kInternal, said);
  }
}

// Seconds from now that a `Retry-After` asks for, which is a number or a date; -1 without one that is either.
double RetryAfter(CURL* easy) {
  curl_header* found = nullptr;
  if (curl_easy_header(easy, "Retry-After", 0, CURLH_HEADER, -1, &found) != CURLHE_OK) return -1;
  const std::string text = found->value;
  const bool is_number = std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); });
  if (is_number) return text.empty() ? -1 : std::stod(text.substr(0, 12));
  const time_t date = curl_getdate(text.c_str(), nullptr);
  const double now = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  return date == -1 ? -1 : std::max(0.0, static_cast<double>(date) - now);
}

// Reads a whole answer into `call->response`.
Failure Judge(Call* call) {
  long status = 0;
  char* found = nullptr;
  curl_easy_getinfo(call->easy, CURLINFO_RESPONSE_CODE, &status);
  curl_easy_getinfo(call->easy, CURLINFO_CONTENT_TYPE, &found);
  const std::string type = Lower(found ? found : "");
  if (!call->has_head) {
    return Passing(kUnavailable, "the connection ended while receiving the answer (within its head) - at " + call->url().text);
  }
  if (status < 200 || status >= 300) {
    Failure failure = OfStatus(*call, status, type);
    failure.retry_after_s = RetryAfter(call->easy);
    return failure;
  }
  const std::string& url = call->url().text;
  try {
    call->response = graphpipe::DecodeResponse(call->body->view());
  } catch (const graphpipe::Malformed& error) {
    if (call->body->view().empty()) {
      return Final(kInternal, url + " answered " + std::to_string(status) + " with an empty body: expected a GraphPipe message");
    }
    if (IsText(type)) return Final(kInternal, Said(*call, status, type) + ": expected a GraphPipe message");
    return Final(kInternal, "the answer from " + url + " is no GraphPipe message: " + error.what());
  }
  if (!call->response.errors.empty()) return OfAnswer(call->response.errors[0], url);
  return {};
}

// --------------------------------------------------------------------------- what curl means

constexpr const char* kConnecting = "connecting";
constexpr const char* kResolving = "resolving the host";

const char* Unanswered(const Call& call) {
  return call.piece == call.pieces.size() ? "waiting for the first byte" : "sending the request";
}

const char* Phase(const Call& call) {
  curl_off_t ready = 0, first = 0;
  curl_easy_getinfo(call.easy, CURLINFO_PRETRANSFER_TIME_T, &ready);
  curl_easy_getinfo(call.easy, CURLINFO_STARTTRANSFER_TIME_T, &first);
  if (ready == 0) return kConnecting;
  return first == 0 ? Unanswered(call) : "receiving the answer";
}

Failure OfTimeout(const Call& call, const char* phase) {
  const Instant now = Clock::now();
  const std::string said = "no answer from " + call.url().text + " in " + Fixed(Seconds(now - call.started)) + " (attempt " +
                           std::to_string(call.attempt) + " of " + std::to_string(call.policy().attempts) + ", " +
                           Fixed(Seconds(now - call.sent)) + " " + phase + ")";
  const bool unsent = phase == kConnecting || phase == kResolving;
  return {kDeadlineExceeded, said, now < call.deadline, unsent, unsent};
}

std::string Lost(const Call& call, const char* phase, const std::string& why) {
  return std::string("the connection ended while ") + phase + " (" + why + ") - at " + call.url().text;
}

Failure OfCurl(const Call& call, CURLcode code) {
  const std::string& url = call.url().text;
  const std::string why = call.curl_error[0] ? call.curl_error : curl_easy_strerror(code);
  switch (code) {
    case CURLE_OPERATION_TIMEDOUT:
      return OfTimeout(call, Phase(call));
    case CURLE_COULDNT_CONNECT:
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_SSL_CONNECT_ERROR:
      if (call.begun) return Away(Lost(call, Unanswered(call), why));  // one that was kept, and there is no other
      return Unsent("cannot connect (" + why + ") - at " + url);
    case CURLE_PEER_FAILED_VERIFICATION:
      return Final(kUnavailable, "cannot connect (" + why + ") - at " + url);
    case CURLE_SSL_CERTPROBLEM:
    case CURLE_SSL_CACERT_BADFILE:
    case CURLE_SSL_CIPHER:
      return Final(kInvalidArgument, "these certificates do not load: " + why + " - at " + url);
    case CURLE_SEND_ERROR:
    case CURLE_RECV_ERROR:
    case CURLE_GOT_NOTHING:
    case CURLE_PARTIAL_FILE:
      return Passing(kUnavailable, Lost(call, Phase(call), why));
    case CURLE_SEND_FAIL_REWIND:
    case CURLE_READ_ERROR:
    case CURLE_ABORTED_BY_CALLBACK:
      return Passing(kUnavailable, Lost(call, Unanswered(call), "it was kept from an earlier call"));
    case CURLE_WRITE_ERROR:
      return Final(kInternal, call.too_large ? "an answer of more than " + std::to_string(kMaxBodyBytes) + " bytes - at " + url
                                             : "no memory for the answer - at " + url);
    default:
      return Final(kInternal, "the answer is not HTTP/1.1 as we accept it: " + why + " - at " + url);
  }
}

// --------------------------------------------------------------------------- what curl calls back

size_t GiveBody(char* into, size_t size, size_t count, void* context) {
  auto* call = static_cast<Call*>(context);
  size_t room = size * count, copied = 0;
  while (room && call->piece < call->pieces.size()) {
    const std::string_view rest = call->pieces[call->piece].substr(call->offset);
    const size_t taken = std::min(room, rest.size());
    std::memcpy(into + copied, rest.data(), taken);
    copied += taken;
    room -= taken;
    call->offset += taken;
    if (taken == rest.size()) {
      ++call->piece;
      call->offset = 0;
    }
  }
  return copied;
}

// curl sends a request again by itself where a kept connection ends before the answer begins: we let it do so once, and
// never where there is to be one sending. It asks for the body anew, or says that it begins, whichever comes first.
bool MayBegin(const Call& call) { return call.begun < (call.policy().attempts == 1 ? 1 : 2); }

int Rewind(void* context, curl_off_t offset, int origin) {
  auto* call = static_cast<Call*>(context);
  if (offset != 0 || origin != SEEK_SET || (call->begun && !MayBegin(*call))) return CURL_SEEKFUNC_FAIL;
  call->piece = call->offset = 0;
  return CURL_SEEKFUNC_OK;
}

int BeginToSend(void* context, char*, char*, int, int) {
  auto* call = static_cast<Call*>(context);
  if (!MayBegin(*call)) return CURL_PREREQFUNC_ABORT;
  ++call->begun;
  return CURL_PREREQFUNC_OK;
}

// curl takes a connection that ends within the head of an answer for the end of an answer without a body.
size_t TakeHead(char* from, size_t size, size_t count, void* context) {
  const std::string_view line(from, size * count);
  bool* has_head = &static_cast<Call*>(context)->has_head;
  *has_head = (*has_head && line.substr(0, 5) != "HTTP/") || line == "\r\n" || line == "\n";
  return line.size();
}

size_t TakeBody(char* from, size_t size, size_t count, void* context) {
  auto* call = static_cast<Call*>(context);
  size *= count;
  if (call->body->view().empty()) {
    curl_off_t length = -1;
    curl_easy_getinfo(call->easy, CURLINFO_CONTENT_LENGTH_DOWNLOAD_T, &length);
    call->too_large = length > static_cast<curl_off_t>(kMaxBodyBytes);
    if (call->too_large || (length > 0 && !call->body->Reserve(static_cast<size_t>(length)))) return CURL_WRITEFUNC_ERROR;
  }
  call->too_large = call->body->view().size() + size > kMaxBodyBytes;
  return !call->too_large && call->body->Append(from, size) ? size : CURL_WRITEFUNC_ERROR;
}

// TensorFlow's curl knows no unix sockets, but takes one that is connected already.
curl_socket_t OpenUnix(void* context, curlsocktype, curl_sockaddr*) {
  const std::string& path = static_cast<Call*>(context)->url().unix_path;
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) return CURL_SOCKET_BAD;
  std::memcpy(address.sun_path, path.data(), path.size());
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd >= 0 && connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0) return fd;
  if (fd >= 0) close(fd);
  return CURL_SOCKET_BAD;
}

int IsConnected(void*, curl_socket_t, curlsocktype) { return CURL_SOCKOPT_ALREADY_CONNECTED; }

std::string TrustedFile() {
  for (const char* name : {"SSL_CERT_FILE", "CURL_CA_BUNDLE"}) {
    if (const char* path = std::getenv(name)) return path;
  }
  for (const char* path : {"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
                           "/etc/ssl/cert.pem"}) {
    if (access(path, R_OK) == 0) return path;
  }
  return "";
}

}  // namespace

// --------------------------------------------------------------------------- loops

// What the loops of a process know together.
struct Shared {
  Bans bans;
  Resolver resolver;
};

// Drives many calls on a thread of its own, or one on the caller's. `mutex_` guards what other threads put in; the rest is the thread's own.
class Loop {
 public:
  Loop(Shared* shared, bool has_thread) : shared_(shared), multi_(curl_multi_init()) {
    curl_multi_setopt(multi_, CURLMOPT_MAXCONNECTS, 64L);
    curl_multi_setopt(multi_, CURLMOPT_PIPELINING, static_cast<long>(CURLPIPE_NOTHING));
    if (has_thread) std::thread([this] { Run(); }).detach();
  }

  // Drives a call on this thread until it is over; for a loop without its own.
  void Drive(const std::shared_ptr<Call>& call) {
    give_up_all_ = false;  // that was for the calls before
    Schedule(call, call->next);
    for (;;) {
      Step();
      if (call->over) return;
      Wait();
    }
  }

  void Put(std::shared_ptr<Call> call, bool give_up) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      (give_up ? given_up_ : started_).push_back(std::move(call));
    }
    curl_multi_wakeup(multi_);
  }

  // Gives up every call that is under way.
  void GiveUpAll() {
    give_up_all_ = true;
    curl_multi_wakeup(multi_);
  }

  std::atomic<int> load{0};

 private:
  struct Resolved {
    std::shared_ptr<Call> call;
    int attempt;
    Addresses addresses;
  };

  void Run() {
    for (;;) {
      Step();
      Wait();
    }
  }

  void Step() {
    TakeIn();
    StartDue();
    int running = 0;
    curl_multi_perform(multi_, &running);
    while (Reap()) {
    }
  }

  void Wait() { curl_multi_poll(multi_, nullptr, 0, PatienceMs(), nullptr); }

  int PatienceMs() const {
    if (waiting_.empty()) return 60'000;
    const double left = Seconds(waiting_.begin()->first - Clock::now());
    return static_cast<int>(std::ceil(std::max(0.0, std::min(left, 60.0)) * 1e3));
  }

  void TakeIn() {
    std::vector<std::shared_ptr<Call>> started, given_up;
    std::vector<Resolved> resolved;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      started.swap(started_);
      given_up.swap(given_up_);
      resolved.swap(resolved_);
    }
    for (auto& call : started) Schedule(call, call->next);
    if (give_up_all_.exchange(false)) {
      for (const auto& entry : waiting_) given_up.push_back(entry.second);
      for (const auto& entry : running_) given_up.push_back(entry.second);
    }
    for (auto& call : given_up) {
      if (!call->over) End(call, Final(kCancelled, "the call to " + call->urls->front().text + " was cancelled"));
    }
    for (auto& one : resolved) TakeAddresses(one);
  }

  void Schedule(const std::shared_ptr<Call>& call, Instant at) {
    call->next = at;
    waiting_.emplace(at, call);
  }

  void Unschedule(const std::shared_ptr<Call>& call) {
    const auto [first, last] = waiting_.equal_range(call->next);
    const auto found = std::find_if(first, last, [&call](const auto& entry) { return entry.second == call; });
    if (found != last) waiting_.erase(found);
  }

  void StartDue() {
    const Instant now = Clock::now();
    while (!waiting_.empty() && waiting_.begin()->first <= now) {
      std::shared_ptr<Call> call = waiting_.begin()->second;
      waiting_.erase(waiting_.begin());
      if (call->over) continue;
      if (call->resolving) {
        call->resolving = false;
        Settle(call, OfTimeout(*call, kResolving));
        continue;
      }
      if (call->attempt == 0) {
        call->place = Choose(*call, now);
        call->target->budget.Earn();
      }
      ++call->attempt;
      call->sent = now;
      if (!HasTried(*call, call->place)) call->tried.push_back(call->place);
      FindHost(call);
    }
  }

  static bool HasTried(const Call& call, size_t place) {
    return std::count(call.tried.begin(), call.tried.end(), place) > 0;
  }

  // The next in turn that is not banned, and that this call has not tried yet; as far as there is such a one.
  size_t Choose(const Call& call, Instant now) {
    const size_t count = call.urls->size(), first = call.turn + call.attempt;
    int least = 4;
    size_t best = 0;
    for (size_t i = 0; count > 1 && i < count; ++i) {
      const size_t place = (first + i) % count;
      const int against = 2 * shared_->bans.Holds((*call.urls)[place].curl, now) + HasTried(call, place);
      if (against < least) {
        least = against;
        best = place;
      }
    }
    return best;
  }

  // Seconds that the attempt under way may still take.
  static double Left(const Call& call) {
    const double left = Seconds(call.deadline - call.sent);
    return AtMost(call.policy().attempt_timeout_s, left) - Seconds(Clock::now() - call.sent);
  }

  // The same until there is a connection: one of several replicas does not get all the time for it.
  static double LeftToConnect(const Call& call) {
    const double left = Left(call);
    const int more = std::min<int>(call.urls->size(), std::max(1, call.policy().attempts - call.attempt + 1));
    return AtMost(call.policy().connect_timeout_s, left / more);
  }

  // Sends to a host that is known; of another, finds out the address first.
  void FindHost(const std::shared_ptr<Call>& call) {
    const Url& url = call->url();
    if (url.is_named) call->addresses = shared_->resolver.Known(url.host);
    if (!url.is_named || !call->addresses.empty() || Left(*call) <= 0) return Send(call);
    call->resolving = true;
    Schedule(call, Clock::now() + Length(LeftToConnect(*call)));
    shared_->resolver.Ask(url.host, [this, call, attempt = call->attempt](const Addresses& found) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        resolved_.push_back({call, attempt, found});
      }
      curl_multi_wakeup(multi_);
    });
  }

  void TakeAddresses(const Resolved& one) {
    Call& call = *one.call;
    if (call.over || !call.resolving || call.attempt != one.attempt) return;  // it did not wait
    call.resolving = false;
    Unschedule(one.call);
    call.addresses = one.addresses.text;
    if (!call.addresses.empty()) return Send(one.call);
    Settle(one.call, Unsent("cannot resolve host '" + call.url().host + "' (" + one.addresses.error + ") - at " + call.url().text));
  }

  void Send(const std::shared_ptr<Call>& call) {
    const Failure failure = Transfer(call);
    if (failure.code != kOk) End(call, failure);
  }

  // Begins one transfer.
  Failure Transfer(const std::shared_ptr<Call>& call) {
    if (Left(*call) <= 0) return OfTimeout(*call, "waiting to be sent");
    call->easy = NewHandle();
    if (call->easy == nullptr) return Final(kInternal, "curl gives no handle");
    Failure failure = SetHeaders(call.get(), Seconds(call->deadline - Clock::now()));
    if (failure.code != kOk) return failure;
    call->piece = call->offset = 0;
    call->body->Clear();
    call->curl_error[0] = 0;
    call->has_head = false;
    call->begun = 0;
    SetOptions(call.get());
    running_[call->easy] = call;
    if (curl_multi_add_handle(multi_, call->easy) == CURLM_OK) return {};
    running_.erase(call->easy);
    return Final(kInternal, "curl takes no more transfers");
  }

  CURL* NewHandle() {
    if (spare_.empty()) return curl_easy_init();
    CURL* easy = spare_.back();
    spare_.pop_back();
    return easy;
  }

  static Failure SetHeaders(Call* call, double left) {
    auto add = [call](const std::string& line) { call->headers = curl_slist_append(call->headers, line.c_str()); };
    add("Content-Type: application/octet-stream");
    add("Expect:");
    add("Accept:");
    if (!call->url().unix_path.empty()) add("Host: localhost");
    if (left < kForeverS) add("X-Request-Timeout-Ms: " + std::to_string(static_cast<int64_t>(left * 1e3)));
    for (const auto& [name, value] : call->target->headers) {
      std::string resolved, missing;
      if (!Resolve(value, &resolved, &missing)) {
        return Final(kInvalidArgument, "header '" + name + "' needs the environment variable " + missing + ", which is not set");
      }
      if (!IsPlain(resolved)) {
        return Final(kInvalidArgument, "header '" + name + "' has a value with a line end or a character beyond ASCII");
      }
      add(resolved.empty() ? name + ";" : name + ": " + resolved);  // curl's way to write an empty header
    }
    return {};
  }

  static void SetOptions(Call* call) {
    CURL* easy = call->easy;
    const Url& url = call->url();
    curl_easy_setopt(easy, CURLOPT_URL, url.curl.c_str());
    curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(easy, CURLOPT_PROXY, "");
    curl_easy_setopt(easy, CURLOPT_PATH_AS_IS, 1L);
    curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(easy, CURLOPT_HTTP_VERSION, static_cast<long>(CURL_HTTP_VERSION_1_1));
    curl_easy_setopt(easy, CURLOPT_USERAGENT, "remote-ops/0.1");
    curl_easy_setopt(easy, CURLOPT_HTTPHEADER, call->headers);
    curl_easy_setopt(easy, CURLOPT_TIMEOUT_MS, Milliseconds(Left(*call)));
    curl_easy_setopt(easy, CURLOPT_CONNECTTIMEOUT_MS, Milliseconds(LeftToConnect(*call)));
    curl_easy_setopt(easy, CURLOPT_MAXAGE_CONN, 60L);
    curl_easy_setopt(easy, CURLOPT_BUFFERSIZE, kReceiveBytes);
    curl_easy_setopt(easy, CURLOPT_UPLOAD_BUFFERSIZE, kUploadBytes);
    curl_easy_setopt(easy, CURLOPT_ERRORBUFFER, call->curl_error);
    curl_easy_setopt(easy, CURLOPT_POST, 1L);
    curl_easy_setopt(easy, CURLOPT_POSTFIELDSIZE_LARGE, static_cast<curl_off_t>(call->body_bytes));
    curl_easy_setopt(easy, CURLOPT_READFUNCTION, GiveBody);
    curl_easy_setopt(easy, CURLOPT_READDATA, call);
    curl_easy_setopt(easy, CURLOPT_SEEKFUNCTION, Rewind);
    curl_easy_setopt(easy, CURLOPT_SEEKDATA, call);
    curl_easy_setopt(easy, CURLOPT_PREREQFUNCTION, BeginToSend);
    curl_easy_setopt(easy, CURLOPT_PREREQDATA, call);
    curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, TakeBody);
    curl_easy_setopt(easy, CURLOPT_WRITEDATA, call);
    curl_easy_setopt(easy, CURLOPT_HEADERFUNCTION, TakeHead);
    curl_easy_setopt(easy, CURLOPT_HEADERDATA, call);
    if (!url.unix_path.empty()) {
      curl_easy_setopt(easy, CURLOPT_OPENSOCKETFUNCTION, OpenUnix);
      curl_easy_setopt(easy, CURLOPT_OPENSOCKETDATA, call);
      curl_easy_setopt(easy, CURLOPT_SOCKOPTFUNCTION, IsConnected);
      SetAddress(call, "127.0.0.1");
    } else if (url.is_named) {
      SetAddress(call, call->addresses);
    }
    SetTls(easy, call->target->tls);
  }

  static void SetAddress(Call* call, const std::string& addresses) {
    const std::string line = call->url().host + ":" + std::to_string(call->url().port) + ":" + addresses;
    call->resolved = curl_slist_append(nullptr, line.c_str());
    curl_easy_setopt(call->easy, CURLOPT_RESOLVE, call->resolved);
  }

  static void SetTls(CURL* easy, const Tls& tls) {
    static const std::string& trusted = *new std::string(TrustedFile());  // loops outlive what is destroyed at exit
    const std::string& ca = tls.ca.empty() ? trusted : tls.ca;
    if (!ca.empty()) curl_easy_setopt(easy, CURLOPT_CAINFO, ca.c_str());
    if (!tls.cert.empty()) curl_easy_setopt(easy, CURLOPT_SSLCERT, tls.cert.c_str());
    if (!tls.cert.empty()) curl_easy_setopt(easy, CURLOPT_SSLKEY, (tls.key.empty() ? tls.cert : tls.key).c_str());
    std::string password, missing;
    if (!tls.password.empty() && Resolve(tls.password, &password, &missing)) {
      curl_easy_setopt(easy, CURLOPT_KEYPASSWD, password.c_str());
    }
    curl_easy_setopt(easy, CURLOPT_SSL_VERIFYPEER, tls.verify ? 1L : 0L);
    curl_easy_setopt(easy, CURLOPT_SSL_VERIFYHOST, tls.verify ? 2L : 0L);
  }

  // Takes in one transfer that has ended; false if there is none.
  bool Reap() {
    int left = 0;
    const CURLMsg* message = curl_multi_info_read(multi_, &left);
    if (message == nullptr) return false;
    const CURLcode code = message->data.result;
    const std::shared_ptr<Call> call = running_.at(message->easy_handle);
    Settle(call, code == CURLE_OK ? Judge(call.get()) : OfCurl(*call, code));
    return true;
  }

  // Ends a call with what its attempt came to, or tries again.
  void Settle(const std::shared_ptr<Call>& call, const Failure& failure) {
    const Instant now = Clock::now();
    Remember(call->url(), failure, now);
    if (!failure.retryable || call->attempt >= call->policy().attempts) return End(call, failure);
    const size_t next = Choose(*call, now);
    const bool elsewhere = !HasTried(*call, next);
    const Instant at = Earliest(*call, failure, next, elsewhere, now);
    if (at >= call->deadline) return End(call, failure);
    // Where nobody was reached, another replica adds nothing to the load.
    if (!(elsewhere && failure.unsent) && !call->target->budget.Spend(now)) {
      return End(call, failure, "; not sent again: retries have used up their share of the calls");
    }
    Release(call.get());
    call->place = next;
    Schedule(call, at);
  }

  // What an attempt tells of its replica to those that come after it.
  void Remember(const Url& url, const Failure& failure, Instant now) {
    Bans& bans = shared_->bans;
    const bool asked = failure.retryable && failure.retry_after_s >= 0;
    if (asked || failure.code == kResourceExhausted) {
      bans.Busy(url.curl, now, now + Length(asked ? std::min(failure.retry_after_s, kLongestHoldS) : kHoldS), asked);
    }
    if (failure.away && url.is_named) shared_->resolver.Doubt(url.host);
    if (failure.code == kUnavailable || failure.code == kDeadlineExceeded) {
      bans.Failed(url.curl, now, failure.away);
    } else if (!failure.retryable) {
      bans.Worked(url.curl);
    }
  }

  // When the next attempt may begin: at once elsewhere, else after a wait with full jitter; but not before the replica
  // wants to be called.
  Instant Earliest(const Call& call, const Failure& failure, size_t next, bool elsewhere, Instant now) {
    const Policy& policy = call.policy();
    const double longest = std::min(policy.max_s, policy.base_s * std::exp2(call.attempt - 1));
    double wait = elsewhere ? 0 : std::uniform_real_distribution<double>(0, longest)(random_);
    if (next == call.place) wait = std::max(wait, failure.retry_after_s);
    return std::max(now + Length(wait), shared_->bans.AskedUntil((*call.urls)[next].curl));
  }

  void End(const std::shared_ptr<Call>& call, Failure failure, const char* note = "") {
    Release(call.get());
    call->over = true;
    call->failure = std::move(failure);
    if (call->failure.code != kOk && call->failure.code != kDeadlineExceeded) call->failure.message += Attempt(*call);
    if (call->failure.code != kOk && call->tried.size() > 1) call->failure.message += Tried(*call);
    call->failure.message = Readable(call->failure.message + note);
    --load;
    call->done();
  }

  // Which attempt this was, where there could have been more.
  static std::string Attempt(const Call& call) {
    const int most = call.policy().attempts;
    if (call.attempt == 0 || (call.attempt == 1 && !(call.failure.retryable && most > 1))) return "";
    return " (attempt " + std::to_string(call.attempt) + " of " + std::to_string(most) + ")";
  }

  static std::string Tried(const Call& call) {
    std::string text;
    for (size_t place : call.tried) text += (text.empty() ? "; tried " : ", ") + (*call.urls)[place].text;
    return text;
  }

  // Gives the handle of an attempt back; its connection is kept only if the transfer has ended.
  void Release(Call* call) {
    if (call->easy == nullptr) return;
    if (running_.erase(call->easy)) curl_multi_remove_handle(multi_, call->easy);
    curl_easy_reset(call->easy);
    spare_.push_back(call->easy);
    call->easy = nullptr;
    curl_slist_free_all(call->headers);
    curl_slist_free_all(call->resolved);
    call->headers = call->resolved = nullptr;
  }

  Shared* const shared_;
  CURLM* const multi_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Call>> started_, given_up_;
  std::atomic<bool> give_up_all_{false};
  std::vector<Resolved> resolved_;
  std::multimap<Instant, std::shared_ptr<Call>> waiting_;
  std::unordered_map<CURL*, std::shared_ptr<Call>> running_;
  std::vector<CURL*> spare_;
  std::minstd_rand random_{std::random_device{}()};
};

namespace {

// The loops of one process; never destroyed, since their threads never end. A forked child makes its own.
struct Loops {
  explicit Loops(pid_t owner) : owner(owner) {}

  const pid_t owner;
  Shared shared;
  std::mutex mutex;
  std::vector<std::unique_ptr<Loop>> loops;
  std::vector<Loop*> idle;  // of those without a thread, which are as many as callers at once
  std::vector<Loop*> all;

  static Loops& Mine() {
    static std::atomic<Loops*> mine{nullptr};
    static std::once_flag once;
    std::call_once(once, [] { curl_global_init(CURL_GLOBAL_DEFAULT); });
    const pid_t pid = getpid();
    Loops* found = mine.load();
    while (found == nullptr || found->owner != pid) {
      Loops* made = new Loops(pid);
      if (mine.compare_exchange_strong(found, made)) return *made;
      delete made;  // another thread was first: `found` is now its
    }
    return *found;
  }

  // The first that has nothing to do, so that calls one after the other share a connection; else the least busy.
  Loop* Pick() {
    std::lock_guard<std::mutex> lock(mutex);
    Loop* best = nullptr;
    for (auto& loop : loops) {
      if (best == nullptr || loop->load < best->load) best = loop.get();
    }
    if ((best == nullptr || best->load > 0) && loops.size() < kLoops) {
      loops.push_back(std::make_unique<Loop>(&shared, true));
      best = loops.back().get();
      all.push_back(best);
    }
    ++best->load;
    return best;
  }

  // The one used last, whose connection is the warmest.
  Loop* Borrow() {
    std::lock_guard<std::mutex> lock(mutex);
    if (idle.empty()) {
      all.push_back(new Loop(&shared, false));
      return all.back();
    }
    Loop* loop = idle.back();
    idle.pop_back();
    return loop;
  }

  void Return(Loop* loop) {
    std::lock_guard<std::mutex> lock(mutex);
    idle.push_back(loop);
  }
};

}  // namespace

void Begin(Call* call, bool blocking) {
  static std::atomic<unsigned> turns{0};
  call->turn = turns++;
  call->place = call->turn % call->urls->size();
  call->started = call->next = Clock::now();
  call->deadline = call->started + Length(call->timeout_s);
  // Nobody need ask an empty piece for bytes.
  auto& pieces = call->pieces;
  pieces.erase(std::remove_if(pieces.begin(), pieces.end(), [](std::string_view piece) { return piece.empty(); }), pieces.end());
  for (std::string_view piece : pieces) call->body_bytes += piece.size();
  call->blocking = blocking;
  call->loop = blocking ? Loops::Mine().Borrow() : Loops::Mine().Pick();
}

void Start(std::shared_ptr<Call> call) {
  Loop* loop = call->loop;
  if (!call->blocking) return loop->Put(std::move(call), false);
  loop->Drive(call);
  Loops::Mine().Return(loop);
}

void Drop(Call* call) {
  if (call->blocking) {
    Loops::Mine().Return(call->loop);
  } else {
    --call->loop->load;
  }
}

void Cancel(const std::shared_ptr<Call>& call) { call->loop->Put(call, true); }

void CancelAll() {
  Loops& mine = Loops::Mine();
  std::lock_guard<std::mutex> lock(mine.mutex);
  for (Loop* loop : mine.all) loop->GiveUpAll();
}

}  // namespace remote_ops
