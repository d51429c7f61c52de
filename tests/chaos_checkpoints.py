"""Spoiled checkpoints: given to the programs that read one, and to a training that goes on."""

from pathlib import Path
from typing import Any

import torch
from chaos_trial import STEPS, Trial, predicted
from spoiled import SPOILED, STATES, copy, damage, spoil

from conftest import copied, single
from dan_dist.evaluation.evaluate import main as evaluate
from dan_dist.inference.explain import main as explain
from dan_dist.model.backbone import load_backbone
from dan_dist.model.dan import DAN
from dan_dist.options import EvaluateOptions, ExplainOptions
from dan_dist.run import checkpoint
from dan_dist.run.folder import step_path


def spoiled_file(trial: Trial, source: Path, path: Path) -> str:
    """Writes a checkpoint that is damaged, or holds what none of ours does; which of the two."""
    dice = trial.dice
    trial.named.append(str(path))
    path.unlink(missing_ok=True)  # of a copied run, it is a link
    if dice.random() < 0.4:
        data, how = damage(dice, source.read_bytes())
        path.write_bytes(data)
        trial.done.append(how)
        return "bytes"
    content = copy(checkpoint.read(source))
    known = {**SPOILED, **(STATES if "optimizer" in content else {})}
    if dice.random() < 0.15:
        name = dice.choice([*known])
        known[name][0](content)
        trial.done.append(name)
    else:
        for _ in range(dice.choice((1, 1, 2))):
            trial.done.append(spoil(dice, content))
    torch.save(content, path)
    return "content"


def checkpoints(trial: Trial) -> None:
    """What reads a checkpoint refuses it before any work, or works."""
    material, path = trial.material, trial.folder / "best.pt"
    kind = spoiled_file(trial, material.run / "best.pt", path)
    program = trial.dice.choice(("predict", "predict", "evaluate", "explain", "backbone"))
    trial.done.append(program)
    data, out = str(material.shards.root), trial.folder / "out"
    if program == "predict":
        (trial.folder / "good.jpg").write_bytes(material.images[0])
        found: Any = predicted(path, trial.folder / "good.jpg")
        right: Any = predicted(material.run / "best.pt", trial.folder / "good.jpg")
    elif program == "evaluate":
        options = EvaluateOptions(checkpoint=path, data=data, output=out, device="cpu",
                                  no_tracking=True)  # fmt: skip
        evaluate(options)
        return
    elif program == "explain":
        explain(ExplainOptions(checkpoint=path, data=data, output=out, device="cpu",
                               no_tracking=True, count=1))  # fmt: skip
        return
    else:
        found, right = backbone_of(path), backbone_of(material.run / "best.pt")
    assert kind == "content" or found == right, "damaged, and read as something else"


def backbone_of(path: Path) -> float:
    network = DAN(8, 0)
    load_backbone(network, str(path))
    found = float(sum(p.double().abs().sum() for p in network.state_dict().values()))
    assert found == found and abs(found) != float("inf")
    return found


def resumes(trial: Trial) -> None:
    """A training goes on from an older checkpoint, or refuses; it ends as the undisturbed one."""
    material = trial.material
    run = copied(material.run, trial.folder / "run")
    step_path(run, STEPS).unlink()
    kind = spoiled_file(trial, step_path(material.run, 8), step_path(run, 8))
    if trial.dice.random() < 0.3:
        step_path(run, 4).unlink()
    trial.named.append(str(run))
    result = single(material.config, f"train.output={run}", f"train.max_steps={STEPS}",
                    "train.checkpoint_every=4", "train.keep_checkpoints=3")  # fmt: skip
    assert result.status == "finished"
    if kind == "bytes":
        found, right = last_weights(run), last_weights(material.run)
        assert all(torch.equal(found[k], right[k]) for k in right), "other weights at its end"


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = checkpoint.load(step_path(run, STEPS))["objective"]
    return found
