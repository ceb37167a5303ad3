"""The job that README shows can be run."""

from pathlib import Path

from s2l_ray import config, pipeline
from tests import tiny

README = Path(__file__).parents[2] / "README.md"


def test_the_job_of_the_readme_is_a_whole_one(tmp_path: Path) -> None:
    text = README.read_text()
    (shown,) = [
        block.removeprefix("yaml\n")
        for block in text.split("```")[1::2]
        if block.startswith("yaml\nrun: ")
    ]
    tiny.write_jsonl(tmp_path / "mixture" / "a.jsonl", tiny.rows(2000))
    (tmp_path / "job.yaml").write_text(shown.replace("/data/mixture", f"{tmp_path}/mixture"))
    assert len(shown.splitlines()) <= 10
    job = config.load(str(tmp_path / "job.yaml"), [f"run.storage={tmp_path}"])
    assert "subset" in pipeline.plan(job, "subset", assume=True).of("s2l")
