"""The house: what each room may import, what an import may cost, and what must not exist."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"rsa_lightning": ROOT / "rsa_lightning", "rsa_kernels": ROOT / "kernels/rsa_kernels"}
STDLIB = sys.stdlib_module_names

R, K = "rsa_lightning.", "rsa_kernels."
MATHS = ({K + "risk", "rsa_kernels"}, {"torch", "jaxtyping"})
# module -> (our modules it may import, other packages it may import); a test below names what is missing
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "rsa_kernels": ({K + "naive", K + "ops", K + "risk"}, set()),
    K + "risk": (set(), {"torch", "jaxtyping"}),
    K + "naive": ({K + "risk"}, {"torch", "jaxtyping"}),
    K + "rows": ({K + "risk", K + "naive"}, {"torch", "jaxtyping"}),
    K + "chunked": ({K + "risk", K + "naive", K + "rows"}, {"torch", "jaxtyping"}),
    K + "ops": ({K + "risk", K + "naive", K + "rows", K + "chunked"}, {"torch", "jaxtyping"}),
    "rsa_lightning": (set(), set()),
    R + "__main__": ({R + "cli"}, set()),
    R + "losses": MATHS,
    R + "temperatures": (set(), set()),
    R + "stories": (set(), {"torch"}),
    R + "data": (set(), set()),
    R + "data.formats": (set(), set()),
    R + "data.readers": ({R + "data.formats"}, {"pyarrow"}),
    R + "data.tokenize": ({R + "data.formats"}, {"torch", "jaxtyping", "transformers", "tokenizers"}),
    R + "data.sampler": (set(), {"torch"}),
    R + "data.datamodule": (
        {R + "data.formats", R + "data.readers", R + "data.sampler", R + "data.tokenize"},
        {"torch", "lightning", "transformers"},
    ),
    R + "models": (
        {"rsa_kernels", K + "ops", R + "data.tokenize"},
        {"torch", "transformers", "safetensors", "jaxtyping"},
    ),
    R + "reference": ({R + "models", R + "data.tokenize"}, {"torch"}),
    R + "optim": (set(), {"torch", "transformers"}),
    R + "metrics": (set(), {"torch", "torchmetrics", "jaxtyping"}),
    R + "stages": (
        {
            "rsa_kernels",
            K + "ops",
            *(R + m for m in ("data.tokenize", "losses", "metrics", "models", "optim", "reference", "temperatures")),
        },
        {"torch", "lightning", "jaxtyping"},
    ),
    R + "supervised": ({K + "ops", *(R + m for m in ("data.tokenize", "models", "optim", "stages"))}, {"torch"}),
    R + "callbacks": ({R + "models", R + "stages"}, {"lightning"}),
    R + "checkpoint": (set(), set()),
    R + "manifest": ({R + "checkpoint"}, set()),
    R + "config": (set(), {"yaml"}),
    R + "parsing": (set(), set()),
    R + "evaluation": (set(), set()),
    R + "evaluation.tail": ({K + "risk", "rsa_kernels"}, {"torch", "jaxtyping"}),
    R + "evaluation.samples": (set(), set()),
    R + "evaluation.generate": (
        {"rsa_kernels", R + "evaluation.samples", R + "data.tokenize", R + "data.formats", R + "models"},
        {"torch", "transformers", "jaxtyping"},
    ),
    R + "evaluation.score": ({R + "evaluation.samples"}, set()),
    R + "evaluation.preference": (
        {"rsa_kernels", R + "data.tokenize", R + "evaluation.tail", R + "models"},
        {"torch"},
    ),
    R + "evaluation.figures": ({R + "evaluation.tail"}, {"torch", "matplotlib"}),
    R + "evaluation.wording": ({R + "evaluation.samples"}, set()),
    R + "evaluation.report": (
        {R + "evaluation." + m for m in ("tail", "samples", "figures", "wording")} | {R + "evaluation"},
        {"torch", "rich"},
    ),
    R + "fit": (
        {
            "rsa_lightning",
            *(R + m for m in ("callbacks", "losses", "reference", "supervised", "stages", "data.datamodule")),
        },
        {"lightning"},
    ),
    R + "plan": ({R + "config", R + "models", R + "parsing", R + "temperatures"}, {"jsonargparse"}),
    R + "pipeline": (
        {
            "rsa_kernels",
            "rsa_lightning",
            *(
                R + m
                for m in (
                    "stories",
                    "checkpoint",
                    "config",
                    "data.datamodule",
                    "data.readers",
                    "data.tokenize",
                    "evaluation.figures",
                    "evaluation.generate",
                    "evaluation.preference",
                    "evaluation.report",
                    "evaluation.score",
                    "fit",
                    "manifest",
                    "parsing",
                    "plan",
                    "stages",
                )
            ),
        },
        {"torch", "lightning", "rich"},
    ),
    R + "cli": ({R + "fit", R + "config", R + "parsing", R + "pipeline"}, {"transformers"}),
}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            found[name] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """Every module a file imports, lazy imports included; `from package import module` counts as the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return found


def strangers(name: str, path: Path, known: set[str]) -> set[str]:
    """The imports of a module that its room does not allow."""
    ours, others = ROOMS[name]
    bad = set()
    for target in imports(path, known):
        top = target.split(".")[0]
        if top in SOURCES:
            bad |= set() if target in ours else {target}
        elif top not in STDLIB:
            bad |= set() if top in others else {target}
    return bad


def test_every_module_has_a_room():
    assert set(modules()) == set(ROOMS)


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_arrows(name):
    found = modules()
    assert strangers(name, found[name], set(found)) == set()


def test_arrows_can_fail(tmp_path):
    """A loss that looked at a model, even lazily, would be found."""
    wrong = tmp_path / "losses.py"
    wrong.write_text("def f():\n    from rsa_lightning import models\n    import transformers\n")
    assert strangers(R + "losses", wrong, set(modules())) == {R + "models", "transformers"}


def loaded_by(code: str) -> set[str]:
    """Top-level packages in sys.modules of a fresh interpreter after running `code`."""
    command = f"{code}\nimport sys\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    return set(
        subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True).stdout.split()
    )


HEAVY = {"lightning", "transformers", "triton"}


def test_importing_the_kernels_loads_no_framework():
    assert loaded_by("import rsa_kernels") & HEAVY == set()


def test_that_test_can_fail():
    assert "lightning" in loaded_by("import rsa_kernels, lightning") & HEAVY


@pytest.mark.parametrize(
    "package", ["rsa_kernels", "rsa_lightning", "rsa_lightning.stages", "rsa_lightning.data.datamodule"]
)
def test_neither_datasets_nor_jsonargparse_is_imported(package):
    """They are slow to import and needed only by readers and parsers. What lightning or transformers load is theirs."""
    theirs = loaded_by("import lightning, transformers, torchmetrics, torch")
    assert (loaded_by(f"import {package}") - theirs) & {"datasets", "jsonargparse", "pyarrow"} == set()


def test_the_folder_of_the_kernels_is_no_package():
    """`kernels` is a package on PyPI that transformers imports when it finds it: ours must never shadow it."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert "import kernels" not in "".join(path.read_text() for path in modules().values())
