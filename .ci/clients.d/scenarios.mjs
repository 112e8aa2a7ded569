// What the JavaScript clients share; scenarios.py says what each value is for, and how a program is called.
import { readFileSync } from "node:fs";

export const MODEL = "cdcgan-mnist";
export const SEED = 1;
export const COUNT = 16;
export const IMAGE_BYTES = 28 * 28;
export const STREAM_COUNT = 2000;
export const ENDLESS_COUNT = 5_000_000;
export const LIMIT_MS = 86_400_000;
const SCENARIO_MS = 150_000;
export const OPEN_STREAMS = 1000;
export const AGE_MS = 5_000;
export const QUIET_MS = 12_000;
export const ACCEPTED_METADATA = "XZ".repeat(6 << 10);
export const REFUSED_METADATA = "XZ".repeat(10 << 10);
export const REFUSALS = ["RESOURCE_EXHAUSTED", "UNKNOWN", "INTERNAL"];
export const LABELS = Array(256).fill(7); // compressible

export const ONE = { model: MODEL, count: 1, seed: SEED };
export const SOME = { model: MODEL, count: COUNT, seed: SEED };
export const STREAM = { model: MODEL, count: STREAM_COUNT, seed: SEED };
export const ENDLESS = { model: MODEL, count: ENDLESS_COUNT, seed: SEED };
export const NO_MODEL = { model: "no-such-model" };
export const WRONG = { model: MODEL, count: 1, truncation: 3 };

export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export function check(right, wrong) {
  if (!right) throw new Error(wrong);
}

export function checkOne(response) {
  check(response.seeds.length === 1 && response.seeds[0] === SEED, `seeds are ${response.seeds}`);
  check(response.pixels.length === IMAGE_BYTES, `${response.pixels.length} bytes of pixels`);
}

// Of GenerateEach: `error` is what came in place of a response.
export function checkAnswer(response, error) {
  check(!error, `${error?.reason}: ${error?.message}`);
  checkOne(response);
}

export function checkPixels(pixels, target) {
  check(Buffer.compare(Buffer.from(pixels), target.pixels) === 0, "the pixels are not those that the SDK gets");
}

export function checkRefused(code, text) {
  check(REFUSALS.includes(code), `20 KB of metadata: ${code}: ${text}`);
}

// Without a timer, Node exits before the end of a scenario when its connection is silent.
export const within = (ms) => new Promise((_, reject) => setTimeout(() => reject(new Error(`not done after ${ms} ms`)), ms));

// Runs the scenarios that the command line names.
export async function run(scenarios) {
  const [address, caFile, pixelsFile, ...names] = process.argv.slice(2);
  const target = { address, ca: caFile && readFileSync(caFile), pixels: readFileSync(pixelsFile) };
  let failed = false;
  for (const name of names) {
    try {
      await Promise.race([scenarios[name](target), within(SCENARIO_MS)]);
      console.log(`ok ${name}`);
    } catch (error) {
      failed = true;
      console.log(`failed ${name}: ${String(error.stack ?? error).replace(/\s+/g, " ")}`);
    }
  }
  process.exit(failed ? 1 : 0); // even if a client still waits
}
