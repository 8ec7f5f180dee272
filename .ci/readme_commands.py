"""Runs every command of the README's `console` blocks, in order, except the `make` ones (run by .ci/run)."""

import os
import re
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
text = (root / "README.md").read_text(encoding="utf-8")
environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
commands = [
    line.removeprefix("$ ")
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ")
]
assert commands, "the README names no command"
for command in commands:
    if command.startswith(("make ", "pip ", "git ")):
        continue
    print(f"$ {command}", flush=True)
    subprocess.run(command, shell=True, check=True, cwd=root, env=environment, timeout=600)
