"""docs/slurm.md says what can be set."""

import re

SET_BY_OTHERS = {"PWD", "PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "TMPDIR", "BASH_REMATCH"}


def test_the_table_names_every_variable_that_the_scripts_read_and_its_default(repo_root):
    text = (repo_root / "docs/slurm.md").read_text().partition("## What to set")[2].partition("sbatch passes on")[0]
    rows = [row.split("|")[1:3] for row in text.splitlines() if row.startswith("| `")]
    table = {name: default for names, default in rows for name in re.findall("`([A-Z_]+)`", names)}

    scripts = "".join(path.read_text() for path in sorted((repo_root / "slurm").glob("*.sh")))
    code = re.sub(r"^\s*#.*$", "", scripts, flags=re.MULTILINE)
    read = {name for name in re.findall(r"\$\{?([A-Z][A-Z_]+)\b", code) if not name.startswith("SLURM")}
    assert set(table) == read - SET_BY_OTHERS

    defaults = re.findall(r"\$\{([A-Z][A-Z_]+):-([\w./-]+)\}", code)
    assert len(defaults) >= 5
    for name, default in defaults:
        if not name.startswith("SLURM"):
            assert re.search(rf"\b{re.escape(default)}\b", table[name]), f"{name} is {default}, not {table[name]}"
