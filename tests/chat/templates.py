"""Chat templates as seven families publish them, each with a tokenizer of its family's kind."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from rayfuse.config.models import ModelSettings
from rayfuse.models.chat import ChatFormat, load_chat_format
from tests.fakes import SAMPLE, byte_level_tokenizer, save_tokenizer, sentencepiece_tokenizer

TEXTS = [*SAMPLE, "You add numbers. What is 3 plus 4? It is seven. Are you sure? Yes, quite.\n"] * 2


@dataclass(frozen=True)
class Family:
    """A template and what its tokenizer needs."""

    template: str
    control: tuple[str, ...]
    end: str
    """The control token that ends an answer."""
    is_sentencepiece: bool = False
    bos: str | None = None
    takes_system: bool = True


LOOP = "{% for message in messages %}"
END = "{% endfor %}"

FAMILIES = {
    "chatml": Family(
        LOOP
        + "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        + END
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "llama-2": Family(
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
        "{% for message in rest %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim"
        " + ' [/INST]' }}{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
        "{% endif %}{% endfor %}",
        (),
        "</s>",
        is_sentencepiece=True,
        bos="<s>",
    ),
    "llama-3": Family(
        "{{ bos_token }}"
        + LOOP
        + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        " + message['content'] | trim + '<|eot_id|>' }}" + END,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        + LOOP
        + "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n'"
        " + message['content'] | trim + '<end_of_turn>\\n' }}" + END,
        ("<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        is_sentencepiece=True,
        bos="<s>",
        takes_system=False,
    ),
    "mistral": Family(
        "{{ bos_token }}{% set ns = namespace(system='') %}"
        + LOOP
        + "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' + ns.system + message['content'] + ' [/INST]' }}{% set ns.system = '' %}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}" + END,
        (),
        "</s>",
        is_sentencepiece=True,
        bos="<s>",
    ),
    "phi-3": Family(
        LOOP
        + "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
        + END
        + "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}"
        "{% else %}{{ eos_token }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
        is_sentencepiece=True,
        bos="<s>",
    ),
    "zephyr": Family(
        LOOP
        + "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
        + END,
        (),
        "</s>",
        is_sentencepiece=True,
        bos="<s>",
    ),
}


def save_family(name: str, folder: Path) -> ModelSettings:
    """Write the tokenizer and the template of a family as a model folder without weights."""
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    bos, end = family.bos, "</s>" if family.is_sentencepiece else "<|end|>"
    save_tokenizer(tokenizer, folder, bos=bos, eos=end if name != "chatml" else "<|im_end|>")
    (folder / "chat_template.jinja").write_text(family.template)
    return ModelSettings(model=str(folder))


def make_tokenizer(family: Family) -> Tokenizer:
    tokenizer = (
        sentencepiece_tokenizer(420, TEXTS, splits_words=True)
        if family.is_sentencepiece
        else byte_level_tokenizer(420, TEXTS)
    )
    tokenizer.add_special_tokens(
        [AddedToken(n, special=True, normalized=False) for n in family.control]
    )
    return tokenizer


def load_family(name: str, folder: Path) -> ChatFormat:
    return load_chat_format(save_family(name, folder))
