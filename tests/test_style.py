"""Every top-level file: no unused import or parameter, only allowed packages, every flag read.

README: its table of sizes is what tests/bench.py prints. Line length and the like: ruff.
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
TREES = {path.stem: ast.parse(path.read_text()) for path in FILES}
each_file = pytest.mark.parametrize("stem", TREES)


def imports(tree):
    """(name bound in the file, package it comes from) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package = alias.name.split(".")[0]
                yield alias.asname or package, package
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, node.module.split(".")[0]


def names_read(node):
    names = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load):
            names.add(n.id)
    return names


def autograd_methods(tree):
    """forward and backward of autograd functions: torch fixes what they take."""
    methods = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and "autograd" in ast.unparse(node.bases):
            for method in node.body:
                if getattr(method, "name", "") in ("forward", "backward"):
                    methods.add(method)
    return methods


def parameters(function):
    a = function.args
    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs]
    arguments += [argument for argument in (a.vararg, a.kwarg) if argument]
    return {argument.arg for argument in arguments} - {"self", "cls"}


def unused_parameters(tree):
    """Parameters that nobody reads; a leading underscore: the caller fixes the signature."""
    exempt = autograd_methods(tree)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function not in exempt:
            unused = parameters(function) - names_read(ast.Module(function.body, []))
            for name in sorted(unused):
                if not name.startswith("_"):
                    yield f"{function.name}({name})"


def typed_flags(tree):
    """What argparse calls each argument of `add_argument("--long-name")`."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
            names = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            long = [name for name in names if name.startswith("--")]
            if names:
                yield (long + names)[0].lstrip("-").replace("-", "_")


def table_flags(tree):
    """The keys of the tables FLAGS and RUN_FLAGS."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets) in ("FLAGS", "RUN_FLAGS"):
            for key in node.value.keys:
                if key is not None:  # None: **OTHER_TABLE
                    yield key.value


def flags_read(tree):
    """NAME of every args.NAME, typed.NAME and anything.args.NAME."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            holder = ast.unparse(node.value).split(".")[-1]
            if holder in ("args", "typed"):
                names.add(node.attr)
    return names


def test_files_are_found():
    assert MODELS | {"train_imagenet", "train_dense"} <= TREES.keys()


@each_file
def test_imports_are_used(stem):
    bound = {name for name, _ in imports(TREES[stem])}
    assert bound - names_read(TREES[stem]) == set()


@each_file
def test_imports_are_allowed(stem):
    """A model file can be copied alone; the scripts may import the other files."""
    ours = set() if stem in MODELS else TREES.keys()
    assert {package for _, package in imports(TREES[stem])} - PACKAGES - ours == set()


@each_file
def test_parameters_are_used(stem):
    assert list(unused_parameters(TREES[stem])) == []


@each_file
def test_flags_are_read(stem):
    """By the file itself or by one that it imports."""
    imported = {package for _, package in imports(TREES[stem])} & TREES.keys()
    read = set()
    for name in {stem} | imported:
        read |= flags_read(TREES[name])
    flags = {*typed_flags(TREES[stem]), *table_flags(TREES[stem])}
    assert flags - read == set()


def test_the_scripts_have_tables_of_flags():
    assert {"model", "epochs", "eval"} <= set(table_flags(TREES["train_imagenet"]))
    assert "task" in set(table_flags(TREES["train_dense"]))


def test_readme_has_the_generated_table(capsys):
    bench.table()
    generated, _, reasons = capsys.readouterr().out.partition("\n\n")
    hint = "replace README's table by what `python tests/bench.py --table` prints"
    assert generated in (ROOT / "README.md").read_text(), hint
    assert "not explained" not in reasons


# --------------------------------------------------------------- the checks find what they look for
WRONG = ast.parse("""
import os, torch.nn as nn
from yaml import load

def f(a, _c, *, b):
    return a

class P(torch.autograd.Function):
    def forward(ctx, x):
        pass

p.add_argument("-o", "--out-dir")
p.add_argument("--seen")
p.add_argument(f"--{name}")
args.seen
typed.epochs
self.args.model
other.hidden
RUN_FLAGS = {"seed": 1}
FLAGS = {"model": 1, **RUN_FLAGS, "epochs": 2}
""")


def test_unused_imports_are_found():
    assert {name for name, _ in imports(WRONG)} - names_read(WRONG) == {"os", "nn", "load"}


def test_other_packages_are_found():
    assert {package for _, package in imports(WRONG)} - PACKAGES == {"yaml"}


def test_unused_parameters_are_found():
    assert list(unused_parameters(WRONG)) == ["f(b)"]


def test_flags_are_found():
    assert list(typed_flags(WRONG)) == ["out_dir", "seen"]
    assert set(table_flags(WRONG)) == {"seed", "model", "epochs"}


def test_reads_of_flags_are_found():
    assert flags_read(WRONG) == {"seen", "epochs", "model"}
