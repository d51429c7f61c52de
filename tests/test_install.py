"""The documented ways to install: one DALI, that of the driver's CUDA."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from conftest import REPOSITORY

DRY_RUN = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet",
           "--disable-pip-version-check", "--report", "-"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("cuda", "found"), [("", "cuda130"), ("12", "cuda120")])
def test_each_way_brings_the_dali_of_its_cuda_alone(cuda: str, found: str) -> None:
    """With an extra, as later commands install one, which brings the plain package anew."""
    environment = os.environ | ({"DAN_CUDA": cuda} if cuda else {})
    done = subprocess.run(
        [*DRY_RUN, ".[explain]"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    if "Could not find a version" in done.stderr or "ConnectionError" in done.stderr:
        pytest.skip("no package index")
    assert done.returncode == 0, done.stderr
    items = {i["metadata"]["name"]: i["metadata"] for i in json.loads(done.stdout)["install"]}
    asked = {Requirement(line).name for line in items["dan_dist"]["requires_dist"]}
    assert {name for name in asked if "nvidia-dali" in name} == {f"nvidia-dali-{found}"}
    brought = {name for name in items if "nvidia-dali" in name}
    installed = {d.name for d in importlib.metadata.distributions()}  # which are in no report
    assert brought == {f"nvidia-dali-{found}"} - installed


def test_another_cuda_is_refused() -> None:
    environment = os.environ | {"DAN_CUDA": "11"}
    done = subprocess.run(
        [sys.executable, ".ci/setup.py", "--version"], cwd=REPOSITORY, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr == "DAN_CUDA is '11', expected 12 or 13\n"
