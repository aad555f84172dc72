"""Byte-level tokenizers with the special tokens and the kind of chat template of well-known model families."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}\n<tool_call>"
    "{{ call | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEEPS_LAST_THOUGHT = (
    "{% set ns = namespace(query=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.query = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% set answer = m.content %}"
    "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}{% if '</think>' in answer %}"
    "{% set thought = answer.split('</think>')[0].split('<think>')[-1] %}"
    "{% set answer = answer.split('</think>')[-1] %}{% endif %}"
    "{% if loop.index0 > ns.query %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ answer.lstrip('\n') }}{% else %}{{ answer }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
STRICT = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
OPENS_THOUGHT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}<eos>{% else %}<|User|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
ENDS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
COMMANDS = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN|>{% if m.role == 'assistant' %}<|CHATBOT|><|START_RESPONSE|>"
    "{{ m.content }}<|END_RESPONSE|>{% else %}<|{{ m.role | upper }}|>{{ m.content }}{% endif %}<|END_OF_TURN|>"
    "{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN|><|CHATBOT|><|START_RESPONSE|>{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
BLOCKS = (
    "{{ bos_token }}{% for m in messages %}{{ m.role | capitalize }}: {% for block in m.content %}"
    "{% if block.type == 'image' %}<image>{% elif block.type == 'text' %}{{ block.text }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

FAMILIES = {
    "chatml": dict(template=CHATML, special=["<|im_start|>", "<|im_end|>"], plain=["<tool_call>", "</tool_call>"]),
    "qwen3": dict(template=KEEPS_LAST_THOUGHT, special=["<|im_start|>", "<|im_end|>"], plain=["<think>", "</think>"]),
    "llama3": dict(template=HEADERS, bos="<bos>", special=["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "llama2": dict(template=INSTRUCTIONS, bos="<bos>", unk="<unk>"),
    "gemma": dict(template=STRICT, bos="<bos>", pad="<pad>", special=["<start_of_turn>", "<end_of_turn>"]),
    "r1": dict(
        template=OPENS_THOUGHT, bos="<bos>", pad="<eos>", plain=["<think>", "</think>", "<|User|>", "<|Assistant|>"]
    ),
    "phi3": dict(
        template=ENDS, pad="<eos>", unk="<unk>", special=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    ),
    "command": dict(
        template=COMMANDS,
        bos="<bos>",
        eos="<|END_OF_TURN|>",
        special=["<|START_OF_TURN|>", "<|CHATBOT|>", "<|USER|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"],
    ),
    "gptoss": dict(template=CHANNELS, eos="<|return|>", special=["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]),
    "smolvlm": dict(template=BLOCKS, bos="<bos>", special=["<end_of_utterance>", "<image>"]),
    "gpt2": dict(bos="<eos>", unk="<eos>"),
}
ENDS_OF_TURNS = {
    "chatml": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama2": "<eos>",
    "gemma": "<end_of_turn>",
    "r1": "<eos>",
    "phi3": "<|end|>",
    "smolvlm": "<end_of_utterance>",
}


def make_family(name: str, *tags: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a family; `tags` are added as special tokens, as users do. Id 0 is an ordinary "!"."""
    options = {
        "template": None,
        "eos": "<eos>",
        "bos": None,
        "pad": None,
        "unk": None,
        "special": [],
        "plain": [],
        **FAMILIES[name],
    }
    named = list(dict.fromkeys(t for t in (options["eos"], options["bos"], options["pad"], options["unk"]) if t))
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *named, *options["special"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=options["eos"],
        bos_token=options["bos"],
        pad_token=options["pad"],
        unk_token=options["unk"],
        additional_special_tokens=[*options["special"], *tags],
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in options["plain"]])
    if options["bos"] == "<bos>":
        pair = ("<bos>", tokenizer.bos_token_id)
        backend = tokenizer.backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[pair])
    tokenizer.chat_template = options["template"]
    return tokenizer
