"""Names of the packages that an extra of pyproject.toml asks for and no lock does that is given after it.

python infra/images/extra.py dev infra/images/gpu.lock
"""

import re
import sys
import tomllib
from pathlib import Path

extra, *locks = sys.argv[1:]


def name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
kept = {name(line) for lock in locks for line in Path(lock).read_text().splitlines()}
for requirement in project["optional-dependencies"][extra]:
    if name(requirement) not in kept:
        print(name(requirement))
