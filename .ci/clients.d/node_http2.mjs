// Node's own HTTP/2, without a gRPC library: what only an HTTP/2 peer can say, such as a small table for header compression.
import http2 from "node:http2";
import * as given from "./scenarios.mjs";

const { check } = given;

// A message of GenerateImagesRequest: model (1), count (3), seed (4).
const generate = (count) => {
  const model = Buffer.from(given.MODEL);
  return Buffer.concat([Buffer.from([0x0a, model.length]), model, Buffer.from([0x18, count, 0x20, given.SEED])]);
};

// As gRPC frames a message.
const framed = (message) => {
  const prefix = Buffer.alloc(5);
  prefix.writeUInt32BE(message.length, 1);
  return Buffer.concat([prefix, message]);
};

// A GenerateEachRequest, whose one field (1) is a GenerateImagesRequest.
const each = (count) => {
  const inner = generate(count);
  return framed(Buffer.concat([Buffer.from([0x0a, inner.length]), inner]));
};

async function connected(target, use, settings = {}) {
  const url = `${target.ca ? "https" : "http"}://${target.address}`;
  const session = http2.connect(url, { ca: target.ca || undefined, settings });
  let failed = "";
  session.on("error", (error) => (failed = `: ${error}`));
  const ended = new Promise((_, reject) => session.on("close", () => reject(new Error(`the connection ended${failed}`))));
  ended.catch(() => {}); // later, nobody waits for it
  try {
    await Promise.race([use(session), ended]);
  } finally {
    session.destroy();
  }
}

// A call; `answer` is what it becomes: the HTTP status, gRPC's status, and the body.
function open(session, method, headers = {}) {
  const call = session.request({
    ":method": "POST",
    ":path": `/ganserve.v1.GenerationService/${method}`,
    "content-type": "application/grpc",
    te: "trailers",
    ...headers,
  });
  const chunks = [];
  const answer = new Promise((resolve, reject) => {
    const found = {};
    call.on("response", (fields) => Object.assign(found, { http: fields[":status"], grpc: fields["grpc-status"] }));
    call.on("trailers", (fields) => (found.grpc = fields["grpc-status"]));
    call.on("data", (chunk) => chunks.push(chunk));
    call.on("error", reject);
    call.on("close", () => resolve({ ...found, body: Buffer.concat(chunks), reset: call.rstCode }));
  });
  answer.catch(() => {}); // it is awaited later
  return { call, answer, received: () => chunks.reduce((sum, chunk) => sum + chunk.length, 0) };
}

async function one(session, target, headers) {
  const { call, answer } = open(session, "GenerateImages", headers);
  call.end(framed(generate(given.COUNT)));
  const { http, grpc, body } = await answer;
  check(http === 200 && grpc === "0", `the status is ${grpc} (HTTP ${http})`);
  check(body.includes(target.pixels), "the pixels are not those that the SDK gets");
}

const withTable = (size) => (target) =>
  connected(
    target,
    async (session) => {
      for (let i = 0; i < 3; i++) await Promise.race([one(session, target), given.within(20_000)]); // Node says nothing
    },
    { headerTableSize: size },
  );

await given.run({
  unary: (target) => connected(target, (session) => one(session, target)),
  pixels: (target) => connected(target, (session) => one(session, target)),
  table_0: withTable(0),
  table_1024: withTable(1024),

  each: (target) =>
    connected(target, async (session) => {
      const { call, answer } = open(session, "GenerateEach");
      for (let i = 0; i < 3; i++) call.write(each(1));
      call.end();
      const { http, grpc, body } = await answer;
      check(http === 200 && grpc === "0", `the status is ${grpc} (HTTP ${http})`);
      check(body.length > 3 * given.IMAGE_BYTES, `the answers have ${body.length} bytes`);
    }),

  // Of a call whose request never ends: the server's own deadline.
  deadline: (target) =>
    connected(target, async (session) => {
      const { answer } = open(session, "GenerateEach", { "grpc-timeout": "300m" });
      const { http, grpc } = await answer;
      check(http === 200 && grpc === "4", `the status is ${grpc} (HTTP ${http})`);
      await one(session, target);
    }),

  metadata: (target) => connected(target, (session) => one(session, target, { "x-large": given.ACCEPTED_METADATA })),

  oversized: (target) =>
    connected(target, async (session) => {
      for (let i = 0; i < 3; i++) {
        const { call, answer } = open(session, "GenerateImages", { "x-large": given.REFUSED_METADATA });
        call.end(framed(generate(1)));
        // A reset, too, is an error of this call alone.
        const { http, grpc } = await answer.catch(() => ({ http: 431 }));
        check(http === 431 || http === 400 || grpc === "8", `20 KB of metadata: ${grpc} (HTTP ${http})`);
        await one(session, target);
      }
    }),

  keepalive: (target) =>
    connected(target, async (session) => {
      await new Promise((resolve) => session.once("connect", resolve));
      const end = Date.now() + given.QUIET_MS;
      while (Date.now() < end) {
        await new Promise((resolve, reject) => session.ping((error) => (error ? reject(error) : resolve())));
        await given.sleep(1000);
      }
      await one(session, target);
    }),

  streams: (target) =>
    connected(target, async (session) => {
      // Those beyond the peer's limit would wait.
      await new Promise((resolve) => session.once("remoteSettings", resolve));
      const calls = Array.from({ length: given.OPEN_STREAMS }, () => open(session, "GenerateEach"));
      for (const { call } of calls) call.write(each(1));
      while (!calls.every((call) => call.received() > given.IMAGE_BYTES)) await given.sleep(10);
      for (const { call } of calls) call.end();
      for (const { answer } of calls) check((await answer).grpc === "0", `the status is ${(await answer).grpc}`);
    }),
});
