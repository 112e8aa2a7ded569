"""Run examples/augment.py against a server: check_augmenting.py DATA_ROOT. The generated images must help."""

import json
import re
import subprocess
import sys
from pathlib import Path

program = Path(sys.executable).with_name("ganserve-server")
command = [program, "--address=127.0.0.1:0", "--metrics-address=off", "--log-format=json"]
with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
    try:
        lines = (json.loads(line) for line in server.stderr)
        address = next(line["address"] for line in lines if line["event"] == "serving")
        example = [sys.executable, "examples/augment.py", "--address", address, "--data-root", sys.argv[1]]
        printed = subprocess.run(example, stdout=subprocess.PIPE, text=True, check=True).stdout
    finally:
        server.terminate()
        server.communicate()
print(printed, end="")
alone, augmented = map(float, re.findall(r"0\.\d{4}", printed))
if augmented < alone + 0.1:
    sys.exit("the generated images do not help")
