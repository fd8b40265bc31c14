"""The command, run as a user runs it: what stands on stdout, what on stderr, and the exit code."""

import json
import subprocess
import sys

import pytest

from regard import cli

TEXT = "the cat sat on the mat. [red]the[/red] cat <b>sat</b> on the mat. " * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a small untrained byte-level decoder."""
    from regard.tasks import bytetext, decoder

    folder = tmp_path_factory.mktemp("model")
    decoder.build(decoder.SIZES["smoke"], seed=0).save_pretrained(folder)
    bytetext.byte_tokenizer(8192).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def run(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run


def test_roles_prints_every_head_with_evidence_and_leaves_markup_alone(run, model, text):
    code, out, _ = run("roles", model, "--text", text)
    assert code == 0
    lines = [line for line in out.splitlines() if "self_attn" in line]
    assert len(lines) == 2 * 4
    assert all(">=" in line or "no role holds" in line for line in lines)


def test_roles_as_json_is_only_json(model, text):
    command = [sys.executable, "-m", "regard", "roles", str(model), "--text", str(text), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert len(found["heads"]) == 8
    assert {"counts", "not_measured"} <= found.keys()


def test_probe_measures_what_the_text_does_not_show(run, model, text):
    _, plain, _ = run("roles", model, "--text", text, "--json")
    _, probed, _ = run("roles", model, "--text", text, "--json", "--probe")
    assert "retrieval" in json.loads(plain)["not_measured"]
    assert "retrieval" not in json.loads(probed)["not_measured"]
    scores = json.loads(probed)["heads"][0]["roles"]["retrieval"]["scores"]
    assert 0 <= scores[0]["value"] <= 1


def test_watch_writes_an_atlas_that_roles_and_report_read(run, model, text, tmp_path):
    atlas = tmp_path / "a.zarr"
    code, out, _ = run("watch", model, "--text", text, "-o", atlas, "--json", "--statistics", "full")
    assert code == 0
    facts = json.loads(out)
    assert (facts["layers"], facts["heads"], facts["samples"]) == (2, 4, 1)
    packed = tmp_path / "a.zip"
    assert run("watch", model, "--text", text, "-o", packed)[0] == 0
    assert run("roles", "--atlas", packed)[0] == 0
    code, out, _ = run("roles", "--atlas", atlas, "--json")
    assert code == 0
    assert len(json.loads(out)["heads"]) == 8
    page = tmp_path / "a.html"
    code, out, _ = run("report", "--atlas", atlas, "-o", page)
    assert code == 0
    assert out.strip().endswith(str(page))
    assert "<html" in page.read_text(encoding="utf-8")[:500].lower()


def test_watch_a_corpus(run, model, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": TEXT[: 20 + i]}) + "\n" for i in range(5)), encoding="utf-8")
    atlas = tmp_path / "c.zarr"
    code, out, err = run("watch", model, "--corpus", corpus, "-o", atlas, "--json", "--statistics", "light")
    assert code == 0, err
    assert json.loads(out)["samples"] == 5


def test_report_of_a_text(run, model, text, tmp_path):
    page = tmp_path / "r.html"
    code, out, _ = run("report", model, "--text", text, "-o", page, "--json")
    assert code == 0
    assert json.loads(out)["report"] == str(page)
    assert "<b>sat</b>" not in page.read_text(encoding="utf-8")


def test_measures_lists_formula_and_paper(run):
    code, out, _ = run("measures", "--json")
    assert code == 0
    rows = json.loads(out)["measures"]
    assert {"sink", "entropy", "retrieval", "waad"} <= {r["name"] for r in rows}
    assert all(r["formula"] and len(r["range"]) == 2 for r in rows)
    code, out, _ = run("measures")
    assert "[0, 1]" in out


def test_papers_lists_the_catalogue(run, tmp_path):
    code, out, _ = run("papers", "--json", "--out", tmp_path)
    assert code == 0
    papers = json.loads(out)["papers"]
    assert len(papers) == 166
    assert {"slug", "family", "title", "seeds", "status", "findings"} <= papers[0].keys()
    _, out, _ = run("papers", "--family", "measures", "--out", tmp_path)
    assert len([line for line in out.splitlines() if line.startswith("measures")]) == 26
    _, out, _ = run("papers", "--status", "open", "--json", "--out", tmp_path)
    assert {p["status"] for p in json.loads(out)["papers"]} == {"open"}


def test_study_keeps_its_findings_and_papers_reads_them(run, model, tmp_path):
    code, out, _ = run("study", "retrieval-heads", "--model", model, "-o", tmp_path, "--json")
    assert code == 0
    record = json.loads(out)
    assert {f["claim"] for f in record["findings"]} == {"score", "few", "same-heads", "masking"}
    assert next(f for f in record["findings"] if f["claim"] == "score")["state"] == "holds"
    assert json.loads((tmp_path / "retrieval-heads.json").read_text())[0]["model"] == str(model)
    _, out, _ = run("papers", "--json", "--out", tmp_path)
    row = next(p for p in json.loads(out)["papers"] if p["slug"] == "retrieval-heads")
    assert row["status"] != "open"


def test_train_makes_a_model_that_roles_reads(run, text, tmp_path):
    folder = tmp_path / "trained"
    code, out, err = run("train", "decoder", "-o", folder, "--size", "smoke", "--steps", 12)
    assert code == 0, err
    assert "needle_256" in out
    assert json.loads((folder / "training.json").read_text())["seed"] == 0
    assert run("roles", folder, "--text", text)[0] == 0


USAGE = [
    (["nope"], "No such command"),
    (["roles"], "give exactly one"),
    (["roles", "--demo", "--text", "{text}"], "give exactly one"),
    (["roles", "{model}", "--demo"], "leave out MODEL"),
    (["roles", "{model}", "--atlas", "a.zarr", "--probe"], "leave out MODEL, --probe"),
    (["report", "--atlas", "a.zarr", "--tokens", "9"], "leave out --tokens"),
    (["report", "{model}", "--image", "{text}", "--tokens", "9"], "no tokens to cut"),
    (["roles", "{model}", "--text", "nowhere.txt"], "does not exist"),
    (["roles", "/no/such/folder", "--text", "{text}"], "there is no folder"),
    (["roles", "testbed:nope", "--text", "{text}"], "there is no testbed"),
    (["roles", "{model}", "--text", "{long}"], "--tokens 8192"),
    (["roles", "{model}", "--text", "{bad}"], "not UTF-8"),
    (["watch", "{model}", "-o", "x.zarr"], "give one of them"),
    (["watch", "{model}", "-o", "x.zarr", "--text", "{text}", "--resume"], "only a corpus run"),
    (["report", "--demo", "--text", "{text}"], "brings its own"),
    (["report", "{model}"], "give exactly one"),
    (["report", "--text", "{text}"], "name one"),
    (["study", "nope"], "retrieval-heads"),
    (["study", "retrieval-heads", "--device", "warp"], "cannot be used here"),
    (["papers", "--family", "nope"], "there are patterns"),
    (["train", "nope", "-o", "x"], "no testbed"),
]


@pytest.mark.parametrize(("arguments", "says"), USAGE, ids=[" ".join(a) for a, _ in USAGE])
def test_what_is_not_understood_exits_with_2_and_says_why(run, model, text, tmp_path, arguments, says):
    long, bad = tmp_path / "long.txt", tmp_path / "bad.txt"
    long.write_text("x" * 9000, encoding="utf-8")
    bad.write_bytes(b"\xff\xfe\xfa")
    places = {"model": model, "text": text, "long": long, "bad": bad}
    code, out, err = run(*(a.format(**places) for a in arguments))
    assert code == 2
    assert out == ""
    flat = " ".join(err.replace("│", " ").split())
    assert says in flat
    assert "Traceback" not in err


def test_a_failure_of_the_work_exits_with_1_without_a_traceback(run, model, text, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("not an atlas")
    code, _, err = run("watch", model, "--text", text, "-o", taken)
    assert code == 1
    assert "exists and is not an atlas" in err
    assert "Traceback" not in err
    with pytest.raises(ValueError, match="is not an atlas"):
        cli.main(["watch", str(model), "--debug", "--text", str(text), "-o", str(taken)])


def test_scan_and_circuits(run, tmp_path):
    code, out, _ = run("scan", "testbed:decoder", "--task", "repeated", "--prompts", "2", "--length", "40", "--json")
    assert code == 0
    record = json.loads(out)
    assert record["task"] == "repeated"
    increases = [h["increase"] for h in record["heads"]]
    assert increases == sorted(increases, reverse=True)
    assert len(increases) == 48
    page = tmp_path / "circuits.html"
    how = ("--prompts", "2", "--length", "40", "--page", page)
    code, out, _ = run("circuits", "testbed:decoder", "repeated", "repeated", *how)
    assert code == 0
    assert "share 100% of their heads" in out
    assert out.strip().endswith(str(page))
    assert "repeated and repeated share 100%" in page.read_text(encoding="utf-8")
    code, out, _ = run("scan", "testbed:decoder", "--task", "repeated", *how)
    assert code == 0
    assert "Heads of testbed:decoder that repeated needs" in page.read_text(encoding="utf-8")
    code, _, err = run("scan", "testbed:decoder", "--kind", "remove")
    assert code == 2
    assert "uniform" in err


def test_plan_writes_measures_and_shows(run, model, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("the cat sat on the mat and looked at the other cat. " * 40, encoding="utf-8")
    out, page = tmp_path / "plan.json", tmp_path / "plan.html"
    how = ("--tokens", 128, "--sequences", 1, "--needles", "--loss", 5, "-o", out)
    code, shown, _ = run("plan", model, "--text", text, *how, "--json")
    assert code == 0
    found = json.loads(shown)
    assert found["plan"] == str(out)
    assert found["measured"]["attention_speedup"] > 0
    assert found["measured"]["perplexity_ratio"] > 0
    assert set(found["measured"]["harm"]) == {"text", "needles"}
    assert sum(found["options"].values()) == 8
    code, shown, _ = run("plan", model, "--text", text, *how, "--page", page)
    assert code == 0
    assert "Attention, measured" in shown
    assert shown.rstrip().endswith(str(page))
    assert "<title>Plan of" in page.read_text(encoding="utf-8")
    import regard

    kept = regard.load_plan(out)
    assert kept.measured is not None
    assert kept.model["name"] == str(model)


def test_plan_refuses_what_it_cannot_do(run, model, text, tmp_path):
    code, _, err = run("plan", model)
    assert code == 2
    assert "give exactly one" in err
    code, _, err = run("plan", model, "--text", text, "--loss", 0.1, "--speed", 2)
    assert code == 2
    assert "one budget" in err
    code, _, err = run("plan", model, "--text", text, "--tokens", 1000, "-o", tmp_path / "x.json")
    assert code == 2
    assert "less than two stretches" in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "x.json").exists()
