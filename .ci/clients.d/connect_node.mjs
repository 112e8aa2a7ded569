// @connectrpc/connect-node with gRPC's protocol, and messages of the descriptors in the file DESCRIPTORS.
import { readFileSync } from "node:fs";
import { create, createFileRegistry, fromBinary } from "@bufbuild/protobuf";
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { compressionGzip, createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";
import * as given from "./scenarios.mjs";

const { check } = given;
const registry = createFileRegistry(fromBinary(FileDescriptorSetSchema, readFileSync(process.env.DESCRIPTORS)));
const GenerationService = registry.getService("ganserve.v1.GenerationService");
const GenerateImagesRequest = registry.getMessage("ganserve.v1.GenerateImagesRequest");
const limit = (ms = given.LIMIT_MS) => ({ timeoutMs: ms });

// A request as the library has it: `seed` is one of a oneof.
const request = ({ seed, ...fields }) =>
  create(GenerateImagesRequest, seed === undefined ? fields : { ...fields, source: { case: "seed", value: seed } });

// Calls `use` with a client that has a connection of its own.
async function connected(target, use, settings = {}, pings = {}) {
  const url = `${target.ca ? "https" : "http"}://${target.address}`;
  const sessionManager = new Http2SessionManager(url, pings, target.ca ? { ca: target.ca } : undefined);
  try {
    await use(createClient(GenerationService, createGrpcTransport({ baseUrl: url, sessionManager, ...settings })));
  } finally {
    sessionManager.abort();
  }
}

async function one(client, large) {
  const headers = large ? { "x-large": large } : {};
  given.checkOne(await client.generateImages(request(given.ONE), { ...limit(), headers }));
}

async function failure(promise) {
  try {
    await promise;
  } catch (error) {
    const found = ConnectError.from(error);
    return { code: Code[found.code].replace(/(?<=[a-z])(?=[A-Z])/g, "_").toUpperCase(), error: found };
  }
  throw new Error("there is no error");
}

// A stream of requests that is written by hand.
class Each {
  #waiting = [];
  #ended = false;
  #wake = () => {};

  constructor(client, ms) {
    this.answers = client.generateEach(this.#requests(), limit(ms))[Symbol.asyncIterator]();
  }

  async *#requests() {
    while (true) {
      while (this.#waiting.length) yield { generate: this.#waiting.shift() };
      if (this.#ended) return;
      await new Promise((resolve) => (this.#wake = resolve));
    }
  }

  async exchange() {
    this.#waiting.push(request(given.ONE));
    this.#wake();
    const { outcome } = (await this.answers.next()).value;
    given.checkAnswer(outcome.value, outcome.case === "error" && outcome.value);
  }

  // Without an error at the end the status is OK.
  async end() {
    this.#ended = true;
    this.#wake();
    check((await this.answers.next()).done, "there is an answer too many");
  }
}

await given.run({
  unary: (target) => connected(target, one),

  pixels: (target) =>
    connected(target, async (client) => {
      const response = await client.generateImages(request(given.SOME), limit());
      given.checkPixels(response.pixels, target);
    }),

  each: (target) =>
    connected(target, async (client) => {
      const requests = async function* () {
        for (const fields of [given.ONE, given.NO_MODEL, given.ONE]) yield { generate: request(fields) };
      };
      const outcomes = [];
      for await (const answer of client.generateEach(requests(), limit())) outcomes.push(answer.outcome.case);
      check(outcomes.join() === "response,error,response", `the answers are ${outcomes}`);
      const stream = new Each(client);
      for (let i = 0; i < 3; i++) await stream.exchange();
      await stream.end();
    }),

  stream: (target) =>
    connected(target, async (client) => {
      let count = 0;
      for await (const answer of client.streamImages({ generate: request(given.STREAM) }, limit())) count += answer.chunk.count;
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
      const cancelling = new AbortController();
      const call = client.streamImages({ generate: request(given.ENDLESS) }, { signal: cancelling.signal });
      const { code } = await failure(
        (async () => {
          for await (const _ of call) cancelling.abort();
        })(),
      );
      check(code === "CANCELED", `the status is ${code}`);
      await one(client);
    }),

  gzip: (target) =>
    connected(
      target,
      async (client) => {
        const fields = { model: given.MODEL, seed: given.SEED, labels: given.LABELS };
        const response = await client.generateImages(request(fields), limit());
        check(response.labels.join() === given.LABELS.join(), "the labels are others");
      },
      { sendCompression: compressionGzip, compressMinBytes: 0 },
    ),

  metadata: (target) => connected(target, (client) => one(client, given.ACCEPTED_METADATA)),

  oversized: (target) =>
    connected(target, async (client) => {
      const other = new Each(client);
      await other.exchange();
      for (let i = 0; i < 3; i++) {
        const { code, error } = await failure(one(client, given.REFUSED_METADATA));
        given.checkRefused(code, error.message);
        await other.exchange();
        await one(client);
      }
      await other.end();
    }),

  details: (target) =>
    connected(target, async (client) => {
      const { code, error } = await failure(client.generateImages(request(given.WRONG), limit()));
      check(code === "INVALID_ARGUMENT", `the status is ${code}`);
      const [bad] = error.findDetails(registry.getMessage("google.rpc.BadRequest"));
      const fields = bad?.fieldViolations.map((violation) => violation.field) ?? [];
      check(fields.join() === "truncation", `BadRequest names ${fields}`);
      const [info] = error.findDetails(registry.getMessage("google.rpc.ErrorInfo"));
      check(info?.reason === "INVALID" && info?.domain === "ganserve", `ErrorInfo is ${info?.reason} of ${info?.domain}`);
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
      {},
      { pingIntervalMs: 1000, pingTimeoutMs: 30000 },
    ),

  streams: (target) =>
    connected(target, async (client) => {
      await one(client); // to prepare a thousand takes longer than a server waits for the first bytes of a connection
      const streams = Array.from({ length: given.OPEN_STREAMS }, () => new Each(client));
      await Promise.all(streams.map((stream) => stream.exchange()));
      await Promise.all(streams.map((stream) => stream.end()));
    }),
});
