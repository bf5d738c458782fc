"""The run folder: what is skipped, what reruns, resuming after kill -9, locks, gates, and bad input."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file

import lingraft
from lingraft import layout
from lingraft.errors import LingraftError, RunError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_gemma: Path) -> Path:
    """A folder with a recipe and its finished run in `run/`."""
    folder = tmp_path_factory.mktemp("finished")
    lingraft.run(tiny.write_recipe(folder, tiny_gemma), folder / "run")
    return folder


def stamps(run: Path) -> dict[str, int]:
    return {str(p.parent.relative_to(run)): p.stat().st_mtime_ns for p in run.rglob("manifest.json")}


def rerun(folder: Path, *overrides: str) -> set[str]:
    """Run again with overrides; the names of the steps that were made again."""
    before = stamps(folder / "run")
    lingraft.run(folder / "recipe.yaml", folder / "run", overrides)
    after = stamps(folder / "run")
    return {name for name in after if before.get(name) != after[name]}


def test_run_folder_has_the_promised_files(finished: Path) -> None:
    run = finished / "run"
    board = json.loads((run / "scoreboard.json").read_text())
    assert [entry["step"] for entry in board["entries"]] == [
        "00-base",
        "03-embeddings",
        "04-stage-1-rows",
        "05-stage-2-lora",
    ]
    assert board["entries"][-1]["tokens_trained"] > board["entries"][-2]["tokens_trained"] > 0
    page = (run / "report.html").read_text()
    assert "tiny" in page
    assert not re.search(r"<script|src=|href=.?http", page)
    assert not (run / ".work").exists()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        assert (run / "model" / name).is_file(), name
        assert (run / "04-stage-1-rows" / name).is_file(), name


def test_adaptation_gains_on_the_target_and_changes_no_old_ids(finished: Path) -> None:
    entries = json.loads((finished / "run" / "scoreboard.json").read_text())["entries"]
    first, last = entries[0]["languages"]["ko"], entries[-1]["languages"]["ko"]
    assert last["tokens_per_character"] < 0.6 * first["tokens_per_character"]
    assert last["bits_per_byte"] < first["bits_per_byte"]
    assert entries[-1]["languages"]["en"]["tokens"] == entries[0]["languages"]["en"]["tokens"]
    old, new = load_file(tiny_base(finished) / "model.safetensors"), load_file(finished / "run/model/model.safetensors")
    ids = {piece["id"] for piece in json.loads((finished / "run/model/graft.json").read_text())["pieces"]}
    kept = [i for i in range(tiny.VOCABULARY) if i not in ids]
    name = "model.embed_tokens.weight"
    assert (old[name][kept] == new[name][kept]).all()


def tiny_base(folder: Path) -> Path:
    return Path(layout.open_run(folder / "run").base.folder)


def test_finished_run_is_skipped(finished: Path) -> None:
    assert rerun(finished) == set()


def test_changed_section_reruns_what_depends_on_it_and_nothing_else(tmp_path: Path, tiny_gemma: Path) -> None:
    lingraft.run(tiny.write_recipe(tmp_path, tiny_gemma), tmp_path / "run")
    scores = {"scores/00-base", "scores/03-embeddings", "scores/04-stage-1-rows", "scores/05-stage-2-lora"}
    assert rerun(tmp_path, "evaluate.max_documents=5") == scores
    last = {"05-stage-2-lora", "scores/05-stage-2-lora", "model"}
    same = "evaluate.max_documents=5"
    assert rerun(tmp_path, same, "stages.lora.tokens=1500") == last
    after_embeddings = {"03-embeddings", "04-stage-1-rows", *last} | scores - {"scores/00-base"}
    assert rerun(tmp_path, same, "embeddings.output=subword_mean") == after_embeddings
    (tmp_path / "en.txt").write_text("\n\n".join(tiny.english(60)), encoding="utf-8")
    assert rerun(tmp_path, same) == {"01-corpus", "02-tokenizer", "scores/00-base"} | after_embeddings


def test_gate_does_not_retrain_and_stops_with_the_reason(finished: Path) -> None:
    with pytest.raises(lingraft.GateFailed) as caught:
        lingraft.run(
            finished / "recipe.yaml", finished / "run", ["stages.rows.gate={english_bpb_rise: -0.99, ko_bpb_rise: 5}"]
        )
    message = str(caught.value)
    assert "stage 1 rows cost too much: english_bpb_rise is" in message
    assert "goes on from stage 1" in message
    assert "ko_bpb_rise" not in message
    assert caught.value.exit_code == 3
    page = (finished / "run" / "report.html").read_text()
    assert "stopped by a gate" in page
    assert "stage 1 rows: english_bpb_rise" in page
    assert not lingraft.status(finished / "run")["finished"]
    assert rerun(finished) == set(), "without the gate the run is as finished as before"


def test_final_model_loads_and_generates_with_plain_transformers(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished / "run" / "model")
    model = AutoModelForCausalLM.from_pretrained(finished / "run" / "model")
    encoded = tokenizer("폐렴은", return_tensors="pt")
    written = model.generate(**encoded, max_new_tokens=4, do_sample=False)
    assert written.shape[1] == encoded["input_ids"].shape[1] + 4
    assert tokenizer.decode(encoded["input_ids"][0], skip_special_tokens=True) == "폐렴은"


def test_two_runs_in_one_folder_are_refused(finished: Path) -> None:
    from filelock import FileLock

    with FileLock(finished / "run" / ".lock"), pytest.raises(RunError, match="another run is at work"):
        lingraft.run(finished / "recipe.yaml", finished / "run")


def test_plan_status_and_report_agree(finished: Path, tmp_path: Path) -> None:
    plan = lingraft.plan(finished / "recipe.yaml", finished / "run")
    assert {step["state"] for step in plan["steps"]} == {"done"}
    fresh = lingraft.plan(finished / "recipe.yaml", tmp_path / "nothing")
    assert {step["state"] for step in fresh["steps"]} == {"pending"}
    assert not (tmp_path / "nothing").exists(), "a plan writes nothing"
    rows, lora = fresh["stages"]
    assert rows["trainable"] == 2 * 100 * 32
    projections = 2 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64)) * 4
    assert lora["trainable"] == projections
    status = lingraft.status(finished / "run")
    assert status["finished"]
    assert [s["step"] for s in status["steps"]] == [s["step"] for s in plan["steps"]]
    (finished / "run" / "report.html").unlink()
    assert lingraft.write_report(finished / "run").is_file()


def test_tied_base_kept_tied_collapses_the_preset(tmp_path: Path, tiny_gemma: Path) -> None:
    recipe = tiny.write_recipe(
        tmp_path,
        tiny_gemma,
        embeddings={"tie": "keep"},
        stages={"preset": "eeve", "every": {"tokens": 600}, "override": {"all-layers": {"lora": {"quantise": "none"}}}},
    )
    plan = lingraft.plan(recipe, tmp_path / "run")
    assert [stage["name"] for stage in plan["stages"]] == ["new-rows", "all-output-rows", "all-layers", "cool-down"]
    assert sum("left out" in note for note in plan["notes"]) == 3
    result = lingraft.run(recipe, tmp_path / "run")
    config = json.loads((result.model / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(result.model / "model.safetensors")


def test_base_that_guesses_in_its_own_language_raises_an_alarm(
    tmp_path: Path, tiny_gemma: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"language": "en", "miniature": "en-exam", "limit_documents": 40}
    recipe = tiny.write_recipe(
        tmp_path,
        tiny_gemma,
        evaluate={
            "max_documents": 3,
            "span_bytes": 120,
            "generation": {"count": 1, "max_new_tokens": 2},
            "questions": [{"name": "letters", **asked}, {"name": "texts", **asked, "scoring": "cloze"}],
        },
    )
    result = lingraft.run(recipe, tmp_path / "run")
    shown = capsys.readouterr().out
    assert "alarm: the base answers letters" in shown
    assert "check the prompt format and the answer key" in shown
    assert "the base answers letters" in result.report.read_text()
    questions = result.scoreboard[-1]["questions"]
    assert {name: q["total"] for name, q in questions.items()} == {"letters": 40, "texts": 40}
    assert questions["letters"]["low"] < questions["letters"]["accuracy"] < questions["letters"]["high"]


# ------------------------------------------------------------------------------------- kill and resume


def lingraft_process(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "lingraft.cli", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_in_the_middle_of_a_stage_ends_in_the_same_bits(
    finished: Path, tmp_path: Path, tiny_gemma: Path
) -> None:
    recipe = tiny.write_recipe(tmp_path, tiny_gemma)
    run = tmp_path / "run"
    command = ("run", recipe, "--run-dir", run, "--set", "training.checkpoint_seconds=1e-6")
    process = lingraft_process(*command, cwd=tmp_path)
    wait_for(lambda: list((run / ".work").glob("*-rows/checkpoint-2")), process)
    process.kill()
    process.wait()
    assert not (run / "04-stage-1-rows").exists()
    again = lingraft_process(*command, cwd=tmp_path)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "corpus: done before" in out
    whole, resumed = (load_file(f / "run/model/model.safetensors") for f in (finished, tmp_path))
    assert all((whole[name] == resumed[name]).all() for name in whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_says_one_line_and_exits_130(tmp_path: Path, tiny_gemma: Path, number: int) -> None:
    recipe = tiny.write_recipe(tmp_path, tiny_gemma)
    run = tmp_path / "run"
    process = lingraft_process("run", recipe, "--run-dir", run, "--set", "stages.rows.tokens=2M", cwd=tmp_path)
    wait_for(lambda: list((run / ".work").glob("*-rows/log.jsonl")), process)
    time.sleep(0.5)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "error: interrupted; finished steps are kept, and the same command goes on from there"
    assert list((run / ".work").glob("*-rows/checkpoint-*")), "the interrupted stage kept its state"


# ------------------------------------------------------------------------------------------- bad input


def fails(recipe: Path, folder: Path, *overrides: str) -> str:
    with pytest.raises(LingraftError) as caught:
        lingraft.run(recipe, folder / "run", overrides)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    published = list((folder / "run").glob("[0-9]*"))
    assert all((step / "manifest.json").is_file() for step in published), "a step is whole or not there"
    return message


def break_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def garble_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 200)


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def scale_logits(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logits_scaling": 8.0}))


def lose_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).unlink()


def shrink_rows(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(600)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_weights, "model.safetensors: damaged or cut short"),
        (garble_weights, "model.safetensors: damaged or cut short"),
        (pickle_weights, "pickled (pytorch_model.bin), which can run code when opened; convert them"),
        (lose_config, "no config.json here"),
        (lose_tokenizer, "tokenizer.json"),
        (scale_logits, "multiplies or divides its logits by logits_scaling = 8.0"),
        (shrink_rows, "the tokenizer has 640 tokens but the model only 600 rows"),
    ],
)
def test_bad_base(tmp_path: Path, tiny_tokenizer: Path, damage: Any, message: str) -> None:
    base = tiny.write_checkpoint(tmp_path / "base", tiny_tokenizer)
    damage(base)
    assert message in fails(tiny.write_recipe(tmp_path, base), tmp_path)


def one_source(path: str, **more: Any) -> dict[str, Any]:
    return {"sources": [{"name": "texts", "language": "ko", "path": path, **more}]}


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (one_source("missing.txt"), "corpus.sources[0]: "),
        (one_source("table.csv", column="korean"), "no column 'korean'"),
        (one_source("cp949.txt", encoding="utf-8"), "cp949.txt"),
        (one_source("ko.txt", min_characters=100_000), "too short"),
        (one_source("en.txt"), "no text in 'ko' left"),
        (one_source("empty.txt"), "'texts': there is nothing in it"),
        ({"sources": [{"name": "m", "language": "ko", "miniature": "ko-txt"}]}, "did you mean 'ko-text'?"),
        ({"sources": [{"name": "h", "language": "ko", "hub": "./no-such-set"}]}, "./no-such-set"),
    ],
)
def test_bad_corpus(tmp_path: Path, tiny_gemma: Path, corpus: dict[str, Any], message: str) -> None:
    recipe = tiny.write_recipe(tmp_path, tiny_gemma, corpus=corpus)
    (tmp_path / "table.csv").write_text("ko,en\n폐렴,pneumonia\n", encoding="utf-8")
    (tmp_path / "cp949.txt").write_bytes("폐렴은 폐의 병이다.\n".encode("cp949") * 9)
    (tmp_path / "empty.txt").write_text("")
    assert message in fails(recipe, tmp_path)


def test_too_few_slots(tmp_path: Path, tiny_gemma: Path) -> None:
    recipe = tiny.write_recipe(
        tmp_path, tiny_gemma, tokenizer={"new_tokens": 400, "min_frequency": 1, "slots": "unused"}
    )
    assert "unused slots; ask for at most" in fails(recipe, tmp_path)


def test_bad_dictionary(tmp_path: Path, tiny_gemma: Path) -> None:
    recipe = tiny.write_recipe(tmp_path, tiny_gemma, embeddings={"dictionary": {"path": "terms.tsv"}})
    assert "embeddings.dictionary.path: no such file" in fails(recipe, tmp_path)
    (tmp_path / "terms.tsv").write_text("korean\tenglish\n폐렴\tpneumonia\n", encoding="utf-8")
    assert "embeddings.dictionary: no column 'ko'" in fails(recipe, tmp_path)
    assert not (tmp_path / "run" / "01-corpus").exists(), "found before any step"


def test_unreachable_hub_model(tmp_path: Path, tiny_gemma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = tiny.write_recipe(tmp_path, tiny_gemma, base={"model": "nobody/no-such-model"})
    assert "the hub can't be reached" in fails(recipe, tmp_path)
    plan = lingraft.plan(recipe, tmp_path / "elsewhere")
    assert "can't be reached" in plan["base"]["unknown"]
    assert len(plan["stages"]) == 2


def cli(*arguments: str | Path, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lingraft.cli", *map(str, arguments)],
        cwd=cwd,
        text=True,
        capture_output=True,
        check=False,
        **options,
    )


def test_cli_prints_one_line_and_exits_2(tmp_path: Path) -> None:
    shown = cli("run", "no-such.yaml", cwd=tmp_path)
    assert shown.returncode == 2
    assert shown.stderr.startswith("error: no-such.yaml: no such recipe file")
    assert shown.stderr.count("\n") == 1
    shown = cli("run", "quickstrt", cwd=tmp_path)
    assert "did you mean 'quickstart'" in shown.stderr
    shown = cli("status", tmp_path, cwd=tmp_path)
    assert shown.returncode == 2
    assert "not a run folder" in shown.stderr


def test_cli_recipe_faults_are_all_listed(tmp_path: Path, tiny_gemma: Path) -> None:
    recipe = tiny.write_recipe(tmp_path, tiny_gemma, nme="x", seed="many")
    shown = cli("recipe", "check", recipe, cwd=tmp_path)
    assert shown.returncode == 2
    assert "nme: unknown key; did you mean 'name'?" in shown.stderr
    assert "seed" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_folder_that_cannot_be_written(tmp_path: Path, tiny_gemma: Path) -> None:
    recipe = tiny.write_recipe(tmp_path, tiny_gemma)
    shown = cli("run", recipe, "--run-dir", "/proc/lingraft", cwd=tmp_path)
    assert shown.returncode == 2
    assert "can't write the run folder" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_read_only_folder(tmp_path: Path, tiny_gemma: Path) -> None:
    recipe = tiny.write_recipe(tmp_path, tiny_gemma)
    run = tmp_path / "run"
    run.mkdir()
    run.chmod(0o500)
    if os.access(run, os.W_OK):
        pytest.skip("this user may write anywhere (root): folder permissions can't be tested")
    shown = cli("run", recipe, "--run-dir", run, cwd=tmp_path)
    assert shown.returncode == 2
    assert "can't write the run folder" in shown.stderr


def test_full_disk_says_so_and_leaves_nothing_half_written(
    tmp_path: Path, tiny_gemma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full while a stage saves its weights: later, with room, the same command goes on."""
    recipe = tiny.write_recipe(tmp_path, tiny_gemma)

    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("lingraft.training.stage.write_changed", full)
        with pytest.raises(OSError, match="No space left"):
            lingraft.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "04-stage-1-rows").exists()
    assert (tmp_path / "run" / "03-embeddings" / "model.safetensors").is_file()
    lingraft.run(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_disk_that_is_really_full(tmp_path: Path, tiny_gemma: Path) -> None:
    """A file system of 0.9 MB: too small for the models. With room, the same command goes on."""
    recipe = tiny.write_recipe(tmp_path, tiny_gemma)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        shown = cli("run", recipe, "--run-dir", disk / "run", cwd=tmp_path)
        assert shown.returncode == 2, shown.stderr
        assert "the disk is full: make room and give the same command again" in shown.stderr
        assert shown.stderr.count("\n") == 1
        published = [p for p in (disk / "run").iterdir() if p.name[0].isdigit()]
        assert published
        assert all((step / "manifest.json").is_file() for step in published)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert cli("run", recipe, "--run-dir", disk / "run", cwd=tmp_path).returncode == 0
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_read_only_disk(tmp_path: Path, tiny_gemma: Path) -> None:
    recipe = tiny.write_recipe(tmp_path, tiny_gemma)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("only root may mount a read-only file system")
    try:
        shown = cli("run", recipe, "--run-dir", disk / "run", cwd=tmp_path)
    finally:
        subprocess.run(["umount", str(disk)], check=False)
    assert shown.returncode == 2
    assert "can't write the run folder: Read-only file system" in shown.stderr
    assert shown.stderr.count("\n") == 1


def test_file_size_limit_is_one_line(tmp_path: Path, tiny_gemma: Path) -> None:
    """A real refusal by the system while writing: files may not grow beyond 64 kB."""
    import resource

    recipe = tiny.write_recipe(tmp_path, tiny_gemma)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, 64_000))

    shown = cli("run", recipe, "--run-dir", tmp_path / "run", cwd=tmp_path, preexec_fn=limit)
    assert shown.returncode == 2, shown.stderr
    assert "Traceback" not in shown.stderr
    assert shown.stderr.count("\n") == 1
    assert "arge" in shown.stderr
    assert not (tmp_path / "run" / "03-embeddings").exists()


def test_two_files_of_one_name_are_both_inputs(tmp_path: Path, tiny_gemma: Path) -> None:
    recipe = tiny.write_recipe(tmp_path, tiny_gemma)
    for folder, texts in (("a", tiny.korean(60)), ("b", tiny.korean(120)[60:])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("\n\n".join(texts), encoding="utf-8")
    changes = ["corpus.sources.korean.path=[a/x.txt, b/x.txt]"]

    def corpus_key() -> str:
        return layout.make_plan(lingraft.load_recipe(recipe, changes), tmp_path / "run").steps[0].key

    before = corpus_key()
    (tmp_path / "a" / "x.txt").write_text("폐렴은 폐에 생기는 병이다.", encoding="utf-8")
    assert corpus_key() != before


def test_hub_base_stays_at_the_commit_that_the_run_began_with(
    tmp_path: Path, tiny_gemma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from lingraft.steps import base

    shutil.copytree(tiny_gemma, tmp_path / "hub" / "commit-1")
    shutil.copytree(tiny_gemma, tmp_path / "hub" / "commit-2")
    latest = "commit-1"

    def fetch(repository: str, revision: str | None, weights: bool = True) -> Path:
        if latest == "offline":
            raise base.HubUnreachable("no network")
        return tmp_path / "hub" / (revision or latest)

    monkeypatch.setattr(base, "fetch", fetch)
    recipe = tiny.write_recipe(tmp_path, tiny_gemma, base={"model": "somebody/model"})
    lingraft.run(recipe, tmp_path / "run")
    latest = "commit-2"
    assert rerun(tmp_path) == set(), "a newer commit on the hub makes nothing stale"
    latest = "offline"
    assert lingraft.status(tmp_path / "run")["finished"]
    lingraft.write_report(tmp_path / "run")
    assert len(json.loads((tmp_path / "run" / "scoreboard.json").read_text())["entries"]) == 4


def test_target_without_held_out_text_is_refused(tmp_path: Path, tiny_gemma: Path) -> None:
    recipe = tiny.write_recipe(tmp_path, tiny_gemma)
    (tmp_path / "ko.txt").write_text("폐렴은 폐에 생기는 병이다. 기침과 발열이 나타난다.", encoding="utf-8")
    assert "no Korean text is held out" in fails(recipe, tmp_path)


def test_unknown_lora_target(tmp_path: Path, tiny_gemma: Path) -> None:
    recipe = tiny.write_recipe(tmp_path, tiny_gemma)
    assert "no linear module named nope" in fails(recipe, tmp_path, "stages.lora.lora.targets=[nope]")
