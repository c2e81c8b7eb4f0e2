"""The architecture as a test: which folder may import which, and what is never used at all."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "sgl").rglob("*.py"))

WHOLE_ENGINE = {
    "kernels",
    "models",
    "execution",
    "scheduling",
    "constrained",
    "protocol",
    "messages",
    "processes",
    "sampling_params",
    "tokenizer",
    "text_stream",
    "metrics",
    "config",
    "hardware",
    "model_files",
}
COMMANDS = {"config", "flags", "hardware", "help", "model_files"}

# folder or module of sgl -> what of sgl it may import, besides itself and errors
MAY_IMPORT = {
    "errors": set(),
    "kernels": set(),
    "models": {"kernels", "gguf_metadata"},
    "execution": {"models", "kernels", "messages", "sampling_params"},
    "constrained": {"sampling_params", "processes"},
    "scheduling": {"messages", "sampling_params", "constrained"},
    "protocol": {"messages", "sampling_params", "constrained"},
    "lang": {"sampling_params", "engine", "protocol"},
    "runtime": {"lang", "config", "processes", "tokenizer", "utils"},
    "utils": {"engine"},
    "actors": WHOLE_ENGINE,
    "messages": {"sampling_params"},
    "sampling_params": set(),
    "processes": set(),
    "tokenizer": {"gguf_vocabulary"},
    "gguf_vocabulary": {"gguf_metadata"},
    "gguf_metadata": set(),  # one reader for the tokenizer and the weights: both are in the file
    "text_stream": {"tokenizer"},
    "metrics": set(),
    "flags": set(),
    "compatibility": {"flags"},
    "config": {"flags", "compatibility"},
    "help": {"flags"},
    "hardware": {"config"},
    "model_files": {"config"},
    "launch": {"actors", "messages", "config", "hardware", "model_files"},
    "engine": WHOLE_ENGINE | {"actors", "launch"},
    "cli": COMMANDS | {"launch"},
    "launch_server": {"cli"},
    "doctor": COMMANDS,
    "chat": {"flags"},
    "bench": {"flags", "model_files", "protocol", "tokenizer"},  # speaks HTTP, knows no engine
    "bench_serving": {"cli"},
    "offline": COMMANDS | {"bench", "engine", "models", "tokenizer"},
    "bench_latency": {"cli"},
    "bench_offline_throughput": {"cli"},
}

TORCH_FREE = ["protocol", "scheduling", "constrained", "lang", "actors/scheduler.py"]
TORCH_FREE += ["bench", "bench_serving.py", "bench_latency.py", "bench_offline_throughput.py"]
TORCH_FREE += ["offline"]
TORCH_FREE += ["config.py", "cli.py", "launch.py", "launch_server.py", "chat.py", "doctor.py"]

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_BUILTINS = {"eval", "exec"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("yaml", "load")}
UNSANDBOXED = ("jinja2", "Environment")  # as a type it is fine, made it runs any template
PICKLING_COLLECTIVES = {
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}


def owner(path: Path) -> str:
    """The folder of sgl a file is in, or its own name at the top."""
    return path.relative_to(ROOT / "sgl").parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, lazily or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module or ''}.{alias.name}"


def broken_imports(path: Path, source: str) -> list[str]:
    mine = owner(path)
    allowed = MAY_IMPORT[mine] | {mine, "errors"}
    return [
        f"{path.relative_to(ROOT)}:{line}: {mine} may not import {name}"
        for line, name in imported_modules(ast.parse(source))
        if name.startswith("sgl.") and name.split(".")[1] not in allowed
    ]


def forbidden_uses(source: str) -> list[str]:
    found = []
    tree = ast.parse(source)
    for line, name in imported_modules(tree):
        head, _, last = name.rpartition(".")
        if FORBIDDEN_MODULES & set(name.split(".")) or (head, last) in FORBIDDEN_ATTRIBUTES:
            found.append(f"line {line}: import of {name}")
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_BUILTINS:
                found.append(f"line {node.lineno}: {name}()")
            case ast.Call(func=ast.Attribute(value=ast.Name(id=head), attr=name)) if (
                head,
                name,
            ) == UNSANDBOXED:
                found.append(f"line {node.lineno}: {head}.{name}()")
            case ast.Attribute(value=ast.Name(id=head), attr=name) if (
                head,
                name,
            ) in FORBIDDEN_ATTRIBUTES:
                found.append(f"line {node.lineno}: {head}.{name}")
            case ast.Attribute(attr=name) | ast.Name(id=name) if name in PICKLING_COLLECTIVES:
                found.append(f"line {node.lineno}: {name}")
    return found


def modules_of(part: str) -> list[str]:
    """Dotted names of a module or of all modules of a folder; none where it does not exist yet."""
    path = ROOT / "sgl" / part
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.exists() else []
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def test_every_import_line_follows_the_table():
    broken = [
        line
        for path in SOURCES
        if owner(path) != "__init__"
        for line in broken_imports(path, path.read_text(encoding="utf-8"))
    ]
    assert broken == []


def test_every_module_has_its_row_in_the_table():
    unlisted = {owner(path) for path in SOURCES} - set(MAY_IMPORT) - {"__init__"}
    assert unlisted == set(), "say in MAY_IMPORT what they may import"


@pytest.mark.parametrize(
    "line", ["import sgl.actors.ring", "from sgl.config import X", "from sgl import launch"]
)
def test_a_wrong_import_is_noticed_even_inside_a_function(line):
    source = f"def lazily():\n    {line}\n"
    assert len(broken_imports(ROOT / "sgl" / "kernels" / "rms_norm.py", source)) == 1


@pytest.mark.parametrize("part", TORCH_FREE)
def test_loads_without_torch(part):
    names = modules_of(part)
    script = (
        "import sys, importlib\n"
        f"for name in {names!r}:\n    importlib.import_module(name)\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_can_run_code_from_data(path):
    assert forbidden_uses(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from multiprocessing import pickle",
        "import dill.session",
        "from marshal import loads",
        "eval('1')",
        "exec(text)",
        "torch.load(path)",
        "from torch import load",
        "yaml.load(text)",
        "dist.broadcast_object_list(objects)",
        "jinja2.Environment()",
    ],
)
def test_each_forbidden_use_is_noticed(source):
    assert len(forbidden_uses(source)) == 1


def test_what_only_looks_like_a_forbidden_use_is_let_through():
    assert forbidden_uses("model.eval()\nyaml.safe_load(text)\nhint: jinja2.Environment") == []
