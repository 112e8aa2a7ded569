"""Check that every ganserve command in the shell blocks of the documentation has only options that it knows."""

import functools
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path


@functools.cache
def help_of(program: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    environment = {"COLUMNS": "200", "PATH": ""}
    return subprocess.run([program, *command, "--help"], capture_output=True, text=True, check=False, env=environment)


pages = [*sorted(Path().glob("*.md")), *sorted(Path("docs").rglob("*.md"))]
lines = []
for page in pages:
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(), re.DOTALL)
    whole = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += [(page, line) for line in whole if re.match(r"(?:[A-Z_]+=\S+ )*(?:\S*/)?ganserve", line)]
checked = 0
for page, line in lines:
    # What follows a pipe is another program's.
    words = list(
        itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), shlex.split(line.split(" | ")[0], comments=True))
    )
    if not words or not Path(words[0]).name.startswith("ganserve"):
        continue
    program = Path(sys.executable).with_name(Path(words[0]).name)
    done = help_of(program)
    command, shown = [], done.stdout
    for word in words[1:]:
        # Options of the program may stand before its command.
        if not word.startswith("-") and re.search(rf"^│ {re.escape(word)} ", done.stdout, re.MULTILINE):
            command.append(word)
            done = help_of(program, *command)
            shown += done.stdout
    options = [word.split("=")[0] for word in words if word.startswith("-") and word not in ("--help", "&")]
    missing = [option for option in options if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", shown)]
    missing += [word for word in words[1:2] if not command and not word.startswith("-")]
    if done.returncode or missing:
        sys.exit(f"{page}: {line}\n{done.stderr or f'{program.name} has no {missing}'}")
    checked += 1
print(f"{checked} commands checked")
if not checked:
    sys.exit("there is no command to check")
