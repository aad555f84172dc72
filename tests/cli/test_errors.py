"""Mistakes on the command line: one sentence, a non-zero exit code, and no traceback."""

import re
import traceback
from pathlib import Path

import pytest

from commands import fit
from lit_rlhf.cli import main
from lit_rlhf.cli.config_files import expand_configs
from lit_rlhf.cli.errors import UsageError, nearest_option
from lit_rlhf.errors import InputError, input_error

REJECTED = {
    "a misspelt method": (["--model=RLO"], r"--model 'RLO' is not one of .*, PPO, .*: did you mean RLOO\?"),
    "a method without its module": (["--model=Mine"], r"a class of yours needs its module: mine\.Name"),
    "a class that does not exist": (["--model=mine.Falty"], r"the module 'mine' has no 'Falty': did you mean Faulty\?"),
    "a module that does not exist": (["--model=mini.ByLength"], "--model 'mini.ByLength': there is no module 'mini'"),
    "a method without a loss": (["--model=mine.NoLoss"], "--model 'mine.NoLoss' must define loss"),
    "a base": (["--model=OfflineAlgorithm"], "'OfflineAlgorithm' must define held_out_metrics and training_step"),
    "another class": (["--model=lit_rlhf.PromptData"], r"--model 'lit_rlhf\.PromptData': it is not of type Algorithm"),
    "a misspelt option": (["--model.num_sample=4"], r"RLOO has no such option: did you mean --model\.num_samples\?"),
    "an option of another method": (
        ["--model.gae_lambda=1"],
        "--model.gae_lambda: RLOO has no such option: it is one of PPO",
    ),
    "an option of the optimizer": (["--model.lr=1"], r"did you mean --model\.optimizer\.lr\?"),
    "a misspelt option of the optimizer": (
        ["--model.optimizer.lrr=1"],
        r"AdamW .* did you mean .*optimizer\.lr\?",
    ),
    "an option outside its group": (
        ["--model.max_new_tokens=4"],
        r"did you mean --model\.sampling\.max_new_tokens\?",
    ),
    "an unknown option of sampling": (["--model.sampling.temprature=2"], r"did you mean .*sampling\.temperature\?"),
    "an option without its group": (["--num_samples=4"], r"did you mean --model\.num_samples\?"),
    "a misspelt group": (["--trainr.max_steps=4"], r"did you mean --trainer\.max_steps\?"),
    "a misspelt option in a configuration": (
        ['--config={"model": {"init_args": {"num_sampels": 4}}}'],
        r"--model\.num_sampels: RLOO has no such option: did you mean --model\.num_samples\?",
    ),
    "an unknown option of the Trainer in a configuration": (
        ['--config={"trainer": {"max_stps": 4}}'],
        r"--trainer\.max_stps: did you mean --trainer\.max_steps\?",
    ),
    "a misspelt reward": (["--model.rewards=[mine.wordz]"], r"the module 'mine' has no 'wordz': did you mean words\?"),
    "a reward without its module": (["--model.rewards+=words"], r"--model\.rewards 'words' is not an import path"),
    "an option of a reward function": (
        ["--model.rewards=[{class_path: mine.words, init_args: {scale: 1}}]"],
        "--model.rewards.scale: words has no such option",
    ),
    "a misspelt callback": (["--trainer.callbacks+=lit_rlhf.callbacks.GradientNois"], r"did you mean GradientNoise\?"),
    "a number that is none": (["--model.kl_coef=abc"], "--model.kl_coef 'abc': expected float$"),
    "a value of several types": (["--trainer.limit_val_batches=abc"], "'abc': expected int or float$"),
    "an unknown choice": (["--data.truncation=cut"], "--data.truncation 'cut': expected 'drop', 'truncate'$"),
    "a file in place of a class": (["--data=prompts.jsonl"], r"--data takes a class: did you mean --data\.train\?"),
    "a name of TRL": (["--model.learning_rate=1"], r"RLOO has no such option: did you mean --model\.optimizer\.lr\?"),
    "a name of TRL without a group": (["--num_generations=1"], r"did you mean --model\.num_samples\?"),
    "a reward in place of a list": (
        ["--model.rewards=mine.words"],
        r"expected list: to add one, use --model\.rewards\+=",
    ),
    "a lambda": (["--model.rewards+=lambda completions, **rest: [1.0]"], "takes no lambda: write a function in a file"),
    "a file of rewards": (["--model.rewards+=mine.py"], "'mine.py' is a file: give a name in it, such as mine.reward"),
    "a reward without its file": (["--model.rewards+=politeness"], "give its module too, such as mine.reward"),
    "the beginning of a logger's name": (["--trainer.logger=wandb"], r"did you mean .*loggers\.WandbLogger\?"),
    "a list with a logger that needs a folder": (
        ["--trainer.logger=[lightning.pytorch.loggers.CSVLogger]"],
        "^lit-rlhf: CSVLogger needs --trainer.logger.save_dir$",
    ),
    "a configuration without --config": (["rloo"], r"unexpected argument 'rloo': did you mean --config rloo\?"),
    "an argument without an option": (["4"], "unexpected argument '4': options start with --"),
    "a missing value": (["--config"], "--config needs a value"),
}
"""Arguments that the parser rejects, and the sentence."""


@pytest.mark.parametrize("case", REJECTED)
def test_rejected_arguments_get_one_sentence_and_a_tip(case, workspace, capsys):
    args, sentence = REJECTED[case]
    with pytest.raises(SystemExit) as stopped:
        fit(*args)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 2
    assert lines[0].startswith("lit-rlhf: ")
    assert re.search(sentence, lines[0])
    assert lines[1].startswith("`lit-rlhf fit --")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["compare", "--config", "quickstart"], "--config 'quickstart' is for fit, validate, test and predict"),
        (["compare", "--config", "paper/testbed", "--sedes=[1]"], "did you mean --seeds?"),
        (
            ["compare", "--config", "paper/testbed", "--seeds=1"],
            "expected Sequence: put it in brackets, such as [1, 2]",
        ),
        (["compare", "--config", "paper/testbed", "--arms={a: {fitt: []}}"], "did you mean --arms.fit?"),
        (["export", "--ckpt_path", "last.ckpt", "--output", "here"], "--output"),
        (["export", "--ckpt", "last.ckpt", "--out", "here"], "there is no option --ckpt: did you mean --ckpt_path?"),
        (["export", "--out", "here"], "--ckpt_path is required"),
        (["memory", "--config", "quickstart", "--device_mem", "3"], "`lit-rlhf memory --help` lists the options"),
        (["fitt"], "there is no command 'fitt': did you mean fit?"),
        (["fit"], "--data and --model are required: give a configuration, such as --config rloo, or --model METHOD"),
        (["fit", "--model.policy=tiny"], "--model is missing: give a configuration, such as --config rloo"),
        (["fit", "--model=RLOO", "--data.train=prompts.jsonl"], "--data is missing: give a configuration, such as"),
        (["compare"], "--arms, --fit_args and --test_args are required: give a comparison, such as --config paper/tes"),
        (
            ["fit", "--config", "quikstart"],
            "'quikstart' is neither a file nor a shipped configuration: did you mean quickstart?",
        ),
        (["--config", "rloo", "fit"], "the command comes first: lit-rlhf fit --config ..."),
    ],
    ids=str,
)
def test_every_command_explains_rejected_arguments(args, sentence, workspace, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


CONFIGURATIONS = {
    "an empty file": ("", "is empty, and not options by name"),
    "only comments": ("# trainer: {max_steps: 1}\n", "is empty, and not options by name"),
    "a list": ("- a\n", "is a list, and not options by name"),
    "a text": ("max_steps 1\n", "is text, and not options by name"),
    "two documents": ("a: 1\n---\nb: 2\n", "is 2 YAML documents, and not options by name"),
    "a tab": ("trainer:\n\tmax_steps: 1\n", "is not valid YAML: found character .* in line 2"),
    "a comparison": ("arms: {}\n", "is for `lit-rlhf compare`"),
    "brackets that are open": ("model: [a, {b\n", "is not valid YAML: .* in line 2"),
    "a key given twice": ("trainer: {max_steps: 1}\n\ntrainer: {}\n", "'trainer' is given twice in line 3"),
    "a nested key given twice": ("trainer:\n  max_steps: 1\n  max_steps: 2\n", "'max_steps' is given twice in line 3"),
    "an alias inside its anchor": ("trainer: &all\n  logger: *all\n", "trainer.logger contains itself: remove the al"),
    "an alias without an anchor": ("trainer: *all\n", "found undefined alias 'all' in line 1"),
    "a day that does not exist": ("trainer: {max_steps: 2020-13-41}\n", "is not valid YAML: month must be in"),
    "a number as a name": ("trainer: {3: 4}\n", "3 is not the name of an option"),
    "no name": ("~: 4\n", "None is not the name of an option"),
    "a group that is a number": ("trainer: 3\n", "trainer is 3, and not options by name"),
    "an option beside class_path": ("model: {class_path: RLOO, num_samples: 2}\n", "put it under init_args"),
    "a Python object": ("model: !!python/name:os.system\n", "could not determine a constructor for the tag"),
    "Latin-1": ("# für\n".encode("latin-1"), r"is not a text file in UTF-8 \(byte 3\)"),
    "a folder": (None, "is a folder: give a file in it"),
}
"""Configurations that can't be used, and the sentence."""


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_configuration_that_cannot_be_used_gets_one_sentence(case, workspace, capsys):
    content, sentence = CONFIGURATIONS[case]
    if content is None:
        Path("mine.yaml").mkdir()
    else:
        Path("mine.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as stopped:
        fit("--config=mine.yaml")
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1
    assert re.search(f"--config 'mine.yaml'.*{sentence}", lines[0])


def test_anchors_and_merge_keys_of_yaml_work(workspace, capsys):
    Path("mine.yaml").write_text("trainer: {<<: {max_steps: 31, max_epochs: 4}, max_epochs: 3}\n")
    with pytest.raises(SystemExit) as stopped:
        fit("--config=mine.yaml", "--print_config")
    assert stopped.value.code == 0
    assert {"  max_steps: 31", "  max_epochs: 3"} <= set(capsys.readouterr().out.splitlines())


INVALID = {
    "one sample": (["--model.num_samples=1"], "num_samples=1 must be at least 2"),
    "no rewards": (["--model.rewards=[]"], "rewards is empty"),
    "a policy that does not exist": (["--model.policy=./nowhere"], "there is no such folder"),
    "a file that does not exist": (["--data.train=nothing.jsonl"], "nothing.jsonl"),
    "more minibatches than prompts": (
        ["--model.updates.num_minibatches=8"],
        "minibatches=8 is more than the 4 prompts",
    ),
    "an accumulation that does not fit": (
        ["--model.updates.num_minibatches=4", "--trainer.accumulate_grad_batches=3"],
        "accumulate_grad_batches=3 does not fit a rollout of 4 minibatches",
    ),
    "an accumulation over several epochs": (
        [
            "--model=PPO",
            "--model.num_samples=1",
            "--model.updates.update_epochs=2",
            "--trainer.accumulate_grad_batches=2",
        ],
        "accumulate_grad_batches=2 does not fit a rollout of 1 minibatches",
    ),
    "overfit_batches": (["--trainer.overfit_batches=1"], "overfit_batches"),
    "a policy that is not on the hub": (
        ["--model.policy=nowhere"],
        "'nowhere' can't be loaded: there is no such folder",
    ),
    "a quantization without an adapter": (
        ["--model.load.quantization_config={load_in_4bit: true}", "--model.lora=null"],
        "the policy's weights are quantized, so they can't be trained: give `lora`",
    ),
    "a layer for LoRA that does not exist": (
        ["--model.lora.target_modules=[query]"],
        "target_modules can be",
    ),
    "a schedule that follows a metric": (
        ["--model.lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau"],
        "lr_scheduler=ReduceLROnPlateau follows a metric",
    ),
    "an unknown option of LoRA": (["--model.lora.rank=4"], "rank"),
    "a column that does not exist": (["--data.prompt_column=question"], "question"),
    "an opponent that is not a column": (["--model.evaluation.compare_to=gpt"], "compare_to='gpt' is not a column"),
    "a device that does not exist": (["--trainer.accelerator=warp"], "--trainer.accelerator warp: You selected an inv"),
    "an option without a value": (["--model.num_samples=null"], "--model.num_samples=null: this option needs a value"),
    "a package that is not installed": (["--trainer.logger=WandbLogger"], "not met. HINT"),
    "a seed out of range": (["--seed_everything=-1"], "--seed_everything -1: -1 is not in bounds"),
    "a duration": (["--trainer.max_time=soon"], "--trainer.max_time soon: `Timer(duration='soon')` is not a valid dur"),
    "a negative learning rate": (["--model.optimizer.lr=-1"], "Invalid learning rate: -1"),
    "the data of another method": (["--model=DPO"], "DPO learns from Preferences and PromptData yields Prompts"),
    "too few prompts": (["--data.batch_size=64"], "64"),
    "a learning rate below the precision": (
        ["--model.load.dtype=bfloat16", "--model.lora=null", "--model.optimizer.lr=1e-7"],
        "too small to change",
    ),
}
"""Arguments that a run rejects before its first step, and the sentence."""


@pytest.mark.parametrize("case", INVALID)
def test_invalid_input_gets_a_sentence(case, workspace, capsys):
    args, sentence = INVALID[case]
    with pytest.raises(SystemExit) as stopped:
        fit(*args)
    assert stopped.value.code == 1 and sentence in capsys.readouterr().err
    assert not Path("here/policy").exists()


def test_a_failing_reward_keeps_its_traceback(workspace):
    (workspace / "broken.py").write_text("def broken(completions, **kwargs):\n    return completions[0] / 2\n")
    with pytest.raises(RuntimeError, match="the reward 'broken' raised TypeError") as caught:
        fit("--model.rewards+=broken.broken")
    assert 'broken.py", line 2, in broken' in "".join(traceback.format_exception(caught.value))


def test_a_reward_with_invalid_output_gets_a_sentence_also_if_guarded(workspace, capsys):
    (workspace / "short.py").write_text("def short(completions, **kwargs):\n    return [1.0]\n")
    guarded = "{class_path: lit_rlhf.rewards.Guarded, init_args: {reward: short.short, retries: 0}}"
    with pytest.raises(SystemExit):
        fit(f"--model.rewards=[{guarded}]")
    assert "lit-rlhf: the reward 'short' returned 1 values" in capsys.readouterr().err


def test_a_file_named_like_a_value_is_not_read(workspace):
    (workspace / "1").write_bytes(b"\xff")
    assert expand_configs(["fit", "--seed_everything", "1"]) == ["fit", "--seed_everything", "1"]
    with pytest.raises(UsageError, match="is neither a file nor a shipped configuration"):
        expand_configs(["fit", "--config", "a" * 300])


def test_an_error_in_a_users_method_keeps_its_traceback(workspace):
    with pytest.raises(ValueError, match=r"(too many|not enough) values to unpack"):
        fit("--model=mine.Faulty")


def test_an_error_in_a_users_constructor_keeps_its_traceback(workspace):
    (workspace / "own.py").write_text(
        "class Own:\n    def __init__(self):\n        {}['a']\n\n    def __call__(self, **kwargs):\n        pass\n"
    )
    with pytest.raises(KeyError, match=r"^'a'$") as caught:
        fit("--model.rewards+={class_path: own.Own}")
    assert caught.value.__suppress_context__ and caught.traceback[-1].path.name == "own.py"


@pytest.mark.parametrize("option", ["--model=", "--model.rewards+="])
def test_an_error_in_a_users_module_keeps_its_traceback(option, workspace):
    (workspace / "failing.py").write_text("import a_package_that_is_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        fit(f"{option}failing.Name")


def test_an_input_error_is_found_among_the_causes():
    wrapped = ValueError("wrapped")
    wrapped.__cause__ = cause = InputError("what is wrong")
    assert input_error(cause) is cause and input_error(wrapped) is cause
    assert input_error(ValueError("from elsewhere")) is None


def test_a_cycle_of_exceptions_ends():
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert input_error(first) is None


def test_the_nearest_option_has_the_same_last_part():
    known = ["max_steps", "sampling.max_new_tokens", "sampling.temperature", "data.max_prompt_tokens"]
    assert nearest_option("max_new_tokens", known, 0.6) == "sampling.max_new_tokens"
    assert nearest_option("sampling.temprature", known, 0.6) == "sampling.temperature"
    assert nearest_option("colour", known, 0.6) == ""
