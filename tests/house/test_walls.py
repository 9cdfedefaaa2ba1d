"""The walls of the house, read from the source: who may import whom, who may hook, who may write a live weight."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from editors.methods import EDITORS
from memloc.methods import LOCALIZERS, MEASURES
from memloc.registry import Registry

ROOT = Path(__file__).parents[2]

FLOORS: tuple[str, ...] = (
    "memloc.errors memloc.experts memloc.lazy memloc.offloading memloc.progress memloc.slices memloc.statistics",
    "memloc memloc.flags memloc.hooks memloc.loading memloc.processes memloc.provenance memloc.registry "
    "memloc.sites memloc.store memloc.terminal",
    "memloc.architectures memloc.measurement memloc.methods memloc.passages memloc.scores",
    "memloc.batches memloc.call_order memloc.formats memloc.results",
    "memloc.paths_given memloc.plots memloc.proof",
    "memloc.engines memloc.report",
    "memloc.notebook memloc.view",
    "memloc.command memloc.costs memloc.lab memloc.moments memloc.objectives memloc.parts memloc.reading "
    "memloc.rewinding memloc.running",
    "memloc.ablations memloc.gradients memloc.measures memloc.moment_judgement memloc.moment_pass memloc.patching "
    "memloc.shared_work",
    "memloc.grids memloc.localizers memloc.truth",
    "memloc.checks memloc.verbs",
    "memloc.cli",
    "editors editors.base editors.deltas editors.masks editors.methods editors.packing editors.rounding editors.trial",
    "editors.hook_form editors.patch",
    "editors.binding editors.disk",
    "editors.edit_file",
    "editors.edit",
    "editors.checks editors.control editors.facts editors.shipping editors.trade_offs",
    "editors.tuning",
    "editors.pruning editors.rewriters editors.verification",
    "editors.demo editors.pruners editors.verbs",
    "editors.cli",
)
"""Lowest first. A package stands for all its files. A file imports from floors below its own, or its own package."""

HOOKS = {"memloc/hooks.py"}
WRITERS = {
    "editors/edit.py", "editors/tuning/descent.py", "editors/tuning/hypernet.py", "editors/pruning/trained_masks.py",
    "editors/verification/quantised.py", "memloc/architectures.py", "memloc/truth/planted.py",
    "memloc/truth/injection.py", "memloc/lab",
}  # fmt: skip
"""Who may write a weight: the edit, which alone writes into a model it was given; the one line it writes through; and
those that write into models of their own (descent, a network of its own, masks trained on a copy, rounding, planting
and injecting into a copy, the lab into what it trains)."""

HANDLES = {"parameter", "weight", "get_parameter", "parameters", "named_parameters", "state_dict"}
"""Method calls that hand out a model's own tensors."""


def sources() -> dict[str, Path]:
    """Dotted name to file, of both packages."""
    found = {}
    for path in sorted([*ROOT.glob("memloc/**/*.py"), *ROOT.glob("editors/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf8"))


def imports(module: ast.AST, known: set[str], *, top_only: bool = False) -> Iterator[str]:
    """Modules of the house that are imported: in functions too, but not for type checking only."""
    for node in ast.iter_child_nodes(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else str(node.module)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from ()
        elif not (top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, known, top_only=top_only)


def floor(name: str) -> tuple[int, str]:
    """Floor of a module, and the entry that says so."""
    for level, names in enumerate(FLOORS):
        for entry in names.split():
            if name == entry or (entry.count(".") and name.startswith(entry + ".")):
                return level, entry
    raise AssertionError(f"{name} stands on no floor; give it one in tests/house/test_walls.py")


def below(name: str, other: str) -> bool:
    (mine, package), (theirs, entry) = floor(name), floor(other)
    return theirs < mine or entry == package


def test_a_file_imports_only_from_floors_below_its_own():
    known = sources()
    wrong = [
        f"{name} imports {other}"
        for name, path in known.items()
        for other in imports(tree(path), set(known))
        if not below(name, other)
    ]
    assert not wrong


def test_memloc_has_never_heard_of_editing():
    known = sources()
    assert not [
        name
        for name, path in known.items()
        if name.split(".")[0] == "memloc"
        and any(other.split(".")[0] == "editors" for other in imports(tree(path), set(known)))
    ]


def test_imports_make_no_circle():
    known = sources()
    graph = {name: set(imports(tree(path), set(known), top_only=True)) - {name} for name, path in known.items()}
    # A package's __init__ may offer what its files hold; importing the bare package name is no circle then.
    graph = {name: {other for other in others if not name.startswith(other + ".")} for name, others in graph.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_methods_do_not_import_each_other():
    known = sources()
    methods = {table.target(name)[0] for table in (LOCALIZERS, MEASURES, EDITORS) for name in table}
    assert not [
        f"{name} imports {other}"
        for name in methods & set(known)
        for other in set(imports(tree(known[name]), set(known))) & methods
        if other.rpartition(".")[0] == name.rpartition(".")[0]
    ]


def test_the_rule_of_floors_can_fail():
    known = {"memloc.view", "memloc.localizers.random", "memloc.errors"}
    found = set(imports(ast.parse("def f():\n    from memloc.localizers.random import Random"), known))
    assert found == {"memloc.localizers.random"}
    assert not below("memloc.view", "memloc.localizers.random") and below("memloc.localizers.random", "memloc.view")
    assert not below("memloc.errors", "memloc.progress")
    with pytest.raises(AssertionError, match=r"memloc\.utils stands on no floor"):
        floor("memloc.utils")


def calls(module: ast.AST) -> Iterator[tuple[ast.Attribute, ast.Call]]:
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.func, node


def hook_calls(module: ast.AST) -> list[str]:
    return [func.attr for func, _ in calls(module) if func.attr.startswith("register_") and "hook" in func.attr]


def test_hooks_are_registered_in_one_file_only():
    found = {str(path.relative_to(ROOT)): hook_calls(tree(path)) for path in sources().values()}
    assert {name for name, hooks in found.items() if hooks} == HOOKS


def live_names(module: ast.Module) -> set[str]:
    """Names given to a model's own tensors, by assignment or in a loop."""
    found = set()
    for node in ast.walk(module):
        given = node.value if isinstance(node, ast.Assign) else getattr(node, "iter", None)
        if given is not None and any(func.attr in HANDLES for func, _ in calls(given)) and asks_first(given):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return found


def asks_first(expression: ast.AST) -> bool:
    """Whether an expression is what a handle gave, or a part or list of it, and not something computed from it."""
    if isinstance(expression, ast.Call):
        func = expression.func
        if isinstance(func, ast.Attribute):
            return func.attr in HANDLES or (
                func.attr in ("items", "values", "view", "detach") and asks_first(func.value)
            )
        return ast.unparse(func) in ("list", "dict", "sorted", "zip", "enumerate") and any(
            map(asks_first, expression.args)
        )
    return isinstance(expression, ast.Attribute | ast.Subscript) and asks_first(expression.value)


def root(expression: ast.AST) -> ast.AST:
    """What an attribute or a subscript is taken of, in the end."""
    while isinstance(expression, ast.Attribute | ast.Subscript):
        expression = expression.value
    return expression


def writes(module: ast.Module) -> list[str]:
    """Lines that could write a model's weights: an in-place method, a store or += on what a model handed out, any
    `.data` in a file that asks a model for its tensors, writing through a `Place`, loading a state."""
    live, found = live_names(module), []
    asks = any(func.attr in HANDLES for func, _ in calls(module))

    def owned(expression: ast.AST) -> bool:
        inner = root(expression)
        return (isinstance(inner, ast.Name) and inner.id in live) or asks_first(inner)

    for node in ast.walk(module):
        bad = False
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, owner = node.func.attr, node.func.value
            in_place = name.endswith("_") and not name.startswith("_") and name != "requires_grad_"
            placed = name == "write" and "place" in ast.unparse(owner)
            bad = (in_place and owned(owner)) or placed or name == "load_state_dict"
        elif isinstance(node, ast.Attribute):
            bad = node.attr == "data" and asks
        elif isinstance(node, ast.AugAssign):
            bad = owned(node.target)
        elif isinstance(node, ast.Assign):
            bad = any(isinstance(target, ast.Subscript) and owned(target) for target in node.targets)
        if bad:
            found.append(ast.unparse(node))
    return found


def may_write(path: Path) -> bool:
    name = path.relative_to(ROOT)
    return any(str(name) == entry or Path(entry) in name.parents for entry in WRITERS)


@pytest.mark.parametrize("package", ["memloc", "editors"])
def test_live_weights_are_written_by_the_writers_only(package):
    """Read from the source; `hands_off` in memloc/checks.py looks at what really happened."""
    paths = [path for name, path in sources().items() if name.split(".")[0] == package and not may_write(path)]
    assert {str(path.relative_to(ROOT)): writes(tree(path)) for path in paths if writes(tree(path))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "view.parameter(site).copy_(new)",
        "view.weight(site).add_(1)",
        "w = view.weight(site)\nw += 1",
        "w = view.weight(site)\nw[0] = 1",
        "view.parameter(site).data = new",
        "for name, p in model.named_parameters():\n    p.zero_()",
        "w = view.parameter(site).view(-1)\nw[index] = part",
        "for p in model.parameters():\n    p.data.mul_(2)",
        "view.place(site).write(stored, new)",
        "model.load_state_dict(new)",
    ],
)
def test_the_rule_of_writing_can_fail(line):
    assert writes(ast.parse(line))


def test_the_rule_of_writing_lets_looking_pass():
    looking = "w = view.weight(site)\nw = w + 1\ntotal = w.sum()\ntotal += 1\nsums[0].addmm_(w, w)\nfile.write(text)"
    assert not writes(ast.parse(looking))


def method_classes(module: ast.Module) -> list[str]:
    """Dataclasses with keyword settings that are called with a view: localizers, measures and editors."""
    found = []
    for node in module.body:
        if isinstance(node, ast.ClassDef) and any(
            "kw_only=True" in ast.unparse(entry) for entry in node.decorator_list
        ):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == "__call__" and part.args.args[1:2]:
                    found += [node.name] if part.args.args[1].arg == "view" else []
    return found


FOLDERS = {
    "memloc.localizers": LOCALIZERS,
    "memloc.measures": MEASURES,
    "editors.rewriters": EDITORS,
    "editors.pruners": EDITORS,
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_method_file_has_its_line(folder):
    targets = {FOLDERS[folder].target(name) for name in FOLDERS[folder]}
    written = {
        (name, method)
        for name, path in sources().items()
        if name.startswith(folder + ".")
        for method in method_classes(tree(path))
    }
    assert written <= targets


@pytest.mark.parametrize("table", [LOCALIZERS, MEASURES, EDITORS], ids=lambda table: table.noun)
def test_every_line_has_its_file_and_says_what_it_does(table: Registry):
    known = sources()
    for name in table:
        module, method = table.target(name)
        assert module in known, f"{name} points at {module}, which does not exist"
        assert method in method_classes(tree(known[module])), f"{module} has no method {method}"
        assert module.rpartition(".")[2] == name.replace("-", "_"), f"{name} should live in a file of its name"
        assert len(table.summary(name)) > 20, f"{name} does not say what it does"


def test_every_localizer_file_is_a_method():
    files = {name for name in sources() if name.startswith("memloc.localizers.")}
    assert files == {LOCALIZERS.target(name)[0] for name in LOCALIZERS}


def test_the_tables_are_read_without_torch():
    code = (
        "import sys\n"
        "from editors.methods import EDITORS\nfrom memloc.methods import LOCALIZERS, MEASURES\n"
        "for table in (LOCALIZERS, MEASURES):\n    [table.summary(name) for name in table]\n"
        "list(EDITORS)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("argument", ["--help", "list"])
def test_the_command_answers_without_torch(argument):
    code = (
        "import sys\nfrom editors.cli import main\n"
        f"try:\n    main([{argument!r}])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def state(module: ast.Module) -> list[str]:
    """What a module does, or keeps in a changeable way, by being imported."""
    found = []
    for node in module.body:
        speaks = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        if speaks or isinstance(node, ast.For | ast.While | ast.With | ast.Try | ast.AugAssign | ast.Delete):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [ast.unparse(target) for target in targets]
            mutable = isinstance(node.value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)
            kept = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in (
                "list", "dict", "set", "defaultdict", "Counter", "contextvars.ContextVar", "ContextVar",
            )  # fmt: skip
            constant = all(name.isupper() or name == "__all__" for name in names)
            if (mutable and not constant) or kept:
                found.append(ast.unparse(node))
    constants = {
        target.id
        for node in module.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id.isupper()
    }
    for node in ast.walk(module):
        if isinstance(node, ast.Global):
            found.append(ast.unparse(node))
        stored = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
        if stored and ast.unparse(node.value) in constants:
            found.append(ast.unparse(node))
    changing = ("append", "add", "update", "setdefault", "pop", "clear", "extend", "insert", "remove")
    found += [
        ast.unparse(call) for func, call in calls(module)
        if func.attr in changing and ast.unparse(func.value) in constants
    ]  # fmt: skip
    return found


def test_no_module_keeps_state_or_does_work_when_imported():
    found = {name: state(tree(path)) for name, path in sources().items()}
    # Who listens to progress belongs to the caller's context, not to the module.
    listener = found.pop("memloc.progress")
    assert len(listener) == 1 and "ContextVar" in listener[0]
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    ["seen = []", "print(1)", "def f():\n    global x", "TABLE = {}\ndef f():\n    TABLE[1] = 2", "cache = dict()"],
)
def test_the_rule_of_state_can_fail(line):
    assert state(ast.parse(line))
