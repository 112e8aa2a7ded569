"""Check that every ganserve command in the README's shell blocks has only options that the program knows."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
checked = 0
for line in lines:
    words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), shlex.split(line, comments=True)))
    if not words or not Path(words[0]).name.startswith("ganserve"):
        continue
    program = Path(sys.executable).with_name(Path(words[0]).name)
    command = itertools.takewhile(lambda word: not word.startswith("-"), words[1:])  # and its arguments
    done = subprocess.run(
        [program, *command, "--help"], capture_output=True, text=True, check=False, env={"COLUMNS": "200", "PATH": ""}
    )
    options = [word.split("=")[0] for word in words if word.startswith("-") and word not in ("--help", "&")]
    missing = [option for option in options if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", done.stdout)]
    if done.returncode or missing:
        sys.exit(f"README: {line}\n{done.stderr or f'{program.name} has no {missing}'}")
    checked += 1
print(f"{checked} commands checked")
if not checked:
    sys.exit("the README has no command to check")
