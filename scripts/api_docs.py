"""Writes the pages of the Python interface, from the docstrings: `python scripts/api_docs.py out/docs`.

Needs pdoc (`pip install 'memloc[docs]'`). Any warning of pdoc fails the run: a name that does not resolve, a docstring
it cannot read.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

PACKAGES = ("memloc", "editors")


def main(folder: str) -> None:
    """Write the pages under `folder`; `index.html` is where to begin."""
    import pdoc

    modules = []
    for package in PACKAGES:
        module = importlib.import_module(package)
        # pdoc walks into packages by itself, but not into one with `__all__`.
        modules += [package, *(f"{package}.{found.name}" for found in pkgutil.iter_modules(module.__path__))]
        for name in module.__all__:  # pdoc reads a module's namespace and does not ask its `__getattr__`
            setattr(module, name, getattr(module, name))
    pdoc.render.configure(docformat="google", footer_text="memloc", search=True, show_source=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # An inherited field's type is named in the file of the class above, where pdoc does not look.
        warnings.filterwarnings("ignore", r"Error parsing type annotation .*\.__init__")
        pdoc.pdoc(*modules, output_directory=Path(folder))
    print(f"{sum(1 for _ in Path(folder).rglob('*.html'))} pages; begin at {Path(folder) / 'index.html'}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "out/docs")
