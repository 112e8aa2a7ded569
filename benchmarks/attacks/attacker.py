"""Runs an attack in a separate process."""

import os
import select
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from benchmarks.attacks.line import Cut, Line, Over, RuleBroken
from benchmarks.attacks.patterns import ATTACKS, Attack

NICENESS = 5  # a real attacker has its own machine: here it must not take the server's CPU time
RETURN_S = 0.1  # after being cut off, before the next connection
MOST_CONNECTIONS = 20_000


@dataclass
class Outcome:
    """The outcome of an attack."""

    connections: int = 0
    refused: int = 0
    cuts: list[tuple[float, str]] = field(default_factory=list)  # age of the connection in seconds, error
    sent_bytes: int = 0
    rules_broken: dict[str, int] = field(default_factory=dict)  # how often the server broke each rule


def run(name: str, address: str, connections: int, seconds: float, told: Connection) -> None:
    """Attack for `seconds` in this process; send the outcome."""
    os.nice(NICENESS)
    told.send(attack(name, address, connections, seconds))


def attack(name: str, address: str, connections: int, seconds: float) -> Outcome:
    """Attack for `seconds`; return the outcome."""
    chosen, outcome, end = ATTACKS[name], Outcome(), time.monotonic() + seconds
    if chosen.passive:
        _stand_by(chosen, address, connections, end, outcome)
    else:
        arguments = (chosen, address, connections, end, outcome)
        threads = [threading.Thread(target=_attack, args=arguments, daemon=True) for _ in range(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return outcome


def _attack(chosen: Attack, address: str, connections: int, end: float, outcome: Outcome) -> None:
    """Attack with one connection after the other."""
    while time.monotonic() < end and outcome.connections < MOST_CONNECTIONS:
        began, line = time.monotonic(), None
        try:
            line = Line(address, end, of=connections, **chosen.line)
            outcome.connections += 1
            with line:
                chosen.run(line)
        except Over:
            pass
        except Cut as cut:
            outcome.cuts.append((time.monotonic() - began, str(cut)))
            time.sleep(RETURN_S)
        except RuleBroken as broken:
            outcome.rules_broken[str(broken)] = outcome.rules_broken.get(str(broken), 0) + 1
        except OSError:
            outcome.refused += 1
            time.sleep(RETURN_S)
        if line is not None:
            outcome.sent_bytes += line.sent


def _stand_by(chosen: Attack, address: str, connections: int, end: float, outcome: Outcome) -> None:
    """Open the connections, and replace each one that is cut off."""
    poll, lines = select.poll(), dict[int, tuple[float, Line]]()
    while time.monotonic() < end:
        while len(lines) < connections and outcome.connections < MOST_CONNECTIONS:
            try:
                line = _stand(chosen, address, end)
            except (OSError, Cut):
                outcome.refused += 1
                break
            except Over:
                break
            outcome.connections += 1
            lines[line.socket.fileno()] = (time.monotonic(), line)
            poll.register(line.socket, select.POLLIN | select.POLLRDHUP)
        for descriptor, seen in poll.poll(100):
            began, line = lines[descriptor]
            try:
                line.on_event(seen)
            except Cut as cut:
                outcome.cuts.append((time.monotonic() - began, str(cut)))
                poll.unregister(descriptor)
                lines.pop(descriptor)[1].socket.close()
    for _, line in lines.values():
        outcome.sent_bytes += line.sent
        line.socket.close()


def _stand(chosen: Attack, address: str, end: float) -> Line:
    """Open a connection, and send the attack's data on it."""
    line = Line(address, end, **chosen.line)
    try:
        chosen.run(line)
        line.flush()
    except BaseException:
        line.socket.close()
        raise
    return line
