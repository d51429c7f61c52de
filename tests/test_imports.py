"""The architecture: imports point one way, leaves import nothing of ours."""

import ast
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

ALLOWED = {
    "dan_dist.augment": set(),
    "dan_dist.cache": {"shardset"},
    "dan_dist.checkpoint": set(),
    "dan_dist.config": set(),
    "dan_dist.metrics": set(),
    "dan_dist.sampler": set(),
    "dan_dist.shardset": set(),
    "dan_dist.sync": set(),
    "dan_dist.model": set(),
    "dan_dist.world": set(),
    "dan_dist.attention": {"model"},
    "dan_dist.losses": {"model", "sync"},
    "dan_dist.weights": {"checkpoint", "config", "model"},
    "dan_dist.data": {"augment", "model", "sampler", "shardset"},
    "dan_dist.crops": {"shardset", "shards.images"},
    "dan_dist.engine": {"data", "losses", "model", "sync", "world"},
    "dan_dist.deepspeed_engine": {"engine", "losses", "world"},
    "dan_dist.stop": set(),
    "dan_dist.entry": {"stop"},
    "dan_dist.pulse": {"stop", "world"},
    "dan_dist.journal": set(),
    "dan_dist.served": {"model", "shards.images", "weights"},
    "dan_dist.logged_model": {"shards.images", "weights"},
    "dan_dist.store": set(),
    "dan_dist.sender": {"journal", "logged_model", "store"},
    "dan_dist.tracking": {"journal", "sender", "store"},
    "dan_dist.export": {"checkpoint", "model", "weights"},
    "dan_dist.verification": {"shardset", "shards.source"},
    "dan_dist.figures": {"metrics", "model", "verification"},
    "dan_dist.task": {"figures", "metrics", "model", "shardset", "verification"},
    "dan_dist.progress": {"data", "engine", "tracking"},
    "dan_dist.parts": {"*"},
    "dan_dist.train": {"*"},
    "dan_dist.evaluation": {"*"},
    "dan_dist.prediction": {"*"},
    "dan_dist.explanation": {"*"},
    "dan_dist.ablation": {"checkpoint", "config", "journal", "shardset", "stop", "tracking"},
    "dan_dist.comparison": {"ablation", "figures", "journal", "store", "tracking"},
    "shards.images": set(),
    "shards.faces": set(),
    "shards.pool": set(),
    "shards.release": set(),
    "shards.similarity": set(),
    "shards.source": {"release"},
    "shards.claim": {"dan_dist.shardset"},
    "shards.writer": {"dan_dist.shardset", "claim", "images", "pool", "release"},
    "shards.affectnet": {"images", "release", "source"},
    "shards.rafdb": {"release", "source"},
    "shards.sfew": {"images", "release", "similarity", "source"},
    "shards.folder": {"release", "source"},
    "shards.identities": {"release", "source"},
    "shards.align": {"dan_dist.shardset", "images", "release", "sfew", "source"},
    "shards.show": {"dan_dist.shardset", "images", "source"},
    "shards.verify": {"dan_dist.shardset", "images", "pool", "source", "verify"},
    "shards.synthetic": {
        "dan_dist.shardset",
        "affectnet",
        "claim",
        "faces",
        "images",
        "release",
        "show",
        "writer",
    },
    "shards.layouts": {"faces", "images", "synthetic"},
    "shards.pack": {"*"},
}


def imports_of(path: Path) -> set[str]:
    """Our modules that a file imports, as `package.module`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in ALLOWED}


def test_every_module_imports_only_what_its_place_allows() -> None:
    files = [*(REPOSITORY / "dan_dist").glob("*.py"), *(REPOSITORY / "shards").glob("*.py")]
    modules = {f"{f.parent.name}.{f.stem}": f for f in files if f.stem != "__init__"}
    assert set(modules) == set(ALLOWED)
    for module, path in modules.items():
        package = module.split(".")[0]
        allowed = {name if "." in name else f"{package}.{name}" for name in ALLOWED[module]}
        if "*" not in ALLOWED[module]:
            assert imports_of(path) <= allowed, module
        assert "dan_dist.train" not in imports_of(path), f"{module} imports the story"


def test_the_environment_is_read_in_one_place() -> None:
    for path in [*(REPOSITORY / "dan_dist").glob("*.py"), *(REPOSITORY / "shards").glob("*.py")]:
        if "WORLD_SIZE" in path.read_text() or "LOCAL_RANK" in path.read_text():
            assert path.name == "world.py"
