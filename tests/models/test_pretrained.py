"""Broken model folders and templates: refused by name before any weights are loaded; nothing in them is drawn at random."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import MODELS, load_miniature
from oprd.errors import ModelError
from oprd.models.loading import ModelFacts
from oprd.models.pretrained import load_weights

WEIGHTS = "model.safetensors"


def edit(name, **changes):
    def damage(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def keep_a_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def lose_a_shard(folder):
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    index = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_assistant(folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<|user|>{{ m.content + 1 }}{% endfor %}")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100_000]), "SafetensorError: .*again"),
        (write(WEIGHTS, b""), "SafetensorError: .*download or save the model again"),
        (write(WEIGHTS, b"<html>not found</html>" * 9), "SafetensorError: .*download or save the model again"),
        (keep_a_pickle, "holds no model.safetensors; weights in another format may run code"),
        (lose_a_shard, "model-00002-of-00002.safetensors"),
        (edit("config.json", hidden_size="x"), "cannot read the config of .*hidden_size.*expected int, got str"),
        (edit("config.json", num_hidden_layers=7), "cannot read the config of .*num_hidden_layers"),
        (edit("config.json", num_attention_heads=0), "cannot read the config of .*"),
        (write("config.json", b"[1]"), "cannot read the config of "),
        (write("tokenizer.json", b'{"model": {}}'), "cannot load a tokenizer from "),
        (edit("generation_config.json", eos_token_id="x"), "eos_token_id is 'x', which is no token id"),
        (edit("generation_config.json", eos_token_id=[261, -1]), "eos_token_id is -1, which is no token id"),
        (write("generation_config.json", b"{"), "cannot use the tokenizer or the generation config of "),
        (no_assistant, "the chat template refuses a conversation of the roles user: can only concatenate str"),
        (write("chat_template.jinja", b"{{ 2.0 ** 9999 }}"), "the chat template refuses .*Numerical result out of range"),
        (write("chat_template.jinja", b"<|user|>"), "the chat template refuses .*: it leaves the last message out"),
    ],
)  # fmt: skip
def test_a_broken_folder_is_refused_by_name_before_weights_are_loaded(damage, reason, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(MODELS / "base", folder)
    damage(folder)
    with pytest.raises(ModelError, match=f"(?s){reason}") as caught:
        ModelFacts.read(str(folder))
    assert str(folder) in str(caught.value)


def test_weights_that_the_files_lack_are_not_drawn_at_random(tmp_path):
    shutil.copytree(MODELS / "base", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / WEIGHTS)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "m" / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 weights, the first is model.layers.2.mlp.up_proj.weight"):
        load_weights(str(tmp_path / "m"))


def test_an_adapter_in_a_pickle_is_refused(tmp_path):
    shutil.copytree(MODELS / "base", tmp_path / "m")
    lm = load_miniature("base")
    lm.model.name_or_path = str(tmp_path / "m")
    get_peft_model(lm.model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    lm.tokenizer.save_pretrained(tmp_path / "a")
    assert ModelFacts.read(str(tmp_path / "a")).adapter
    tensors = tmp_path / "a" / "adapter_model.safetensors"
    torch.save(load_file(tensors), tmp_path / "a" / "adapter_model.bin")
    tensors.unlink()
    with pytest.raises(ModelError, match=r"a holds no adapter_model\.safetensors"):
        ModelFacts.read(str(tmp_path / "a"))


def test_a_template_for_prompts_alone_ends_by_the_tokenizers_stop_token(tmp_path):
    for template in (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    ):
        shutil.copytree(MODELS / "base", tmp_path / "m", dirs_exist_ok=True)
        (tmp_path / "m" / "chat_template.jinja").write_text(template)
        assert ModelFacts.read(str(tmp_path / "m")).stop_ids == (261,)
