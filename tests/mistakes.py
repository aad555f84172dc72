"""Seeded command lines and configurations with mistakes that people make."""

import random
from dataclasses import dataclass, field

NUMBERS = """
model.num_samples model.kl_coef model.sampling.max_new_tokens model.sampling.temperature model.sampling.top_p
model.updates.num_minibatches model.updates.update_epochs model.shaping.missing_eos_penalty model.evaluation.best_of
model.optimizer.weight_decay model.lr_scheduler.warmup data.batch_size data.max_prompt_tokens data.eval_batch_size
trainer.max_steps trainer.max_epochs trainer.accumulate_grad_batches trainer.gradient_clip_val trainer.num_nodes
trainer.log_every_n_steps trainer.limit_val_batches trainer.val_check_interval trainer.overfit_batches
trainer.check_val_every_n_epoch samples.every_n_rollouts curves.every_n_seconds kl_monitor.target seed_everything
""".split()
SWITCHES = "model.sampling.greedy model.shaping.normalize data.drop_duplicates trainer.detect_anomaly".split()
CHOICES = "data.split data.truncation trainer.precision model.kl_penalty trainer.gradient_clip_algorithm".split()
CLASSES = """
model data model.optimizer model.lr_scheduler model.rewards+ trainer.callbacks+ trainer.logger trainer.strategy
trainer.profiler trainer.plugins data.transform model.evaluation.judge trainer.accelerator
""".split()
GROUPS = (
    "model.sampling model.updates model.shaping model.evaluation model.lora model.load trainer samples curves".split()
)
TEXTS = "model.policy data.train data.val data.prompt_column trainer.default_root_dir ckpt_path".split()
EVERY = [*NUMBERS, *SWITCHES, *CHOICES, *CLASSES, *GROUPS, *TEXTS]
OTHER_METHODS = ["gae_lambda", "beta", "clip_range", "baseline", "critic", "label_smoothing", "importance_ratio"]

NO_NUMBERS = [
    "abc",
    "1,5",
    "[1",
    "{a: 1}",
    "[]",
    "0x",
    "--",
    "true",
    "1.2.3",
    "1e",
    "ten",
    "\u0661\u0662",
    "1_0",
    "'",
    '"',
    "",
]
NO_CLASSES = [
    "RLO",
    "rloo",
    "5",
    "[]",
    "{}",
    "null",
    "mine",
    "mine.nothing",
    "mini.ByLength",
    "mine.words",
    "os.path",
    "{class_path: }",
    "{class_path: torch.nn.Linear}",
    "{class: RLOO}",
    "[{}]",
    "lit_rlhf.RLO",
    "lit_rlhf.PromptData",
    ".",
    "a..b",
    "1.5",
    "torch.optim.Adan",
    "lightning.pytorch.callbacks.EarlyStopping",
    "{class_path: mine.words, init_args: {a: 1}}",
    "{class_path: lit_rlhf.Weighted}",
    "prompts.jsonl",
    "tiny",
    "\u00e9",
    "a b",
    "mine:words",
]
NO_GROUPS = [
    "3",
    "x",
    "[]",
    "[1, 2]",
    "{: }",
    "{a: {b: ",
    "{maximum: 3}",
    "true",
    "prompts.jsonl",
    "tiny",
    "nothing.yaml",
    "",
]
OUT_OF_RANGE = ["-1", "-5", "0", "-0.5", "1e9", "99999999999", "1e400", "-.inf", ".nan", "1.5", "null"]
NO_CONFIGS = [
    "",
    "# nothing\n",
    "- a\n- b\n",
    "only words",
    "3",
    "null",
    "model:\n\tnum_samples: 2\n",
    "a: [1\n",
    "a: {b\n",
    "a: 'b\n",
    "trainer: {max_steps: 1}\ntrainer: {max_epochs: 1}\n",
    "trainer: {max_steps: 1, max_steps: 2}\n",
    "trainer: *none\n",
    "trainer: &a {b: *a}\n",
    "trainer: {<<: 3}\n",
    "a: 1\n---\nb: 2\n",
    "1: 2\n",
    "null: 2\n",
    "trainer: {3: 4}\n",
    "trainer: 3\n",
    "trainer: [max_steps, 2]\n",
    "trainer: {max_stps: 2}\n",
    "trainr: {max_steps: 2}\n",
    "model: []\n",
    "model: 3\n",
    "model: {class: RLOO}\n",
    "model: {class_path: RLO}\n",
    "model: {class_path: RLOO, num_samples: 2}\n",
    "model: {class_path: RLOO, init_arg: {num_samples: 2}}\n",
    "model: {init_args: {num_sampels: 2}}\n",
    "model: {init_args: [num_samples]}\n",
    "model: {init_args: {rewards: mine.words}}\n",
    "model: {init_args: {rewards: [{class_path: mine.wordz}]}}\n",
    "model: {init_args: {optimizer: Adamm}}\n",
    "model: {init_args: {optimizer: {class_path: torch.optim.Adam, init_args: {lrr: 1}}}}\n",
    "model: {init_args: {sampling: {max_tokens: 2}}}\n",
    "data: prompts.jsonl\n",
    "data: {init_args: {batchsize: 2}}\n",
    "data: {class_path: PromptDate}\n",
    "fit: {trainer: {max_steps: 2}}\n",
    "arms: {}\n",
    "config: other.yaml\n",
    "trainer: {max_steps: 2020-01-01}\n",
    "trainer: {max_steps: 2020-13-41}\n",
    "model: !!python/object/apply:os.getcwd []\n",
    "trainer: {callbacks: [EarlyStoping]}\n",
    "trainer: {callbacks: {class_path: EarlyStopping}}\n",
    "trainer: {logger: {class_path: None}}\n",
    "\ufeff\x00",
    '{"trainer": {"max_steps": 1}',
    "seed_everything: [1]\n",
    "trainer:\n  max_steps: 3\n max_epochs: 2\n",
    "? [a, b]\n: c\n",
    "%YAML 9.9\n---\na: 1\n",
    "trainer: !!int x\n",
]


@dataclass
class Line:
    """A command line with a mistake.

    Attributes:
        args: The arguments.
        expected: What the message must contain.
        files: Files to write first; bytes, or None for a folder.
    """

    args: list[str]
    expected: str = ""
    files: dict[str, bytes | None] = field(default_factory=dict)


def misspelt(word: str, rng: random.Random) -> str:
    """Return a word with one letter missing, doubled, swapped or replaced."""
    i = rng.randrange(1, len(word) - 1)
    edits = [
        word[:i] + word[i + 1 :],
        word[:i] + word[i] + word[i:],
        word[: i - 1] + word[i] + word[i - 1] + word[i + 1 :],
        word[:i] + rng.choice("aeiotrsn") + word[i + 1 :],
        word[:-1],
    ]
    return rng.choice([edit for edit in edits if edit != word])


def misspelt_option(rng: random.Random) -> Line:
    option = rng.choice([name for name in [*NUMBERS, *SWITCHES, *CHOICES] if "." in name])
    path, _, last = option.rpartition(".")
    wrong = misspelt(last, rng)
    return Line([f"--{path}.{wrong}=1"], f"--{path}.{last}")


def misspelt_group(rng: random.Random) -> Line:
    option = rng.choice([name for name in NUMBERS if "." in name])
    group, _, rest = option.partition(".")
    return Line([f"--{misspelt(group, rng)}.{rest}=1"], f"--{option}")


def wrong_type(rng: random.Random) -> Line:
    option = rng.choice([*NUMBERS, *SWITCHES, *CHOICES])
    return Line([f"--{option}={rng.choice(NO_NUMBERS)}"])


def out_of_range(rng: random.Random) -> Line:
    return Line([f"--{rng.choice(NUMBERS)}={rng.choice(OUT_OF_RANGE)}"])


def wrong_class(rng: random.Random) -> Line:
    return Line([f"--{rng.choice(CLASSES)}={rng.choice(NO_CLASSES)}"])


def wrong_group(rng: random.Random) -> Line:
    return Line([f"--{rng.choice(GROUPS)}={rng.choice(NO_GROUPS)}"])


def option_of_another_method(rng: random.Random) -> Line:
    return Line([f"--model.{rng.choice(OTHER_METHODS)}=1"])


def missing_value(rng: random.Random) -> Line:
    option = f"--{rng.choice([*NUMBERS, *TEXTS, *GROUPS])}"
    return Line([option, *rng.choice([[], ["--trainer.max_steps=2"]])], option)


def stray_words(rng: random.Random) -> Line:
    words = [
        "extra",
        "-x",
        "--",
        "---a",
        "--.=1",
        "--=1",
        "--model.=1",
        "--model..policy=3",
        "4",
        "fit",
        "",
        "-c",
        "--config",
        "--help=a",
    ]
    return Line(rng.sample(words, rng.choice([1, 1, 2])))


def doubled(rng: random.Random) -> Line:
    option = rng.choice(EVERY)
    return Line(
        [f"--{option}={rng.choice(NO_NUMBERS + NO_CLASSES)}", f"--{option}={rng.choice(NO_NUMBERS + NO_CLASSES)}"]
    )


def wrong_config(rng: random.Random) -> Line:
    content = rng.choice(NO_CONFIGS).encode()
    name = rng.choice(["made.yaml", "made.yaml", "made.json", "made.txt", "made"])
    flag = rng.choice(["--config=", "--config=", "--config=", "--model=", "--trainer=", "--data="])
    return Line([f"{flag}{name}"], files={name: content})


def wrong_config_file(rng: random.Random) -> Line:
    content = rng.choice([b"trainer: {max_steps: \xff}", bytes(range(256)), b"\x1f\x8b\x08", None])
    return Line(["--config=odd.yaml"], files={"odd.yaml": content})


def broken_config(rng: random.Random) -> Line:
    """A configuration that is right, but for one character."""
    text = "model:\n  class_path: RLOO\n  init_args:\n    num_samples: 2\n    lora: {r: 2}\ntrainer:\n  max_steps: 1\n"
    i = rng.randrange(len(text))
    content = rng.choice(
        [text[:i] + text[i + 1 :], text[:i] + rng.choice(":{}[]'\"&*!|>%@`#\t-?,") + text[i:], text[:i]]
    )
    return Line(["--config=made.yaml"], files={"made.yaml": content.encode()})


def wrong_inline_config(rng: random.Random) -> Line:
    content = rng.choice(["{", "[", "{a", "[1, 2]", "{}", "{trainer: 3}", "{trainer: {max_stps: 1}}", "{1: 2}"])
    return Line([f"--config={content}"])


MAKERS = [
    misspelt_option,
    misspelt_option,
    misspelt_group,
    wrong_type,
    wrong_type,
    out_of_range,
    wrong_class,
    wrong_class,
    wrong_group,
    option_of_another_method,
    missing_value,
    stray_words,
    doubled,
    wrong_config,
    wrong_config,
    wrong_config_file,
    broken_config,
    wrong_inline_config,
]


def lines(seed: int, count: int) -> list[Line]:
    """Return command lines, of each kind in turn."""
    rng = random.Random(seed)
    return [MAKERS[i % len(MAKERS)](rng) for i in range(count)]
