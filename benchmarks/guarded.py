"""Measures the cost of TLS and tokens: images a second in plain text, with TLS, and with TLS and a token, alternating.

    L1, L2, L3   the loads of serving.py
    connections  a new connection for every call: handshakes a second

    python benchmarks/guarded.py [--model mlp-mnist] [--rounds 5] [--seconds 2]

Needs h2load (Debian: nghttp2-client) and trustme (the extra "dev"). The certificate has a key on the curve P-256.
"""

import argparse
import re
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import trustme
from running import Running, h2load, metrics, serving

from ganserve_server.auth import token_file

LOADS = {"L1": (1, 1, 1), "L2": (8, 8, 1), "L3": (8, 1, 64)}  # connections, calls in flight on each, images a call
CONNECTIONS = 300


def calls_per_s(running: Running, model: str, way: dict[str, str], *flags: str, count: int) -> float:
    header = [f"--header=authorization: Bearer {way['token']}"] if "token" in way else []
    told, _ = h2load(running.address, model, *flags, *header, count=count, scheme=way["scheme"]).communicate()
    found = re.search(r"finished in [\d.]+m?s, ([\d.]+) req/s", told)
    if found is None:
        sys.exit(told)
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mlp-mnist")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as servers:
        chain, key, file = (Path(scratch, name) for name in ("tls.crt", "tls.key", "tokens.toml"))
        issued = trustme.CA().issue_cert("127.0.0.1")
        chain.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        token, digest = token_file.new_token()
        token_file.add(file, {"name": "benchmark", "sha256": digest, "roles": ["generate"]})
        tls = (f"--tls-certificate-file={chain}", f"--tls-key-file={key}")
        ways: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
            "plain text": ({"scheme": "http"}, ()),
            "TLS": ({"scheme": "https"}, tls),
            "TLS and token": ({"scheme": "https", "token": token}, (*tls, f"--tokens-file={file}")),
        }
        running = {name: servers.enter_context(serving(*flags)) for name, (_, flags) in ways.items()}
        rates: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.rounds):
            for load, (connections, in_flight, count) in LOADS.items():
                flags = (f"--clients={connections}", f"--max-concurrent-streams={in_flight}", "--threads=1")
                for name, (way, _) in ways.items():
                    timed = (*flags, f"--duration={options.seconds}", "--warm-up-time=1")
                    rate = calls_per_s(running[name], options.model, way, *timed, count=count)
                    rates.setdefault((load, name), []).append(rate * count)
            for name, (way, _) in ways.items():
                flags = (f"--clients={CONNECTIONS}", f"--requests={CONNECTIONS}", "--threads=1")
                rate = calls_per_s(running[name], options.model, way, *flags, count=1)
                rates.setdefault(("connections", name), []).append(rate)
        for load in (*LOADS, "connections"):
            plain = statistics.median(rates[load, "plain text"])
            for name in ways:
                rate = statistics.median(rates[load, name])
                ratios = [a / b for a, b in zip(rates[load, name], rates[load, "plain text"], strict=True)]
                unit = "calls" if load == "connections" else "images"
                print(f"{load:<12}{name:<15}{rate:10,.0f} {unit}/s  {statistics.median(ratios):.2f} of {plain:,.0f}")
        for name, one in running.items():
            refused = {
                key: count for key, count in metrics(one).items() if key.startswith("ganserve_rejections") and count
            }
            if refused:
                sys.exit(f"{name}: {refused}")


if __name__ == "__main__":
    main()
