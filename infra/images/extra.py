"""Names of the packages that an extra of pyproject.toml asks for: python infra/images/extra.py dev"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for requirement in project["optional-dependencies"][sys.argv[1]]:
    print(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
