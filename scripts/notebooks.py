"""Makes the notebooks of examples/ from their sources, runs them, and checks that what they store still holds.

A source is a Python file in cells: `# %%` begins code, `# %% [markdown]` text. The notebook beside it holds the same
cells with their outputs, in nbformat 4. No Jupyter is needed: cells are executed in order in one namespace, and a
cell's last expression is its output, as its type shows itself. Magics are not used.

    python scripts/notebooks.py                      # run all and write examples/*.ipynb
    python scripts/notebooks.py --check NAME ...     # run these here and print their figures as JSON; writes nothing
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
_MARK = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


def cells_of(source: str) -> list[tuple[str, str]]:
    """The cells of a source file: ("code" or "markdown", text)."""
    parts = _MARK.split(source)[1:]
    found = []
    for mark, body in zip(parts[::2], parts[1::2], strict=True):
        body = body.strip("\n")
        if mark:
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.split("\n"))
        found.append(("markdown" if mark else "code", body))
    return found


def execute(cells: list[tuple[str, str]]) -> tuple[list[list[dict[str, Any]]], dict[str, Any]]:
    """Run the code cells in order in one namespace; outputs of every cell, and the namespace."""
    space: dict[str, Any] = {"__name__": "__main__"}
    outputs: list[list[dict[str, Any]]] = []
    count = 0
    for number, (kind, body) in enumerate(cells):
        if kind == "markdown":
            outputs.append([])
            continue
        count += 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            value = _run(body, space, f"cell {number}")
        outputs.append([_stream(printed.getvalue())] if printed.getvalue() else [])
        if value is not None:
            outputs[-1].append(_result(value, count))
    return outputs, space


def _run(body: str, space: dict[str, Any], name: str) -> Any:
    tree = ast.parse(body, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), space)
    return None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), space)


def _stream(text: str) -> dict[str, Any]:
    return {"output_type": "stream", "name": "stdout", "text": _lines(text)}


def _result(value: Any, count: int) -> dict[str, Any]:
    data = {"text/plain": _lines(repr(value))}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = _lines(value._repr_html_())
    return {"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data}


def notebook(cells: list[tuple[str, str]], outputs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The notebook as JSON values, nbformat 4.5."""
    made, count = [], 0
    for number, ((kind, body), found) in enumerate(zip(cells, outputs, strict=True)):
        name = hashlib.sha256(f"{number} {body}".encode()).hexdigest()[:12]
        cell: dict[str, Any] = {"cell_type": kind, "id": name, "metadata": {}, "source": _lines(body)}
        if kind == "code":
            count += 1
            cell |= {"execution_count": count, "outputs": found}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}}, "nbformat": 4,
            "nbformat_minor": 5}  # fmt: skip


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def written(name: str) -> dict[str, Any]:
    """The notebook called `name` as it is stored."""
    found: dict[str, Any] = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf8"))
    return found


def stored_figures(made: dict[str, Any]) -> dict[str, float]:
    """What the last code cell of a notebook shows: names to numbers."""
    last = [cell for cell in made["cells"] if cell["cell_type"] == "code"][-1]
    found: dict[str, float] = ast.literal_eval("".join(last["outputs"][-1]["data"]["text/plain"]))
    return found


def names() -> list[str]:
    """All notebooks, by their sources."""
    return sorted(path.stem for path in EXAMPLES.glob("*.py"))


def _write(name: str) -> None:
    cells = cells_of((EXAMPLES / f"{name}.py").read_text(encoding="utf8"))
    made = notebook(cells, execute(cells)[0])
    text = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
    (EXAMPLES / f"{name}.ipynb").write_text(text, encoding="utf8")
    print(f"{name}: {stored_figures(made)}")


def _figures(name: str) -> dict[str, float]:
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in written(name)["cells"]]
    found: dict[str, float] = execute(cells)[1]["figures"]
    return found


def main() -> None:
    """Write all notebooks, each in a process and a folder of its own; or check one here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", metavar="NAME", nargs="+", help="run these here and print their figures")
    parser.add_argument("--write", metavar="NAME", help="run this one in the present folder and write it")
    asked = parser.parse_args()
    if asked.check or asked.write:
        print(json.dumps({name: _figures(name) for name in asked.check})) if asked.check else _write(asked.write)
        return
    paths = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        for name in names():
            command = [sys.executable, str(Path(__file__).resolve()), "--write", name]
            subprocess.run(command, cwd=folder, check=True, env={**os.environ, "PYTHONPATH": paths})


if __name__ == "__main__":
    main()
