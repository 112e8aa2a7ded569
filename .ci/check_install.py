"""Check the installed SDK, with the libraries that its wheel pulls today, against the server program of argument 1."""

import json
import subprocess
import sys
import time
from pathlib import Path

started = time.perf_counter()
import ganserve  # noqa: E402

import_s = time.perf_counter() - started
print(f"import ganserve took {import_s:.2f} s")
# A generous bound: the machine may be busy. The goal is 0.5 s.
if import_s > 2:
    sys.exit("import ganserve is slow")
for program, extra in (("ganserve-server", "server"), ("ganserve-trainer", "trainer")):
    arguments = [Path(sys.executable).with_name(program), "--help"]
    without = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if without.returncode and (f"ganserve[{extra}]" not in without.stderr or "Traceback" in without.stderr):
        sys.exit(f"{program} without its extra says: {without.stderr}")
done = subprocess.run(
    [Path(sys.executable).with_name("ganserve"), "playground"], capture_output=True, text=True, check=False
)
if done.returncode == 0 or "ganserve[playground]" not in done.stderr or "Traceback" in done.stderr:
    sys.exit(f"ganserve playground without its extra says: {done.stderr}")
command = [sys.argv[1], "--address=127.0.0.1:0", "--metrics-address=off", "--log-format=json"]
with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
    try:
        lines = (json.loads(line) for line in server.stderr)
        address = next(line["address"] for line in lines if line["event"] == "serving")
        with ganserve.Client(address) as client:
            for model in client.models():
                print(client.generate(model.name, count=300, seed=1))
            client.contact_sheet("cdcgan-mnist")
    finally:
        server.terminate()
if server.wait() != 0:
    sys.exit("the server did not end with status 0")
