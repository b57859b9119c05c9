"""Every top-level file: no unused import or parameter, only allowed packages, every flag read (style page, habits 11 and 12).

README: its table of sizes is what tests/bench.py prints.
"""
import ast
import sys
from pathlib import Path

import bench
import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(ROOT.glob("*.py"))
PACKAGES = {"torch", "numpy", "PIL", "tqdm"} | sys.stdlib_module_names
MODELS = {"clustr", "secvit", "linglo", "stvit"}
each_file = pytest.mark.parametrize("tree", [pytest.param(ast.parse(path.read_text()), id=path.stem) for path in FILES])


def imports(tree):
    """(name bound in the file, package it comes from) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name.split(".")[0], alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, node.module.split(".")[0]) for alias in node.names)


def names_read(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def autograd_signatures(tree):
    """forward and backward of autograd functions: torch fixes what they take."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    functions = [node for node in classes if any("autograd" in ast.unparse(base) for base in node.bases)]
    return {method for node in functions for method in node.body if getattr(method, "name", "") in ("forward", "backward")}


def unused_parameters(tree):
    """A leading underscore says that the caller fixes the signature."""
    exempt = autograd_signatures(tree)
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) and function not in exempt:
            a = function.args
            parameters = {p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if p} - {"self", "cls", "ctx"}
            unused = parameters - set().union(*map(names_read, function.body))
            yield from (f"{function.name}({p})" for p in sorted(unused) if not p.startswith("_"))


def flags(tree):
    """What argparse calls each declared argument: `dest`, else the first long name, else the first name."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            dest = [k.value.value for k in call.keywords if k.arg == "dest"]
            names = [argument.value for argument in call.args]
            yield (dest + [n for n in names if n.startswith("--")] + names)[0].lstrip("-").replace("-", "_")


def test_files_are_found():
    assert MODELS <= {path.stem for path in FILES}


@each_file
def test_imports_are_used(tree):
    assert {bound for bound, _ in imports(tree)} - names_read(tree) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_are_allowed(path):
    own = set() if path.stem in MODELS else {other.stem for other in FILES}     # a model file can be copied alone
    assert {package for _, package in imports(ast.parse(path.read_text()))} - PACKAGES - own == set()


@each_file
def test_parameters_are_used(tree):
    assert list(unused_parameters(tree)) == []


@each_file
def test_flags_are_read(tree):
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "args"}
    assert set(flags(tree)) - read == set()


def test_readme_has_the_generated_table(capsys):
    bench.table()
    generated = capsys.readouterr().out.strip()
    assert generated in (ROOT / "README.md").read_text(), "replace README's table by what `python tests/bench.py --table` prints"
    assert "not explained" not in generated


def test_the_checks_find_what_they_look_for():
    tree = ast.parse("import os, torch.nn as nn\nfrom yaml import load\ndef f(a, _c, *, b): return a\n"
                     "class P(torch.autograd.Function):\n    def forward(ctx, x): pass\n"
                     "p.add_argument('-o', '--out-dir')\np.add_argument('--seen')\nargs.seen")
    assert {bound for bound, _ in imports(tree)} - names_read(tree) == {"os", "nn", "load"}
    assert {package for _, package in imports(tree)} - PACKAGES == {"yaml"}
    assert list(unused_parameters(tree)) == ["f(b)"]
    assert list(flags(tree)) == ["out_dir", "seen"]
