"""Every command line of the documentation is executed by a test, or listed here with the reason."""

import ast
import re
import shlex
import shutil
from pathlib import Path

import layouts
import pytest
import torch
import torchvision
from test_docs import FENCED, READMES

from conftest import REPOSITORY
from dan_dist.ablation import grid
from dan_dist.config import layered, load_config
from dan_dist.dry_run import check
from dan_dist.options import (
    CertifyOptions,
    EvaluateCommand,
    ExplainOptions,
    ExportOptions,
    PredictOptions,
)  # fmt: skip
from dan_dist.programs import read_train_command
from dan_dist.run.cli import parse
from shards import pack, show, verify
from shards.releases import sfew
from shards.releases.similarity import TEMPLATE

OWN = "test_commands.py::"
DATA, DRY = f"{OWN}test_lines_on_data_sets_run", f"{OWN}test_training_lines_pass_a_dry_run"
NEEDS = f"{OWN}test_each_recipe_names_what_it_needs"
OPTIONS = {"evaluate": EvaluateCommand, "explain": ExplainOptions, "export": ExportOptions,
           "predict": PredictOptions, "certify": CertifyOptions}  # fmt: skip
STARTS = ("DAN_", "export DAN_", "python ", "torchrun ", "sbatch ", "deepspeed ", "mlflow ", "pip ",
          "pytest", ".ci/run")  # fmt: skip

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))

# The line, with * for any text → the test that executes it, where need be with smaller numbers
EXECUTED = {
    "pip install -e .": "test_packaging.py::test_an_installed_package_trains_from_an_empty_folder",
    "export DAN_CUDA=12":
        "test_install.py::test_each_way_brings_the_dali_of_its_cuda_alone",
    "torchrun launch/train.py": "test_train.py::test_the_demo_makes_its_own_shards",
    "torchrun --nproc-per-node=2 launch/train.py train.output=runs/demo-2":
        "test_train.py::test_the_demo_makes_its_own_shards",
    "python launch/train.py":
        "test_signals.py::test_a_run_without_a_launcher_ends_with_its_own_exit_code",
    "python launch/train.py model.fusion=log_softmax loss.lambda_afn=1*":
        "test_explain.py::test_two_networks_side_by_side",
    "python launch/train.py * --dry-run --ranks 8": DRY,
    "python launch/train.py --help": "test_programs.py::test_help_lists_every_key_without_torch",
    "torchrun launch/train.py demo-backbone*":
        "test_verification.py::test_a_backbone_from_training_to_dan",
    "torchrun launch/train.py model.backbone=runs/demo-backbone/backbone.pth *":
        "test_verification.py::test_a_backbone_from_training_to_dan",
    "torchrun launch/train.py demo model.*": "test_weights.py::test_a_dan_from_a_baseline",
    "torchrun launch/train.py rafdb model.weights=affecnet8_epoch5_acc0.6209.pth":
        "test_weights.py::test_a_training_starts_from_it",
    "torchrun --nproc-per-node=8 launch/train.py affectnet8 data.shards=data/faces *": DRY,
    "torchrun --nproc-per-node=* launch/train.py rafdb*": DRY,
    "torchrun --nproc-per-node=8 launch/train.py affectnet8": DRY,
    "torchrun --nproc-per-node=8 launch/train.py affectnet8 model.backbone=*": DRY,
    "torchrun --nproc-per-node=8 launch/train.py affectnet8 data.shards=s3://*":
        "test_cache.py::test_training_from_s3",
    "torchrun --nproc-per-node=4 launch/train.py sfew": DRY,
    "torchrun --nproc-per-node=4 launch/train.py fer*": DRY,
    "torchrun --nproc-per-node=8 launch/train.py msceleb": DRY,
    "torchrun launch/train.py * model.backbone=imagenet":
        "test_dry_run.py::test_an_imagenet_start_is_not_downloaded",
    "torchrun launch/train.py * data.shards=data/drawn-*": NEEDS,
    "torchrun --nproc-per-node=2 launch/train.py engine.name=deepspeed *":
        "test_deepspeed.py::test_both_launchers_lead_to_the_same_training",
    "deepspeed --num_accelerators 2 launch/train.py":
        "test_deepspeed.py::test_both_launchers_lead_to_the_same_training",
    "torchrun --nproc-per-node=8 launch/evaluate.py runs/msceleb *":
        "test_verification.py::test_a_backbone_from_training_to_dan",
    "torchrun --nproc-per-node=8 launch/evaluate.py runs/*":
        "test_evaluate.py::test_any_number_of_ranks_gives_the_same_file",
    "python launch/evaluate.py runs/*": "test_across.py::test_a_matrix_of_runs_and_sets",
    "python launch/evaluate.py affecnet8_*":
        "test_weights.py::test_evaluated_under_classes_in_another_order",
    "python launch/explain.py runs/* --data *": "test_explain.py::test_two_networks_side_by_side",
    "python launch/explain.py runs/affectnet8 face.jpg faces/":
        "test_explain.py::test_given_images",
    "find . -name '*.jpg' | python launch/predict.py *": "test_folders.py::test_lists_of_paths",
    "python runs/affectnet8/best-example.py *":
        "test_export.py::test_exported_files_give_the_networks_logits",
    "python launch/predict.py * --faces*":
        "test_faces.py::test_documented_lines_on_photographs_run",
    "python launch/predict.py *": "test_use.py::test_predictions_are_those_of_the_evaluation",
    "python launch/export.py *": "test_export.py::test_exported_files_give_the_networks_logits",
    "python launch/certify.py demo *": "test_certificate.py::test_the_command_runs_each_world",
    "python launch/certify.py runs/*": "test_certificate.py::test_the_command_runs_each_world",
    "python launch/ablate.py *":
        "test_ablate.py::test_stopped_and_killed_it_ends_with_each_run_once",
    **dict.fromkeys((f"python launch/bench.py {p}" for p in ("loader*", "step *", "train")),
                    "test_bench.py::test_it_measures_and_writes_what_it_measured"),
    "python launch/bench.py scaling *": "test_bench.py::test_it_projects_beyond_this_machine",
    "python launch/bench.py start *": "test_bench.py::test_it_starts_trainings",
    "python launch/bench.py --visit *":
        "test_bench.py::test_a_visit_without_time_names_what_it_left_out",
    "python -m shards.align *": "test_align.py::test_align_writes_what_the_detector_finds",
    "python -m shards.pack merge *": "test_pack_parts.py",
    "python -m shards.pack *": DATA, "python -m shards.verify *": DATA,
    "python -m shards.show *": DATA,
    "sbatch slurm/affectnet8.sh": "test_slurm.py::"
        "test_two_nodes_preempted_and_requeued_end_as_if_nothing_was",
    "sbatch --nodes=4 slurm/affectnet8.sh *": "test_slurm.py::"
        "test_two_nodes_preempted_and_requeued_end_as_if_nothing_was",
    "sbatch *slurm/heads.sh*": "test_slurm.py::test_the_heads_make_their_runs_under_one_parent",
    "DAN_GRID=fcn-loss sbatch *":
        "test_slurm.py::test_the_heads_make_their_runs_under_one_parent",
    "job=$(sbatch --parsable slurm/pack.sh *": "test_slurm.py::"
        "test_packing_in_an_array_and_merging_after_it",
    "sbatch --dependency=afterok:$job slurm/pack.sh merge *": "test_slurm.py::"
        "test_packing_in_an_array_and_merging_after_it",
    "mlflow server --backend-store-uri *": "test_host_names.py::"
        "test_the_documented_server_is_reached_by_its_name",
    "export MLFLOW_TRACKING_URI=http*": "test_host_names.py::"
        "test_the_documented_server_is_reached_by_its_name",
    "export MLFLOW_TRACKING_URI=sqlite:///mlflow.db": "test_use.py::"
        "test_the_best_model_is_in_mlflow",
    "mlflow models serve *": "test_use.py::test_the_best_model_is_in_mlflow",
    "python -m dan_dist.keys": "test_docs.py::test_the_table_of_keys_is_the_schemas",
    "python -m dan_dist.tracking replay *": "test_journal.py::"
        "test_a_server_that_was_away_gets_every_record_once",
    "python -m dan_dist.tracking register *":
        "test_mlflow.py::test_an_evaluation_is_at_the_model_and_at_its_data",
    "python tests/chaos.py*": "test_elastic.py::test_chaos_in_short",
    "python tests/standing.py*": "test_elastic.py::test_programs_end_beside_a_load",
    "torchrun --nnodes=1:2 --max-restarts=3 …": "test_elastic.py::"
        "test_an_elastic_job_goes_on_without_the_dead",
    "torchrun --no-python dan-train …": "test_packaging.py::"
        "test_an_installed_package_trains_under_torchrun",
}  # fmt: skip

# The line → why no test executes it
NOT_HERE = {
    "pip install -e '.[*": "asks the package index; .ci/run installs all extras",
    "pytest*": "the tests themselves",
    "python tests/planted.py *": "needs thousands of faces; test_leaks.py alters pictures alike",
    "python launch/pictures/screenshots.py *": "draws pages of a server that holds an ablation",
    ".ci/run": "runs these tests in a fresh environment",
    "module load cuda && *": "needs a cluster's modules",
    "DAN_PYTHON=\"*": "needs apptainer; test_batch_scripts.py runs the script with a stand-in",
    "sbatch -p gpu -A mine …": "a partition and an account of somebody's cluster",
    "torchrun [*": "a form, no command",
    "python launch/bench.py [*": "a form, no command",
    "python launch/bench.py --json *": "all parts, a quarter of an hour; test_bench.py has each",
    "python launch/bench.py order*": "ten million images, and peers' environments of gigabytes",
    "torchrun launch/train.py [CONFIG] *": "a form, no command",
    "mlflow ui*": "a page for people; test_ablate.py opens the server's",
    "mlflow server --host 0.0.0.0": "in a text on what it leaves open",
    "python -m dan_dist train …": "a form, no command",
    "echo *": "needs a served model and a photograph; test_use.py asks the model in its process",
    "curl *": "the second half of the line before it",
}  # fmt: skip


def of_recipe(path: Path) -> list[str]:
    """The commands in the comments of a configuration."""
    text = "\n".join(re.findall(r"^#   +(.*)$", path.read_text(), re.MULTILINE))
    joined = (" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines())
    return [line for line in joined if line.startswith(STARTS)]


def lines() -> list[str]:
    """The commands of all code blocks, those in lines of text and in recipes, without comments."""
    found = [line for path in RECIPES for line in of_recipe(path)]
    for path in READMES:
        text = path.read_text()
        blocks = [block for language, block in FENCED.findall(text) if language == "bash"]
        rest = FENCED.sub("", text)
        inline = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
        for line in "\n".join(blocks).replace("&& \\\n", "\n").replace("\\\n", " ").splitlines():
            found.append(" ".join(re.sub(r"(^|\s)# .*$|\s+&$", "", line).split()))
        found += [span for span in inline if span.startswith(STARTS) and " " in span]
    return sorted(filter(None, {*found}))


def entry(table: dict[str, str], line: str) -> str | None:
    """The value of the longest pattern that the line has the form of."""
    fits = [p for p in table if re.fullmatch(re.escape(p).replace(r"\*", ".*"), line)]
    return table[max(fits, key=len)] if fits else None


def words_of(line: str, program: str) -> list[str] | None:
    """The arguments of a program of ours, or None where the line is of another."""
    before, name, after = line.partition(program)
    whole = name and not after[:1].strip() and "sbatch" not in before
    return shlex.split(after.split("…")[0]) if whole else None


@pytest.mark.parametrize("line", lines())
def test_a_line_is_executed_or_listed_with_its_reason(line: str) -> None:
    executed, reason = entry(EXECUTED, line), entry(NOT_HERE, line)
    assert bool(executed) != bool(reason), f"{line}: put it into one of the two tables"


def test_the_tables_name_lines_and_tests_that_exist() -> None:
    for pattern in (*EXECUTED, *NOT_HERE):
        assert any(entry({pattern: "x"}, line) for line in lines()), f"no such line: {pattern}"
    for name in EXECUTED.values():
        file, _, test = name.partition("::")
        tree = ast.parse((REPOSITORY / "tests" / file).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not test or test in functions, name


def test_every_line_is_one_that_its_program_takes() -> None:
    """Recipes, keys, options: read as the programs read them."""
    count = 0
    for line in filter(lambda line: entry(EXECUTED, line), lines()):
        for name, options in OPTIONS.items():
            if (words := words_of(line, f"launch/{name}.py")) is not None:
                assert parse(options, [word for word in words if word[:1] != "["])
                count += 1
        if (words := words_of(line, "launch/train.py")) is not None:
            command = read_train_command(words)
            assert command.help or load_config(command.config, command.overrides)
            count += 1
        if (words := words_of(line, "launch/ablate.py")) is not None:
            own = [w for k, w in enumerate(words) if w[:2] != "--" and words[k - 1][:2] != "--"]
            assert load_config("demo", grid.parse(own)[2])
            count += 1
    assert count > 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which the documented data sets lie, small."""
    folder = tmp_path_factory.mktemp("place")
    layouts.write_folder(folder / "FACES", {"train": 48, "val": 16}, size=32, seed=0)
    layouts.write_affectnet_reduced(folder / "AffectNet", 48, 16, size=32, seed=0)
    layouts.write_rafdb(folder / "RAF-DB" / "basic", 35, 14, seed=0, size=32)
    layouts.write_expw(folder / "ExpW", 28, seed=0)
    votes = [[10 * (k == label) for k in range(10)] for label in range(8)]
    usages = {"Training": 56, "PublicTest": 24, "PrivateTest": 24}
    layouts.write_fer2013(folder / "FER", usages, seed=0, votes=votes)
    layouts.write_sfew(folder / "SFEW", 28, 14, seed=0, size=32, aligned=False)
    points = ",".join(f"{value * 32 / 112:.2f}" for value in TEMPLATE.ravel())
    frames = [path.relative_to(folder / "SFEW") for path in (folder / "SFEW").rglob("*.png")]
    marks = [",".join(sfew.LANDMARKS), *(f"{frame},{points}" for frame in frames)]
    (folder / "sfew.csv").write_text("\n".join(marks))
    boxes = layouts.write_caers(folder / "CAER-S", 28, 14, seed=0)
    (folder / "boxes.csv").write_text("\n".join(boxes))
    faces = sorted((folder / "FACES").rglob("*.jpg"))
    for name, persons in (("MS-Celeb-1M", 40), ("lfw", 8)):  # 40 at least, of whom 20 are held out
        for k, face in enumerate([*faces, *faces]):
            path = folder / name / f"person {k % persons}" / f"{k}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(face, path)
    return folder


@pytest.fixture(scope="module")
def packed(place: Path) -> set[str]:
    """The data sets that the documented lines have packed there, but for their size and number."""
    small = {"synthetic": ["--train", "48", "--val", "40", "--size", "32"]}
    done: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for line in (line for line in lines() if entry(EXECUTED, line) == DATA):
            for name, value in (("DATASET", "folder"), ("RELEASE", "FACES"), ("NAME", "faces")):
                line = line.replace(name, value)
            if (words := words_of(line, "-m shards.pack")) is not None:
                own = ["--identities", "8", "--held-out", "20"] if "identity" in words else []
                options = [*small.get(words[0], ["--size", "32"]), *own, "--workers", "1"]
                assert pack.main([*words, *options]) == 0, line
                done.add(words[0])
    return done


@pytest.mark.slow
def test_lines_on_data_sets_run(
    place: Path, packed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, but for the images' size and number."""
    monkeypatch.chdir(place)
    for line in (line.replace("NAME", "faces").replace("OTHER", "rafdb") for line in lines()):
        if (words := words_of(line, "-m shards.verify")) is not None:
            assert verify.main([*words, "--workers", "1"]) == 0, line
        if (words := words_of(line, "-m shards.show")) is not None:
            assert show.main(words) == 0 and [*Path("sheets").iterdir()], line
    names = "affectnet caers expw fer2013 ferplus folder identities rafdb sfew synthetic"
    assert packed == {*names.split()}


def test_what_the_lines_leave_is_ignored_by_git() -> None:
    ignored = (REPOSITORY / ".gitignore").read_text().splitlines()
    assert {"/data/", "/runs/", "/sheets/", "*.out", "mlflow.db*"} <= {*ignored}


@pytest.mark.slow
def test_training_lines_pass_a_dry_run(
    place: Path, packed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each recipe needs, at the places that configs/README.md gives, is all that it needs."""
    monkeypatch.chdir(place)
    (place / "weights").mkdir()
    (place / "runs" / "msceleb").mkdir(parents=True)
    content = {"state_dict": torchvision.models.resnet18().state_dict()}
    for path in ("weights/resnet18_msceleb.pth", "runs/msceleb/backbone.pth"):
        torch.save(content, path)
    small = ["train.device=cpu", "train.global_batch=8", "tracking.enabled=false"]
    count = 0
    for line in (line for line in lines() if entry(EXECUTED, line) == DRY):
        command = read_train_command(words_of(line, "launch/train.py") or [])
        pairs = ["data.pairs=20"] if command.config == "msceleb" else []
        check(load_config(command.config, layered(command.overrides, small, pairs)), 2)
        count += 1
    assert count >= 11


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_names_what_it_needs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, their origin and their place; the commands without them pass in an empty folder."""
    monkeypatch.chdir(tmp_path)
    config, text = load_config(path), path.read_text().partition("\ndata:")[0]
    if "\nbase: " in text:  # which names it
        return
    if config.data.synthetic is not None:
        assert "# Needs no files." in text and not of_recipe(path)
        return
    packs, *trainings = of_recipe(path)
    assert (
        packs.endswith(f"--out {config.data.paths[0]}") and "withdrawn" in text
    ) or "http" in text
    needs_weights = config.model.backbone != "none"
    assert not needs_weights or all(
        name in text for name in (config.model.backbone, "https://github.com/yaoing/DAN")
    )
    assert len(trainings) == 1 + needs_weights
    small = ["train.device=cpu", "train.global_batch=8", "tracking.enabled=false"]
    for line in trainings:
        command = read_train_command(words_of(line, "launch/train.py") or [])
        checked = load_config(command.config, layered(command.overrides, small))
        if checked.data.synthetic is not None:
            check(checked, 1)
        assert checked.model.backbone in ("imagenet", "none")
