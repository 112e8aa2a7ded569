// @grpc/grpc-js, with messages that @grpc/proto-loader makes of the .proto files in the folders of PROTO_PATH.
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import * as given from "./scenarios.mjs";

const { check } = given;
const options = { includeDirs: process.env.PROTO_PATH.split(":"), keepCase: true, oneofs: true };
const { GenerationService } = grpc.loadPackageDefinition(loader.loadSync("ganserve/v1/generation.proto", options)).ganserve.v1;
const rpc = loader.loadSync(["google/rpc/status.proto", "google/rpc/error_details.proto"], options);
const GZIP = 2; // as grpc-js numbers it

// Calls `use` with a client that has a connection of its own.
async function connected(target, use, settings = {}) {
  const credentials = target.ca ? grpc.credentials.createSsl(target.ca) : grpc.credentials.createInsecure();
  const client = new GenerationService(target.address, credentials, { "grpc.use_local_subchannel_pool": 1, ...settings });
  try {
    await use(client);
  } finally {
    client.close();
  }
}

const limit = (ms = given.LIMIT_MS) => ({ deadline: Date.now() + ms });

const generate = (client, request, metadata = new grpc.Metadata()) =>
  new Promise((resolve, reject) =>
    client.GenerateImages(request, metadata, limit(), (error, response) => (error ? reject(error) : resolve(response))),
  );

async function one(client, large) {
  const metadata = new grpc.Metadata();
  if (large) metadata.set("x-large", large);
  given.checkOne(await generate(client, given.ONE, metadata));
}

async function failure(promise) {
  try {
    await promise;
  } catch (error) {
    return { code: grpc.status[error.code] ?? String(error), details: error.details, metadata: error.metadata };
  }
  throw new Error("there is no error");
}

// A stream of requests that is written by hand.
class Each {
  constructor(client, ms) {
    this.call = client.GenerateEach(limit(ms));
    this.answers = this.call[Symbol.asyncIterator]();
    this.status = new Promise((resolve) => this.call.once("status", (status) => resolve(grpc.status[status.code])));
  }

  async exchange(request = given.ONE) {
    this.call.write({ generate: request });
    const { value } = await this.answers.next();
    given.checkAnswer(value.response, value.error);
  }

  async end() {
    this.call.end();
    check((await this.answers.next()).done, "there is an answer too many");
    check((await this.status) === "OK", `the stream ends with ${await this.status}`);
  }
}

await given.run({
  unary: (target) => connected(target, one),

  pixels: (target) =>
    connected(target, async (client) => given.checkPixels((await generate(client, given.SOME)).pixels, target)),

  each: (target) =>
    connected(target, async (client) => {
      const call = client.GenerateEach(limit());
      for (const request of [given.ONE, given.NO_MODEL, given.ONE]) call.write({ generate: request });
      call.end();
      const outcomes = [];
      for await (const answer of call) outcomes.push(answer.outcome);
      check(outcomes.join() === "response,error,response", `the answers are ${outcomes}`);
      const stream = new Each(client);
      for (let i = 0; i < 3; i++) await stream.exchange();
      await stream.end();
    }),

  stream: (target) =>
    connected(target, async (client) => {
      let count = 0;
      for await (const answer of client.StreamImages({ generate: given.STREAM }, limit())) count += answer.chunk.count;
      check(count === given.STREAM_COUNT, `${count} images`);
    }),

  deadline: (target) =>
    connected(target, async (client) => {
      await one(client);
      for (const ms of [1, 300]) {
        const { code } = await failure(new Each(client, ms).answers.next());
        check(code === "DEADLINE_EXCEEDED", `after ${ms} ms the status is ${code}`);
      }
      await one(client);
    }),

  cancel: (target) =>
    connected(target, async (client) => {
      const call = client.StreamImages({ generate: given.ENDLESS });
      const { code } = await failure(
        (async () => {
          for await (const _ of call) call.cancel();
        })(),
      );
      check(code === "CANCELLED", `the status is ${code}`);
      await one(client);
    }),

  gzip: (target) =>
    connected(
      target,
      async (client) => {
        const response = await generate(client, { model: given.MODEL, seed: given.SEED, labels: given.LABELS });
        check(response.labels.join() === given.LABELS.join(), "the labels are others");
      },
      { "grpc.default_compression_algorithm": GZIP },
    ),

  metadata: (target) => connected(target, (client) => one(client, given.ACCEPTED_METADATA)),

  oversized: (target) =>
    connected(target, async (client) => {
      const other = new Each(client);
      await other.exchange();
      for (let i = 0; i < 3; i++) {
        const { code, details } = await failure(one(client, given.REFUSED_METADATA));
        given.checkRefused(code, details);
        await other.exchange();
        await one(client);
      }
      await other.end();
    }),

  details: (target) =>
    connected(target, async (client) => {
      const { code, metadata } = await failure(generate(client, given.WRONG));
      check(code === "INVALID_ARGUMENT", `the status is ${code}`);
      const status = rpc["google.rpc.Status"].deserialize(metadata.get("grpc-status-details-bin")[0]);
      const found = Object.fromEntries(
        status.details.map((any) => {
          const name = any.type_url.split("/").pop();
          return [name, rpc[name].deserialize(any.value)];
        }),
      );
      const fields = found["google.rpc.BadRequest"].field_violations.map((violation) => violation.field);
      check(fields.join() === "truncation", `BadRequest names ${fields}`);
      const { reason, domain } = found["google.rpc.ErrorInfo"];
      check(reason === "INVALID" && domain === "ganserve", `ErrorInfo is ${reason} of ${domain}`);
    }),

  keepalive: (target) =>
    connected(
      target,
      async (client) => {
        const stream = new Each(client);
        await stream.exchange();
        await given.sleep(given.QUIET_MS);
        await stream.exchange();
        await stream.end();
      },
      { "grpc.keepalive_time_ms": 1000, "grpc.keepalive_timeout_ms": 30000 },
    ),

  streams: (target) =>
    connected(target, async (client) => {
      await one(client); // to prepare a thousand takes longer than a server waits for the first bytes of a connection
      const streams = Array.from({ length: given.OPEN_STREAMS }, () => new Each(client));
      await Promise.all(streams.map((stream) => stream.exchange()));
      await Promise.all(streams.map((stream) => stream.end()));
    }),

  age: (target) =>
    connected(target, async (client) => {
      const end = Date.now() + given.AGE_MS;
      const repeat = async () => {
        while (Date.now() < end) await one(client);
      };
      await Promise.all([repeat(), repeat(), repeat(), repeat()]);
    }),
});
