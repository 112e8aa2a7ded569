// grpc++, of Debian's libgrpc++-dev. How it is called, and what the values are for: scenarios.py.
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "ganserve/v1/generation.grpc.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace {

using namespace ganserve::v1;
using std::chrono::milliseconds;
using std::chrono::system_clock;

const char kModel[] = "cdcgan-mnist";
constexpr unsigned kSeed = 1, kStreamCount = 2000, kEndlessCount = 5000000, kOpenStreams = 1000;
constexpr size_t kImageBytes = 28 * 28;
constexpr milliseconds kLimit{86400000}, kAge{5000}, kQuiet{12000};

std::string repeated(size_t pairs) {
  std::string text;
  while (pairs-- > 0) text += "XZ";
  return text;
}
const std::string kAcceptedMetadata = repeated(6 << 10), kRefusedMetadata = repeated(10 << 10);

struct Target {
  std::string address, ca_file, pixels;
};

void check(bool right, const std::string& wrong) {
  if (!right) throw std::runtime_error(wrong);
}

std::string text(const grpc::Status& status) {
  return "status " + std::to_string(status.error_code()) + ": " + status.error_message();
}

void check_code(const grpc::Status& status, grpc::StatusCode want) {
  check(status.error_code() == want, text(status) + " and not " + std::to_string(want));
}

std::string read_file(const std::string& name) {
  std::ifstream file(name, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

GenerateImagesRequest request(unsigned count, const std::string& model = kModel) {
  GenerateImagesRequest made;
  made.set_model(model);
  made.set_count(count);
  made.set_seed(kSeed);
  return made;
}

void check_one(const GenerateImagesResponse& response) {
  check(response.seeds_size() == 1 && response.seeds(0) == kSeed && response.pixels().size() == kImageBytes,
        "the answer is not the image asked for");
}

class Client {
 public:
  explicit Client(const Target& target, grpc::ChannelArguments arguments = {}) {
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    auto credentials = grpc::InsecureChannelCredentials();
    if (!target.ca_file.empty()) credentials = grpc::SslCredentials({read_file(target.ca_file), "", ""});
    stub = GenerationService::NewStub(grpc::CreateCustomChannel(target.address, credentials, arguments));
  }

  grpc::Status generate(const GenerateImagesRequest& asked, GenerateImagesResponse* response,
                        const std::string& metadata = "", bool gzip = false) {
    grpc::ClientContext context;
    context.set_deadline(system_clock::now() + kLimit);
    if (!metadata.empty()) context.AddMetadata("x-large", metadata);
    if (gzip) context.set_compression_algorithm(GRPC_COMPRESS_GZIP);
    return stub->GenerateImages(&context, asked, response);
  }

  void one(const std::string& metadata = "") {
    GenerateImagesResponse response;
    check_code(generate(request(1), &response, metadata), grpc::OK);
    check_one(response);
  }

  std::unique_ptr<GenerationService::Stub> stub;
};

// A stream of requests that is written by hand.
class Each {
 public:
  explicit Each(Client& client, milliseconds timeout = kLimit) {
    context_.set_deadline(system_clock::now() + timeout);
    stream_ = client.stub->GenerateEach(&context_);
  }

  void ask(const std::string& model = kModel) {
    GenerateEachRequest asked;
    *asked.mutable_generate() = request(1, model);
    stream_->Write(asked);
  }

  bool read(GenerateEachResponse* answer) { return stream_->Read(answer); }

  void answer() {
    GenerateEachResponse answer;
    if (!read(&answer)) throw std::runtime_error("the stream ended: " + text(stream_->Finish()));
    check(!answer.has_error(), answer.error().message());
    check_one(answer.response());
  }

  void half_close() { stream_->WritesDone(); }

  grpc::Status finish() {
    GenerateEachResponse answer;
    check(!stream_->Read(&answer), "there is an answer too many");
    return stream_->Finish();
  }

  void end() {
    half_close();
    check_code(finish(), grpc::OK);
  }

 private:
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<GenerateEachRequest, GenerateEachResponse>> stream_;
};

void unary(const Target& target) { Client(target).one(); }

void pixels(const Target& target) {
  GenerateImagesResponse response;
  check_code(Client(target).generate(request(16), &response), grpc::OK);
  check(response.pixels() == target.pixels, "the pixels are not those that the SDK gets");
}

void each(const Target& target) {
  Client client(target);
  Each first(client);
  for (const char* model : {kModel, "no-such-model", kModel}) first.ask(model);
  first.half_close();
  for (bool wrong : {false, true, false}) {
    GenerateEachResponse answer;
    check(first.read(&answer) && answer.has_error() == wrong, "an answer is not the one to its request");
  }
  check_code(first.finish(), grpc::OK);
  Each second(client);
  for (int i = 0; i < 3; ++i) {
    second.ask();
    second.answer();
  }
  second.end();
}

void stream(const Target& target) {
  Client client(target);
  grpc::ClientContext context;
  context.set_deadline(system_clock::now() + kLimit);
  StreamImagesRequest asked;
  *asked.mutable_generate() = request(kStreamCount);
  auto reader = client.stub->StreamImages(&context, asked);
  StreamImagesResponse answer;
  unsigned count = 0;
  while (reader->Read(&answer)) count += answer.chunk().count();
  check_code(reader->Finish(), grpc::OK);
  check(count == kStreamCount, std::to_string(count) + " images");
}

void deadline(const Target& target) {
  Client client(target);
  client.one();
  for (milliseconds timeout : {milliseconds(1), milliseconds(300)})
    check_code(Each(client, timeout).finish(), grpc::DEADLINE_EXCEEDED);
  client.one();
}

void cancel(const Target& target) {
  Client client(target);
  grpc::ClientContext context;
  StreamImagesRequest asked;
  *asked.mutable_generate() = request(kEndlessCount);
  auto reader = client.stub->StreamImages(&context, asked);
  StreamImagesResponse answer;
  check(reader->Read(&answer), "there is no image");
  context.TryCancel();
  while (reader->Read(&answer)) {
  }
  check_code(reader->Finish(), grpc::CANCELLED);
  client.one();
}

void gzip(const Target& target) {
  GenerateImagesRequest asked = request(256);
  for (int i = 0; i < 256; ++i) asked.add_labels(7);
  GenerateImagesResponse response;
  check_code(Client(target).generate(asked, &response, "", true), grpc::OK);
  check(response.labels_size() == 256, "the labels are others");
}

void metadata(const Target& target) { Client(target).one(kAcceptedMetadata); }

void oversized(const Target& target) {
  Client client(target);
  Each other(client);
  for (int i = 0; i < 3; ++i) {
    GenerateImagesResponse response;
    const grpc::Status status = client.generate(request(1), &response, kRefusedMetadata);
    const auto code = status.error_code();
    check(code == grpc::RESOURCE_EXHAUSTED || code == grpc::UNKNOWN || code == grpc::INTERNAL,
          "20 KB of metadata: " + text(status));
    other.ask();
    other.answer();
    client.one();
  }
  other.end();
}

void details(const Target& target) {
  GenerateImagesRequest wrong = request(1);
  wrong.set_truncation(3);
  GenerateImagesResponse response;
  const grpc::Status status = Client(target).generate(wrong, &response);
  check_code(status, grpc::INVALID_ARGUMENT);
  google::rpc::Status decoded;
  google::rpc::BadRequest bad;
  google::rpc::ErrorInfo info;
  check(decoded.ParseFromString(status.error_details()), "the details are no google.rpc.Status");
  for (const auto& detail : decoded.details()) detail.UnpackTo(&bad) || detail.UnpackTo(&info);
  check(bad.field_violations_size() == 1 && bad.field_violations(0).field() == "truncation", bad.DebugString());
  check(info.reason() == "INVALID" && info.domain() == "ganserve", info.DebugString());
}

void keepalive(const Target& target) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 1000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 30000);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  Client client(target, arguments);
  Each stream(client);
  stream.ask();
  stream.answer();
  std::this_thread::sleep_for(kQuiet);
  stream.ask();
  stream.answer();
  stream.end();
}

void streams(const Target& target) {
  Client client(target);
  std::vector<std::unique_ptr<Each>> every;
  for (unsigned i = 0; i < kOpenStreams; ++i) every.push_back(std::make_unique<Each>(client));
  for (auto& stream : every) stream->ask();
  for (auto& stream : every) stream->answer();
  for (auto& stream : every) stream->half_close();
  for (auto& stream : every) check_code(stream->finish(), grpc::OK);
}

void age(const Target& target) {
  Client client(target);
  const auto end = system_clock::now() + kAge;
  while (system_clock::now() < end) client.one();
}

const std::map<std::string, std::function<void(const Target&)>> kScenarios = {
    {"unary", unary},         {"pixels", pixels},   {"each", each},           {"stream", stream},
    {"deadline", deadline},   {"cancel", cancel},   {"gzip", gzip},           {"metadata", metadata},
    {"oversized", oversized}, {"details", details}, {"keepalive", keepalive}, {"streams", streams},
    {"age", age},
};

}  // namespace

int main(int count, char** words) {
  const Target target{words[1], words[2], read_file(words[3])};
  int code = 0;
  for (int i = 4; i < count; ++i) {
    try {
      kScenarios.at(words[i])(target);
      std::cout << "ok " << words[i] << std::endl;
    } catch (const std::exception& error) {
      std::string wrong = error.what();
      for (char& character : wrong)
        if (character == '\n') character = ' ';
      std::cout << "failed " << words[i] << ": " << wrong << std::endl;
      code = 1;
    }
  }
  return code;
}
