// The ops: a model at a URL as one node of a TensorFlow graph.
//
//   RemoteOpsClient()               -> client                    who is called, and how often it is tried
//   RemoteOpsInfer(client,          -> outputs, code, message    one call; TensorFlow may drop it if nobody uses its outputs
//                  timeout_s,
//                  inputs)
//   RemoteOpsInferOrdered(...)      -> ...                       the same; TensorFlow keeps it
//
// These signatures stand in the graphs that users have saved: what is added has a default, and nothing is taken away.
//
// TensorFlow runs stateful ops with the same client one after the other, and side by side those that have different
// ones: each call site makes its own. A client costs nothing; connections belong to the process. Whatever takes a
// resource is stateful to TensorFlow, and is kept; so what may be dropped takes its client as a variant, which being the
// output of a stateful op keeps it from being folded as a constant, or merged with another.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "tensorflow/core/framework/allocation_description.pb.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_base.h"
#include "tensorflow/core/framework/resource_handle.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/framework/types.h"
#include "tensorflow/core/framework/variant.h"
#include "tensorflow/core/framework/variant_op_registry.h"
#include "tensorflow/core/framework/variant_tensor_data.h"

#include "http.h"

namespace remote_ops {
namespace {

namespace tf = tensorflow;

absl::Status StatusOf(int code, const std::string& message) {
  return absl::Status(static_cast<absl::StatusCode>(code), message);
}

// --------------------------------------------------------------------------- dtypes

// The number on the wire; what the enum lacks travels as an unsigned integer of the same size. 0: no form on the wire.
uint8_t WireType(tf::DataType dtype) {
  switch (dtype) {
    case tf::DT_UINT8: return 1;
    case tf::DT_INT8: return 2;
    case tf::DT_UINT16: return 3;
    case tf::DT_INT16: return 4;
    case tf::DT_UINT32: return 5;
    case tf::DT_INT32: return 6;
    case tf::DT_UINT64: return 7;
    case tf::DT_INT64: return 8;
    case tf::DT_HALF: return 9;
    case tf::DT_FLOAT: return 10;
    case tf::DT_DOUBLE: return 11;
    case tf::DT_STRING: return graphpipe::kString;
    case tf::DT_BFLOAT16: return 3;
    case tf::DT_BOOL:
    case tf::DT_FLOAT8_E5M2:
    case tf::DT_FLOAT8_E4M3FN:
    case tf::DT_FLOAT8_E4M3FNUZ:
    case tf::DT_FLOAT8_E4M3B11FNUZ:
    case tf::DT_FLOAT8_E5M2FNUZ: return 1;
    default: return 0;
  }
}

const char* WireName(uint8_t type) {
  static const char* const names[] = {"null",  "uint8",  "int8",  "uint16",  "int16",   "uint32", "int32",
                                      "uint64", "int64", "float16", "float32", "float64", "string"};
  return names[type];
}

std::string NameOf(tf::DataType dtype) {
  if (dtype == tf::DT_FLOAT) return "float32";
  if (dtype == tf::DT_DOUBLE) return "float64";
  if (dtype == tf::DT_HALF) return "float16";
  return tf::DataTypeString(dtype);
}

std::string SpecText(tf::DataType dtype, const tf::PartialTensorShape& shape) {
  if (shape.unknown_rank()) return NameOf(dtype) + " of any shape";
  std::vector<int64_t> sizes;
  for (int i = 0; i < shape.dims(); ++i) sizes.push_back(shape.dim_size(i));
  return NameOf(dtype) + " " + graphpipe::ShapeText(sizes);
}

constexpr uint8_t kFloat32 = 10;

// float32 stands in for what 2018 peers do not have.
template <typename T>
void CastInto(std::string_view data, tf::Tensor* out) {
  T* into = out->flat<T>().data();
  for (size_t i = 0; i < data.size() / 4; ++i) {
    float value;
    std::memcpy(&value, data.data() + 4 * i, 4);
    into[i] = static_cast<T>(value);
  }
}

bool CastFromFloat(std::string_view data, tf::Tensor* out) {
  switch (out->dtype()) {
    case tf::DT_BFLOAT16: CastInto<tf::bfloat16>(data, out); return true;
    case tf::DT_FLOAT8_E5M2: CastInto<tf::float8_e5m2>(data, out); return true;
    case tf::DT_FLOAT8_E4M3FN: CastInto<tf::float8_e4m3fn>(data, out); return true;
    case tf::DT_FLOAT8_E4M3FNUZ: CastInto<tf::float8_e4m3fnuz>(data, out); return true;
    case tf::DT_FLOAT8_E4M3B11FNUZ: CastInto<tf::float8_e4m3b11fnuz>(data, out); return true;
    case tf::DT_FLOAT8_E5M2FNUZ: CastInto<tf::float8_e5m2fnuz>(data, out); return true;
    default: return false;
  }
}

bool MayBeFloat(tf::DataType dtype) {
  return dtype == tf::DT_BFLOAT16 || (WireType(dtype) == 1 && dtype != tf::DT_BOOL && dtype != tf::DT_UINT8);
}

// --------------------------------------------------------------------------- the client

class Client : public tf::ResourceBase {
 public:
  explicit Client(std::unique_ptr<const Target> target) : target(std::move(target)) {}
  std::string DebugString() const override { return "remote_ops client of " + target->places.text(); }
  const std::shared_ptr<const Target> target;
};

// A client as a value. It does not outlive the process, so there is nothing to encode.
struct ClientValue {
  std::shared_ptr<const Target> target;
  std::string TypeName() const { return "remote_ops::ClientValue"; }
  void Encode(tf::VariantTensorData*) const {}
  bool Decode(const tf::VariantTensorData&) { return false; }
  std::string DebugString() const { return "remote_ops client"; }
};

// Forward-mode differentiation wants a tangent of every input before it finds that there is no second derivative.
absl::Status NoTangent(tf::OpKernelContext*, const ClientValue& client, ClientValue* zero) {
  *zero = client;
  return {};
}

using tf::TypeIndex;  // which the macro names without its namespace
REGISTER_UNARY_VARIANT_UNARY_OP_FUNCTION(tf::ZEROS_LIKE_VARIANT_UNARY_OP, tf::DEVICE_CPU, ClientValue, NoTangent);

class ClientOp : public tf::OpKernel {
 public:
  explicit ClientOp(tf::OpKernelConstruction* ctx) : tf::OpKernel(ctx) {
    std::vector<std::string> urls, names, values;
    std::string endpoint;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("urls", &urls));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("endpoint", &endpoint));
    std::unique_ptr<Target> made;
    try {
      made = std::make_unique<Target>(urls, endpoint, PolicyOf(ctx));
    } catch (const std::invalid_argument& error) {
      ctx->CtxFailure(StatusOf(kInvalidArgument, error.what()));
      return;
    }
    Target& target = *made;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("header_names", &names));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("header_values", &values));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("ca", &target.tls.ca));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("cert", &target.tls.cert));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("key", &target.tls.key));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("key_password", &target.tls.password));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("verify", &target.tls.verify));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("kind", &kind_));
    OP_REQUIRES(ctx, names.size() == values.size(), StatusOf(kInvalidArgument, "as many header_values as header_names"));
    for (size_t i = 0; i < names.size(); ++i) {
      const bool plain = !names[i].empty() && names[i].find_first_of("\r\n: \t") == std::string::npos;
      OP_REQUIRES(ctx, plain, StatusOf(kInvalidArgument, "no header of this name can be set: '" + names[i] + "'"));
      target.headers.emplace_back(names[i], values[i]);
    }
    client_.reset(new Client(std::move(made)));
  }

  static Policy PolicyOf(tf::OpKernelConstruction* ctx) {
    Policy policy;
    const auto get = [ctx](const char* name, auto* value) {
      const absl::Status status = ctx->GetAttr(name, value);
      if (!status.ok()) ctx->CtxFailure(status);
    };
    const auto number = [ctx, &get](const char* name) -> double {
      float value = 0;
      get(name, &value);
      if (!(value >= 0)) ctx->CtxFailure(StatusOf(kInvalidArgument, std::string(name) + ": expected a number, 0 or more"));
      return value;
    };
    get("attempts", &policy.attempts);
    policy.base_s = number("retry_base_s");
    policy.max_s = number("retry_max_s");
    policy.budget = number("retry_budget");
    policy.connect_timeout_s = number("connect_timeout_s");
    policy.attempt_timeout_s = number("attempt_timeout_s");
    return policy;
  }

  void Compute(tf::OpKernelContext* ctx) override {
    tf::Tensor* out = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, {}, &out));
    if (kind_ == tf::DT_VARIANT) {
      out->scalar<tf::Variant>()() = ClientValue{client_->target};
      return;
    }
    client_->Ref();  // which the handle takes over
    out->scalar<tf::ResourceHandle>()() = tf::ResourceHandle::MakeRefCountingHandle(client_.get(), ctx->device()->name());
  }

 private:
  tf::DataType kind_;
  tf::core::RefCountPtr<Client> client_;
};

// --------------------------------------------------------------------------- the call

constexpr size_t kSmallBytes = 1 << 14;

// A call, and what of TensorFlow it holds on to.
struct Job : Call {
  std::vector<tf::Tensor> inputs;
  std::vector<std::string> heads, blobs;
};

// Part of an answer as the memory of a tensor, which keeps all of the answer.
//
// TensorFlow writes into the memory of a tensor that nobody else holds. So no byte may belong to two of these, which a
// message whose offsets share a target would make of it: `Outputs` aliases what is disjoint, and copies the rest.
class BodyBuffer : public tf::TensorBuffer {
 public:
  BodyBuffer(std::shared_ptr<Buffer> body, std::string_view data)
      : tf::TensorBuffer(const_cast<char*>(data.data())), body_(std::move(body)), size_(data.size()) {}
  size_t size() const override { return size_; }
  tf::TensorBuffer* root_buffer() override { return this; }
  void FillAllocationDescription(tf::AllocationDescription* proto) const override {
    proto->set_requested_bytes(static_cast<int64_t>(size_));
    proto->set_allocator_name("remote_ops");
  }

 private:
  const std::shared_ptr<Buffer> body_;
  const size_t size_;
};

bool Overlap(std::string_view a, std::string_view b) {
  const auto at = [](const char* place) { return reinterpret_cast<uintptr_t>(place); };
  return at(a.data()) < at(b.data() + b.size()) && at(b.data()) < at(a.data() + a.size());
}

// Whether a tensor is to be part of the answer: aligned, worth it, and not a small part that would keep a large whole.
bool PaysToAlias(const Buffer& body, std::string_view data, const std::vector<std::string_view>& aliased) {
  return data.size() >= kSmallBytes && 4 * data.size() >= body.room() &&
         reinterpret_cast<uintptr_t>(data.data()) % EIGEN_MAX_ALIGN_BYTES == 0 &&
         std::none_of(aliased.begin(), aliased.end(), [data](std::string_view other) { return Overlap(data, other); });
}

class InferOp : public tf::AsyncOpKernel {
 public:
  explicit InferOp(tf::OpKernelConstruction* ctx) : tf::AsyncOpKernel(ctx) {
    std::string on_error;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("input_names", &input_names_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("output_names", &output_names_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("output_types", &output_types_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("output_shapes", &output_shapes_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("config", &config_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("on_error", &on_error));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("blocking", &blocking_));
    raises_ = on_error == "raise";
    OP_REQUIRES(ctx, input_names_.empty() || static_cast<int>(input_names_.size()) == ctx->num_inputs() - kFirst,
                StatusOf(kInvalidArgument, "expected as many input_names as inputs, or none"));
    OP_REQUIRES(ctx, output_shapes_.size() == output_types_.size(),
                StatusOf(kInvalidArgument, "expected as many output_shapes as output_types"));
    OP_REQUIRES(ctx, output_names_.empty() || output_names_.size() == output_types_.size(),
                StatusOf(kInvalidArgument, "expected as many output_names as output_types, or none"));
    for (int i = kFirst; i < ctx->num_inputs(); ++i) CheckType(ctx, "input", NameAt(input_names_, i - kFirst), ctx->input_type(i));
    for (size_t i = 0; i < output_types_.size(); ++i) CheckType(ctx, "output", NameAt(output_names_, i), output_types_[i]);
  }

  void ComputeAsync(tf::OpKernelContext* ctx, DoneCallback done) override {
    auto job = std::make_shared<Job>();
    const absl::Status status = Prepare(ctx, job.get());
    if (!status.ok()) {
      ctx->SetStatus(Report(ctx, status));
      return done();
    }
    tf::CancellationManager* cancellation = ctx->cancellation_manager();
    const auto token = cancellation ? cancellation->get_cancellation_token() : tf::CancellationToken{};
    auto* workers = ctx->device()->tensorflow_cpu_worker_threads()->workers;
    // What is called holds the job by a weak pointer: the loop keeps it until it has called it.
    job->done = [this, ctx, done, cancellation, token, workers, weak = std::weak_ptr<Job>(job)] {
      auto finish = [this, ctx, done, cancellation, token, job = weak.lock()] {
        // Without waiting: a cancellation that runs by now finds that the call is over.
        if (cancellation) cancellation->TryDeregisterCallback(token);
        ctx->SetStatus(Finish(ctx, *job));
        done();
      };
      // A small answer is taken out sooner than another thread wakes up.
      if (blocking_ || weak.lock()->body->view().size() <= kSmallBytes) {
        finish();
      } else {
        workers->Schedule(std::move(finish));
      }
    };
    Call* call = job.get();
    std::shared_ptr<Call> shared = job;
    Begin(call, blocking_);
    if (cancellation && !cancellation->RegisterCallback(token, [shared] { Cancel(shared); })) {
      ctx->SetStatus(StatusOf(kCancelled, "the call to " + job->urls->front().text + " was cancelled"));
      Drop(call);
      return done();
    }
    Start(std::move(shared));
  }

 private:
  static constexpr int kFirst = 2;  // the first of the model's inputs

  static std::string NameAt(const std::vector<std::string>& names, size_t i) {
    return names.empty() ? std::to_string(i) : names[i];
  }

  static void CheckType(tf::OpKernelConstruction* ctx, const char* kind, const std::string& name, tf::DataType dtype) {
    OP_REQUIRES(ctx, WireType(dtype) != 0,
                StatusOf(kInvalidArgument, std::string(kind) + " '" + name + "' is " + NameOf(dtype) + ", which has no form on the wire"));
  }

  absl::Status Prepare(tf::OpKernelContext* ctx, Job* job) {
    const tf::Tensor& given = ctx->input(0);
    if (given.NumElements() != 1) return StatusOf(kInvalidArgument, "client: expected one, got " + std::to_string(given.NumElements()));
    if (given.dtype() == tf::DT_VARIANT) {
      const auto* value = given.scalar<tf::Variant>()().get<ClientValue>();
      if (value == nullptr) return StatusOf(kInvalidArgument, "client: expected what RemoteOpsClient gives");
      job->target = value->target;
    } else {
      auto client = given.scalar<tf::ResourceHandle>()().GetResource<Client>();
      if (!client.ok()) return client.status();
      job->target = (*client)->target;
    }
    if (!tf::TensorShapeUtils::IsScalar(ctx->input(1).shape()) || std::isnan(ctx->input(1).scalar<float>()())) {
      return StatusOf(kInvalidArgument, "timeout_s: expected one number of seconds");
    }
    job->timeout_s = ctx->input(1).scalar<float>()();
    if (ctx->deadline()) job->timeout_s = std::min(job->timeout_s, absl::ToDoubleSeconds(*ctx->deadline() - absl::Now()));
    try {
      job->urls = job->target->places.Now();
      Encode(ctx, job);
    } catch (const std::invalid_argument& error) {
      return StatusOf(kInvalidArgument, error.what());
    } catch (const std::length_error& error) {
      return StatusOf(kInvalidArgument, error.what());
    } catch (const std::bad_alloc&) {
      return StatusOf(kResourceExhausted, "no memory for the request to " + job->target->places.text());
    }
    return {};
  }

  void Encode(tf::OpKernelContext* ctx, Job* job) {
    std::vector<graphpipe::Outgoing> tensors;
    job->blobs.reserve(ctx->num_inputs());
    for (int i = kFirst; i < ctx->num_inputs(); ++i) {
      const tf::Tensor& input = ctx->input(i);
      job->inputs.push_back(input);
      graphpipe::Outgoing tensor;
      tensor.type = WireType(input.dtype());
      for (int axis = 0; axis < input.dims(); ++axis) tensor.shape.push_back(input.dim_size(axis));
      if (input.dtype() == tf::DT_STRING) {
        const auto items = input.flat<tf::tstring>();
        job->blobs.push_back(graphpipe::StringBlob(items.data(), static_cast<size_t>(items.size())));
        tensor.data = job->blobs.back();
      } else {
        tensor.data = {static_cast<const char*>(input.data()), static_cast<size_t>(input.NumElements()) * tf::DataTypeSize(input.dtype())};
      }
      tensors.push_back(std::move(tensor));
    }
    job->heads = graphpipe::EncodeRequest(config_, input_names_, tensors, output_names_);
    for (size_t i = 0; i < job->heads.size(); ++i) {
      job->pieces.push_back(job->heads[i]);
      if (i < tensors.size()) job->pieces.push_back(tensors[i].data);
    }
  }

  // The end of a call: its outputs are set where it went well, or where the graph is to see what went wrong.
  absl::Status Finish(tf::OpKernelContext* ctx, const Job& job) {
    if (job.failure.code != kOk) return Report(ctx, StatusOf(job.failure.code, job.failure.message));
    std::vector<tf::Tensor> outputs;
    const absl::Status status = Outputs(ctx, job, &outputs);
    return status.ok() ? Set(ctx, outputs, status) : Report(ctx, status);
  }

  // An error, or outputs that stand for it; a function that was given up wants to hear of it in any case.
  absl::Status Report(tf::OpKernelContext* ctx, const absl::Status& failure) {
    if (raises_ || failure.code() == absl::StatusCode::kCancelled) return failure;
    std::vector<tf::Tensor> outputs(output_types_.size());
    for (size_t i = 0; i < outputs.size(); ++i) {
      tf::TensorShape shape;
      TF_RETURN_IF_ERROR(StandInShape(ctx, output_shapes_[i], &shape));
      TF_RETURN_IF_ERROR(ctx->allocate_temp(output_types_[i], shape, &outputs[i]));
      FillStandIn(&outputs[i]);
    }
    return Set(ctx, outputs, failure);
  }

  static absl::Status Set(tf::OpKernelContext* ctx, const std::vector<tf::Tensor>& outputs, const absl::Status& status) {
    const int count = static_cast<int>(outputs.size());
    for (int i = 0; i < count; ++i) ctx->set_output(i, outputs[i]);
    tf::Tensor *code = nullptr, *message = nullptr;
    TF_RETURN_IF_ERROR(ctx->allocate_output(count, {}, &code));
    TF_RETURN_IF_ERROR(ctx->allocate_output(count + 1, {}, &message));
    code->scalar<int32_t>()() = static_cast<int32_t>(status.code());
    message->scalar<tf::tstring>()() = std::string(status.message());
    return {};
  }

  // The declared shape; an open axis 0 is as long as that of the first input that has one, other open axes are empty.
  // A shape of unknown rank is a scalar, which goes with all.
  static absl::Status StandInShape(tf::OpKernelContext* ctx, const tf::PartialTensorShape& declared, tf::TensorShape* shape) {
    for (int axis = 0; axis < std::max(0, declared.dims()); ++axis) {
      int64_t size = declared.dim_size(axis);
      if (size < 0) size = axis == 0 ? Rows(ctx) : 0;
      TF_RETURN_IF_ERROR(shape->AddDimWithStatus(size));
    }
    return {};
  }

  static int64_t Rows(tf::OpKernelContext* ctx) {
    for (int i = kFirst; i < ctx->num_inputs(); ++i) {
      if (ctx->input(i).dims() > 0) return ctx->input(i).dim_size(0);
    }
    return 0;
  }

  static void FillStandIn(tf::Tensor* out) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    if (out->dtype() == tf::DT_STRING) return;
    if (out->dtype() == tf::DT_DOUBLE) {
      out->flat<double>().setConstant(nan);
    } else if (out->dtype() == tf::DT_FLOAT) {
      out->flat<float>().setConstant(nan);
    } else if (out->dtype() == tf::DT_HALF) {
      out->flat<Eigen::half>().setConstant(static_cast<Eigen::half>(nan));
    } else if (MayBeFloat(out->dtype())) {
      const std::vector<float> nans(static_cast<size_t>(out->NumElements()), nan);
      CastFromFloat({reinterpret_cast<const char*>(nans.data()), 4 * nans.size()}, out);
    } else if (out->TotalBytes()) {
      std::memset(out->data(), 0, out->TotalBytes());
    }
  }

  // Checks the answer against what was asked for, and takes the tensors out of it.
  absl::Status Outputs(tf::OpKernelContext* ctx, const Job& job, std::vector<tf::Tensor>* outputs) {
    const std::string from = " - from " + job.url().text;
    const auto& tensors = job.response.tensors;
    if (tensors.size() != output_types_.size()) {
      return StatusOf(kInternal, "expected " + std::to_string(output_types_.size()) + " outputs, got " +
                                     std::to_string(tensors.size()) + from);
    }
    outputs->resize(tensors.size());
    std::vector<std::string_view> aliased;
    for (size_t i = 0; i < tensors.size(); ++i) {
      tf::TensorShape shape;
      TF_RETURN_IF_ERROR(Check(tensors[i], i, from, &shape));
      if (tensors[i].type == WireType(output_types_[i]) && PaysToAlias(*job.body, tensors[i].data, aliased)) {
        aliased.push_back(tensors[i].data);
        tf::core::RefCountPtr<tf::TensorBuffer> buffer(new BodyBuffer(job.body, tensors[i].data));
        (*outputs)[i] = tf::Tensor(output_types_[i], shape, std::move(buffer));
      } else {
        TF_RETURN_IF_ERROR(Copy(ctx, tensors[i], output_types_[i], shape, &(*outputs)[i]));
      }
    }
    return {};
  }

  absl::Status Check(const graphpipe::Incoming& tensor, size_t i, const std::string& from, tf::TensorShape* shape) {
    const tf::DataType dtype = output_types_[i];
    const bool may_be_cast = tensor.type == kFloat32 && MayBeFloat(dtype);
    const bool fits = (tensor.type == WireType(dtype) || may_be_cast) &&
                      tensor.shape.size() <= tf::TensorShape::MaxDimensions() &&
                      tf::TensorShape::BuildTensorShape(tensor.shape, shape).ok() &&
                      output_shapes_[i].IsCompatibleWith(*shape);
    if (!fits) {
      return StatusOf(kInternal, "the answer breaks the model's own signature: output '" + NameAt(output_names_, i) +
                                     "': expected " + SpecText(dtype, output_shapes_[i]) + ", got " + WireName(tensor.type) +
                                     " " + graphpipe::ShapeText(tensor.shape) + from);
    }
    if (dtype != tf::DT_BOOL) return {};
    for (unsigned char byte : tensor.data) {
      if (byte > 1) {
        return StatusOf(kInternal, "output '" + NameAt(output_names_, i) + "': expected bool, each 0 or 1, got a byte " +
                                       std::to_string(byte) + from);
      }
    }
    return {};
  }

  static absl::Status Copy(tf::OpKernelContext* ctx, const graphpipe::Incoming& tensor, tf::DataType dtype,
                           const tf::TensorShape& shape, tf::Tensor* out) {
    TF_RETURN_IF_ERROR(ctx->allocate_temp(dtype, shape, out));
    if (dtype == tf::DT_STRING) {
      auto items = out->flat<tf::tstring>();
      for (size_t at = 0; at < tensor.strings.size(); ++at) items(at).assign(tensor.strings[at].data(), tensor.strings[at].size());
    } else if (tensor.type != WireType(dtype)) {
      CastFromFloat(tensor.data, out);
    } else if (!tensor.data.empty()) {
      std::memcpy(out->data(), tensor.data.data(), tensor.data.size());
    }
    return {};
  }

  std::vector<std::string> input_names_, output_names_;
  tf::DataTypeVector output_types_;
  std::vector<tf::PartialTensorShape> output_shapes_;
  std::string config_;
  bool raises_ = true, blocking_ = false;
};

absl::Status InferShapes(tf::shape_inference::InferenceContext* c) {
  std::vector<tf::PartialTensorShape> shapes;
  TF_RETURN_IF_ERROR(c->GetAttr("output_shapes", &shapes));
  const int outputs = c->num_outputs() - 2;
  if (static_cast<int>(shapes.size()) != outputs) {
    return StatusOf(kInvalidArgument, "expected as many output_shapes as output_types");
  }
  for (int i = 0; i < outputs; ++i) {
    tf::shape_inference::ShapeHandle shape;
    TF_RETURN_IF_ERROR(c->MakeShapeFromPartialTensorShape(shapes[i], &shape));
    c->set_output(i, shape);
  }
  c->set_output(outputs, c->Scalar());
  c->set_output(outputs + 1, c->Scalar());
  return {};
}

REGISTER_OP("RemoteOpsClient")
    .Output("client: kind")
    .Attr("kind: {resource, variant}")
    .Attr("urls: list(string) = []")
    .Attr("endpoint: string = ''")
    .Attr("header_names: list(string) = []")
    .Attr("header_values: list(string) = []")
    .Attr("ca: string = ''")
    .Attr("cert: string = ''")
    .Attr("key: string = ''")
    .Attr("key_password: string = ''")
    .Attr("verify: bool = true")
    .Attr("attempts: int >= 1 = 3")
    .Attr("retry_base_s: float = 0.05")
    .Attr("retry_max_s: float = 2")
    .Attr("connect_timeout_s: float = 0")
    .Attr("attempt_timeout_s: float = 0")
    .Attr("retry_budget: float = 0.2")
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::ScalarShape)
    .Doc("Who is called: urls, or those that the environment variable endpoint holds, separated by spaces. Values of "
         "headers name environment variables as ${NAME}. Variables are read at each call.");

#define REMOTE_OPS_INFER(name, kind)                          \
  REGISTER_OP(name)                                           \
      .Input("client: " kind)                                 \
      .Input("timeout_s: float")                              \
      .Input("inputs: input_types")                           \
      .Output("outputs: output_types")                        \
      .Output("code: int32")                                  \
      .Output("message: string")                              \
      .Attr("input_types: list(type) >= 0")                   \
      .Attr("output_types: list(type) >= 1")                  \
      .Attr("output_shapes: list(shape)")                     \
      .Attr("input_names: list(string) = []")                 \
      .Attr("output_names: list(string) = []")                \
      .Attr("config: string = ''")                            \
      .Attr("on_error: {'raise', 'status'} = 'raise'")        \
      .Attr("differentiable: list(int) = []")                 \
      .Attr("blocking: bool = false")                         \
      .SetIsDistributedCommunication()                        \
      .SetShapeFn(InferShapes)                                \
      .Doc("One call of the model that `client` stands for. `differentiable` holds the inputs that it can " \
           "differentiate, for who defines the gradient. `blocking` has the thread that runs it make the call: for " \
           "eager mode, where it would wait for another.")

// Without IsDistributedCommunication the executor would turn an Unavailable of ours into an Internal.
REMOTE_OPS_INFER("RemoteOpsInfer", "variant");
REMOTE_OPS_INFER("RemoteOpsInferOrdered", "resource").SetIsStateful();

REGISTER_KERNEL_BUILDER(Name("RemoteOpsClient").Device(tf::DEVICE_CPU), ClientOp);
REGISTER_KERNEL_BUILDER(Name("RemoteOpsInfer").Device(tf::DEVICE_CPU), InferOp);
REGISTER_KERNEL_BUILDER(Name("RemoteOpsInferOrdered").Device(tf::DEVICE_CPU), InferOp);

}  // namespace
}  // namespace remote_ops

// For who loads the library: ends all calls of this process, as on Ctrl-C.
extern "C" void remote_ops_cancel_all() { remote_ops::CancelAll(); }
