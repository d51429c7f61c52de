"""A visit to a GPU: its parts are processes that cost each other nothing."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))

from benchmarks import visit

FIGURES = {
    "machine": "drawn",
    "step": {
        "table": {"ours": [{"images/s": 3.0}, {"images/s": 5.0}]},
        "peak_bytes": 3_865_470_566,
    },
}


def part(name: str, code: str, share: float = 1.0, writes: Path | None = None) -> visit.Part:
    return visit.Part(name, [sys.executable, "-c", code], share, writes)


def test_parts_that_fail_and_hang_cost_the_others_nothing(tmp_path: Path) -> None:
    found = tmp_path / "step.json"
    chosen = [
        part("fails", "print('in vain'); raise SystemExit(3)"),
        part("hangs", "import time; print('on', flush=True); time.sleep(60)", share=0.15),
        part("step", f"open({str(found)!r}, 'w').write({json.dumps(FIGURES)!r})", writes=found),
        part("late", "import time; time.sleep(60)"),
        part("never", "print('here')"),
    ]
    done = visit.run(tmp_path, chosen, minutes=0.1)
    results = {name: row["result"].split()[0] for name, row in done.items()}
    assert results == {
        "fails": "exit", "hangs": "stopped", "step": "done", "late": "stopped", "never": "no"
    }  # fmt: skip
    assert (done["fails"]["last"], done["hangs"]["last"]) == ("in vain", "on")
    assert json.loads((tmp_path / "visit.json").read_text()) == done
    text = (tmp_path / "visit.md").read_text()
    assert text.startswith("drawn\n") and "| step | step / table / ours | 5 images/s |" in text
    assert "| step | step / peak_bytes | 3,865,470,566 |" in text


def test_the_most_important_come_first_and_fit_the_time(tmp_path: Path) -> None:
    chosen = visit.parts(tmp_path, ["demo", "data.shards=here"], visit.BATCHES)
    assert [p.name for p in chosen][:3] == ["checks", "step 256", "step 32"]
    assert sum(p.share for p in chosen) <= 1.0
    assert all("data.shards=here" in p.command for p in chosen if p.writes)
    (resumed,) = [p for p in chosen if p.name == "compiled and resumed"]
    assert visit.COMPILED in resumed.command and f"not {visit.COMPILED}" in chosen[0].command
    source = (Path(__file__).parent / "test_gpu.py").read_text()
    assert source.count(f"def test_a_{visit.COMPILED}_") == 1
