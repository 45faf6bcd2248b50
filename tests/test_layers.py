"""The house: what each room may import, what an import may cost, and what must not exist."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"rsa_lightning": ROOT / "rsa_lightning", "rsa_kernels": ROOT / "kernels/rsa_kernels"}
STDLIB = sys.stdlib_module_names

# module -> (our modules it may import, other packages it may import). `kernels` stands for rsa_kernels, any other word for
# that module of rsa_lightning. A file that is missing here, or an import that its line does not allow, fails below.
ROOMS = {
    "kernels": ("kernels.dispatch kernels.naive kernels.ops kernels.risk kernels.workspace", ""),
    "kernels.risk": ("", "torch jaxtyping"),
    "kernels.naive": ("kernels.risk", "torch jaxtyping"),
    "kernels.pairs": ("kernels.risk", "torch jaxtyping"),
    "kernels.quantile": ("kernels.risk", "torch jaxtyping"),
    "kernels.rows": ("kernels.risk kernels.naive kernels.pairs kernels.quantile", "torch jaxtyping"),
    "kernels.workspace": ("kernels.pairs", "torch"),
    "kernels.loop": ("kernels.risk kernels.naive kernels.pairs kernels.rows kernels.fused.rows", "torch"),
    "kernels.logits": ("kernels.naive kernels.pairs kernels.loop", "torch"),
    "kernels.linear": ("kernels.naive kernels.pairs kernels.loop kernels.workspace", "torch"),
    "kernels.nested": ("kernels.naive kernels.fused.nested", "torch"),
    "kernels.dispatch": ("kernels.risk", "torch"),
    "kernels.checks": ("kernels.pairs kernels.risk", "torch"),
    "kernels.ops": (
        "kernels.checks kernels.dispatch kernels.linear kernels.logits kernels.naive kernels.nested kernels.risk kernels.tree "
        "kernels.workspace",
        "torch jaxtyping",
    ),
    "kernels.fused": ("", ""),
    "kernels.fused.tiles": ("", "triton"),
    "kernels.fused.statistics": ("kernels.fused.tiles kernels.fused.cvar", "triton"),
    "kernels.fused.cvar": ("kernels.fused.tiles", "triton"),
    "kernels.fused.gradient": ("kernels.fused.tiles", "triton"),
    "kernels.fused.launch": ("kernels.pairs kernels.risk", "torch"),
    "kernels.fused.rows": (
        "kernels.pairs kernels.risk kernels.fused.launch kernels.fused.statistics kernels.fused.gradient",
        "torch jaxtyping",
    ),
    "kernels.fused.nested": ("", "torch triton"),
    "kernels.tree": ("kernels.risk", "torch jaxtyping"),
    "": ("", ""),
    "__main__": ("cli", ""),
    "losses": ("kernels.risk", "torch jaxtyping"),
    "temperatures": ("", ""),
    "transforms": ("", "torch jaxtyping"),
    "cost_labels": ("data.batch data.table losses transforms", "torch numpy jaxtyping"),
    "legacy": ("kernels.risk", "torch jaxtyping"),
    "stories": ("", "torch"),
    "world": ("kernels evaluation evaluation.tail transforms", "torch jaxtyping"),
    "tabular": ("kernels losses world", "torch jaxtyping"),
    "dual": ("", "torch jaxtyping"),
    "tail_dual": ("dual evaluation.tail", "torch jaxtyping"),
    "data": ("", ""),
    "data.records": ("", ""),
    "data.columns": ("data.records", ""),
    "data.formats": ("data.columns data.records", ""),
    "data.quality": ("data.records", ""),
    "data.readers": ("checkpoint data.records data.sources hub", ""),
    "data.sources": ("data.records parsing", "pyarrow datasets"),
    "data.vocabulary": ("data.records parsing", "transformers tokenizers"),
    "data.template": ("data.records data.vocabulary", "transformers jinja2"),
    "data.batch": ("", "torch jaxtyping numpy"),
    "data.tokenize": ("data.batch data.records data.template data.vocabulary", "transformers"),
    "data.sampler": ("", "torch"),
    "data.table": ("data.batch data.records", "numpy pyarrow"),
    "data.cache": ("checkpoint data.records", "filelock"),
    "data.relabel": ("data.records", ""),
    "data.ledger": ("data.columns data.formats data.quality data.readers data.records data.relabel", ""),
    "data.statistics": ("data.records data.table", "numpy"),
    "data.settings": (
        "checkpoint data.quality data.readers data.relabel data.template data.tokenize",
        "transformers",
    ),
    "data.prepare": (
        "checkpoint data.cache data.formats data.ledger data.quality data.readers data.records data.settings data.statistics "
        "data.table data.template data.tokenize",
        "transformers",
    ),
    "data.datamodule": (
        "data.batch data.prepare data.quality data.records data.relabel data.sampler data.settings data.statistics data.table "
        "data.tokenize",
        "numpy torch lightning transformers",
    ),
    "architecture": ("parsing", "transformers huggingface_hub"),
    "adapters": ("parsing", "torch transformers safetensors peft"),
    "packing": ("data.batch parsing", "torch transformers jaxtyping"),
    "models": (
        "kernels adapters architecture data.batch packing parsing",
        "torch transformers safetensors jaxtyping",
    ),
    "weights": ("", ""),
    "decoding": ("weights", "torch transformers jaxtyping"),
    "members": ("adapters data.tokenize parsing", "torch transformers safetensors"),
    "merge": ("adapters checkpoint data.tokenize hub members models saving weights", "torch safetensors"),
    "scoring": (
        "adapters checkpoint data.batch data.tokenize hub models parallel.processes",
        "torch lightning",
    ),
    "reference": ("adapters models scoring parallel.sharding data.batch", "torch"),
    "hidden_store": ("checkpoint", "torch numpy safetensors"),
    "hidden_cache": (
        "checkpoint data.batch data.cache hidden_store models reference scoring",
        "torch numpy lightning",
    ),
    "parallel.sharding": ("models packing", "torch"),
    "parallel.processes": ("parsing", "torch lightning"),
    "parallel.shards": ("parsing", "torch"),
    "parallel.strategy": (
        "models packing parsing parallel.processes parallel.sharding parallel.shards parallel.tensor",
        "torch lightning transformers",
    ),
    "saving": ("adapters checkpoint models parallel.sharding", "torch transformers"),
    "parallel.vocab_rows": ("kernels.pairs kernels.risk", "torch jaxtyping"),
    "parallel.vocab": (
        "kernels kernels.checks kernels.loop kernels.naive kernels.pairs kernels.risk kernels.workspace parallel.vocab_rows",
        "torch jaxtyping",
    ),
    "parallel.tensor": ("kernels models parallel.vocab", "torch jaxtyping"),
    "parallel.clipping": ("", "torch jaxtyping"),
    "optim": ("", "torch transformers"),
    "metrics": ("kernels data.batch losses", "torch torchmetrics jaxtyping"),
    "policy_stage": (
        "kernels adapters parallel.clipping data.batch metrics models optim packing parallel.strategy",
        "torch lightning",
    ),
    "stages": (
        "kernels cost_labels data.batch losses metrics models optim policy_stage reference scoring temperatures transforms",
        "torch lightning jaxtyping",
    ),
    "supervised": ("kernels data.batch models optim policy_stage", "torch"),
    "callbacks": ("adapters checkpoint models policy_stage saving parallel.sharding", "lightning"),
    "checkpoint": ("", ""),
    "manifest": ("checkpoint", ""),
    "sharing": ("checkpoint config lineage manifest plan", ""),
    "config": ("", "yaml"),
    "parsing": ("", ""),
    "parallel": ("", ""),
    "parallel.launch": ("", ""),
    "dryrun": ("", ""),
    "evaluation": ("", ""),
    "evaluation.tail": ("kernels.risk", "torch jaxtyping"),
    "evaluation.samples": ("checkpoint", ""),
    "evaluation.folders": ("data.tokenize decoding weights", "transformers"),
    "evaluation.generate": (
        "checkpoint data.records data.tokenize evaluation.folders evaluation.samples",
        "torch transformers jaxtyping",
    ),
    "evaluation.score": ("checkpoint evaluation.samples", ""),
    "evaluation.reward_models": ("data.records data.tokenize", "torch transformers safetensors"),
    "evaluation.preference": (
        "kernels data.tokenize decoding evaluation.folders evaluation.tail models",
        "torch jaxtyping",
    ),
    "evaluation.frontier": ("evaluation.tail", "torch"),
    "evaluation.figures": ("evaluation.frontier evaluation.tail", "torch matplotlib"),
    "evaluation.wording": ("evaluation.samples", ""),
    "evaluation.report": (
        "checkpoint evaluation evaluation.tail evaluation.samples evaluation.figures evaluation.wording",
        "torch rich",
    ),
    "fit": (
        "callbacks config hidden_cache legacy losses models parallel.launch reference parallel.shards stages parallel.strategy supervised policy_stage "
        "transforms data.datamodule",
        "lightning",
    ),
    "evaluation.comparison": (
        "checkpoint evaluation.figures evaluation.frontier evaluation.report evaluation.samples evaluation.wording",
        "rich",
    ),
    "preparation": ("checkpoint config data.datamodule data.prepare fit pipeline plan", "rich"),
    "hub": ("parsing", "huggingface_hub"),
    "kinds": ("weights", ""),
    "plan": ("evaluation.generate kinds models parsing temperatures", "jsonargparse"),
    "steps": ("config kinds plan", ""),
    "lineage": ("adapters checkpoint hub models plan steps", ""),
    "labels": (
        "checkpoint data.datamodule data.ledger data.prepare data.records data.tokenize evaluation.preference "
        "evaluation.samples evaluation.score models",
        "torch",
    ),
    "derived": (
        "adapters checkpoint data.datamodule data.records evaluation.score labels lineage manifest members merge models plan "
        "steps weights",
        "torch rich",
    ),
    "assess": (
        "kernels checkpoint data.datamodule data.records data.readers data.template data.tokenize manifest plan stages evaluation.figures "
        "evaluation.folders evaluation.generate evaluation.preference evaluation.report evaluation.score",
        "torch rich",
    ),
    "run_data": (
        "checkpoint data.datamodule data.formats data.readers hub kinds labels plan policy_stage steps",
        "",
    ),
    "pipeline": (
        "assess checkpoint data.datamodule data.tokenize derived fit lineage manifest models parsing plan parallel.launch parallel.processes "
        "policy_stage run_data saving sharing stages steps stories",
        "lightning rich",
    ),
    "budget": (
        "checkpoint config dual evaluation.samples evaluation.wording manifest tail_dual temperatures",
        "torch rich",
    ),
    "sweep": (
        "checkpoint config evaluation.comparison evaluation.figures evaluation.frontier manifest parallel.launch parsing pipeline "
        "plan",
        "rich",
    ),
    "dryrun.meter": ("", "torch"),
    "dryrun.fake_head": ("kernels kernels.pairs kernels.rows kernels.workspace dryrun.meter models", "torch"),
    "dryrun.fake_step": (
        "kernels.dispatch kernels.workspace parallel.clipping dryrun.fake_head dryrun.meter models policy_stage reference parallel.sharding stages parallel.strategy",
        "torch lightning transformers",
    ),
    "dryrun.footprint": ("dryrun.fake_step dryrun.meter models policy_stage parallel.strategy", "torch lightning"),
    "dryrun.planned": (
        "architecture data.tokenize dryrun.fake_step fit dryrun.footprint hub lineage models parsing plan policy_stage steps parallel.strategy",
        "lightning transformers",
    ),
    "dryrun.command": ("hub lineage dryrun.meter plan dryrun.planned steps", "rich pyarrow"),
    "card": ("evaluation.wording", ""),
    "export": (
        "adapters callbacks card checkpoint config data.datamodule data.tokenize fit hub manifest models policy_stage "
        "saving parallel.shards",
        "torch",
    ),
    "cli": (
        "budget config dryrun.command export fit merge parsing pipeline plan preparation sweep parallel.launch",
        "transformers",
    ),
}


def full(word: str) -> str:
    """`kernels.risk` -> rsa_kernels.risk, `losses` -> rsa_lightning.losses, "" -> rsa_lightning"""
    if word.split(".")[0] == "kernels":
        return f"rsa_{word}"
    return f"rsa_lightning.{word}" if word else "rsa_lightning"


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
    allowed, packages = {full(word) for word in ours.split()} | {"rsa_lightning"}, set(others.split())
    bad = set()
    for target in imports(path, known):
        top = target.split(".")[0]
        if top in SOURCES:
            bad |= set() if target in allowed else {target}
        elif top not in STDLIB:
            bad |= set() if top in packages else {target}
    return bad


def test_every_module_has_a_room():
    assert set(modules()) == set(map(full, ROOMS))


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_arrows(name):
    found = modules()
    assert strangers(name, found[full(name)], set(found)) == set()


# folder or file of benchmarks/ -> what else of it may be imported
BENCHMARKS = {
    "__main__": {"kernels", "figures", "gpu", "aot", "step", "theory", "exact_tail", "tail_risk", "scale", "timing"},
    "timing": set(),
    "theory": set(),
    "exact_tail": set(),
    "kernels": {"timing"},
    "aot": {"timing"},
    "step": {"timing"},
    "scale": {"kernels", "step", "timing"},
    "gpu": {"kernels", "timing"},
    "tail_risk": {"timing"},
    "pending": {"kernels", "gpu", "scale"},
    "figures": {"kernels", "pending", "timing"},
}


def benchmark_imports(path: Path) -> set[str]:
    """The second word of `benchmarks.word`, wherever a file imports it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "benchmarks":
            words = node.module.split(".")[1:2]
            found |= set(words or [alias.name for alias in node.names])
    return found


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_arrows_of_benchmarks(name):
    folder = ROOT / "benchmarks"
    files = sorted((folder / name).glob("*.py")) or [folder / f"{name}.py"]
    assert set().union(*map(benchmark_imports, files)) == BENCHMARKS[name] | ({name} if len(files) > 1 else set())


def test_every_benchmark_has_a_room():
    found = {file.relative_to(ROOT / "benchmarks").parts[0] for file in (ROOT / "benchmarks").rglob("*.py")}
    assert {name.removesuffix(".py") for name in found} - {"__init__"} == set(BENCHMARKS)


def test_arrows_can_fail(tmp_path):
    """A loss that looked at a model, even lazily, would be found."""
    wrong = tmp_path / "losses.py"
    wrong.write_text("def f():\n    from rsa_lightning import models\n    import transformers\n")
    assert strangers("losses", wrong, set(modules())) == {"rsa_lightning.models", "transformers"}


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
