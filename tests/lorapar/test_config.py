"""Configuration: every mistake is named with file, line and the nearest known key."""

import dataclasses
import re

import pytest
import torch
from conftest import ARITHMETIC, REPO
from trl import GRPOConfig, SFTConfig

from lorapar.config import Teacher, load, parse_override
from lorapar.defaults import PRESETS, RL_DEFAULTS, SFT_DEFAULTS
from lorapar.errors import UserError
from lorapar.models import lora_config
from lorapar.stages import training_arguments
from lorapar.teachers import check_teacher

GOOD = "model: m\ndata: {train: t.jsonl}\n"


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: m\npartition: {theta: 1.5}\n" + GOOD[9:],
            r"c.yaml:2: partition.theta must lie in",
        ),
        (
            GOOD + "partition:\n  tehta: 0.5\n",
            r"c.yaml:4: unknown key 'tehta' .* did you mean 'theta'",
        ),
        (GOOD + "sedd: 1\n", r"c.yaml:3: unknown key 'sedd' .* did you mean 'seed'"),
        (GOOD + "init: papr\n", r"c.yaml:3: init 'papr' is unknown; did you mean 'paper'"),
        (GOOD + "score: {variant: tayler2}\n", r"score.variant 'tayler2' .* 'taylor2'"),
        (GOOD + "seed: many\n", r"c.yaml:3: seed must be int, found 'many'"),
        (GOOD + "score: 5\n", r"c.yaml:3: score must be a mapping, found 5"),
        (GOOD + "labels: {teachers: []}\n", r"teachers is empty"),
        (GOOD + "labels: {teachers: [rule:a, rule:a]}\n", r"teachers share the name 'rule:a'"),
        (GOOD + "labels: {ties: system3}\n", r"labels.ties 'system3' is unknown"),
        (GOOD + "score: {batch_size: 0}\n", r"score.batch_size must be at least 1"),
        (GOOD + "score: {packed: 1}\n", r"c.yaml:3: packed must be bool, found 1"),
        (GOOD + "score: {pack: true}\n", r"unknown key 'pack' in score; did you mean 'packed'"),
        (GOOD + "adapter: {init_lora_weights: pissa}\n", r"is set by the key init"),
        (GOOD + "partition: {drop_unselected: true}\n", r"needs granularity: column"),
        (GOOD + "preset: relesed\n", r"c.yaml:3: preset 'relesed' is unknown; expected one of"),
        ("data: {train: x}\n", r"c.yaml:1: the configuration needs model"),
        ("model: [unclosed\n", r"c.yaml:2: not valid YAML"),
        ("just text\n", r"c.yaml: expected a mapping of keys, found str"),
    ],
)
def test_mistakes(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, text))


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="no such file; expected a YAML configuration or a run"):
        load(tmp_path / "nothing.yaml")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "c.yaml")


@pytest.mark.parametrize(("stage", "known"), [("sft", "max_length"), ("rl", "num_generations")])
def test_unknown_trl_keys(stage, known, tmp_path):
    config = load(write(tmp_path, GOOD + f"{stage}: {{{known}s: 3}}\n"))
    with pytest.raises(UserError, match=f"{stage}: unknown key '{known}s'; did you mean '{known}'"):
        training_arguments(config, stage)
    config = load(write(tmp_path, GOOD + f"{stage}: {{output_dir: x}}\n"))
    with pytest.raises(UserError, match=f"{stage}.output_dir is set by the run"):
        training_arguments(config, stage)


def test_unknown_peft_keys(tmp_path):
    config = load(write(tmp_path, GOOD + "adapter: {lora_alfa: 3}\n"))
    with pytest.raises(
        UserError, match="adapter: unknown key 'lora_alfa'; did you mean 'lora_alpha'"
    ):
        lora_config(config)


def test_a_value_that_trl_refuses_is_a_message(tmp_path):
    config = load(write(tmp_path, GOOD + "rl: {num_generations: 7}\n"))
    with pytest.raises(UserError, match="rl: GRPOConfig refuses it"):
        training_arguments(config, "rl")(tmp_path)


def test_defaults_reach_peft_and_trl(tmp_path):
    config = load(write(tmp_path, GOOD))
    lora = lora_config(config)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 64, 0.05)
    assert "o_proj" not in lora.target_modules and len(lora.target_modules) == 6
    for stage, cls, defaults in (("sft", SFTConfig, SFT_DEFAULTS), ("rl", GRPOConfig, RL_DEFAULTS)):
        args = training_arguments(config, stage)(tmp_path)
        assert isinstance(args, cls) and args.seed == config.seed == 41
        for key, value in defaults.items():
            if key != "max_prompt_length":
                assert getattr(args, key) == value, key
        assert args.bf16 == torch.cuda.is_available()


def test_how_scoring_runs(tmp_path):
    assert not load(write(tmp_path, GOOD)).score.packed
    text = GOOD + "score: {packed: true, gradient_checkpointing: true, batch_size: 1}\n"
    score = load(write(tmp_path, text)).score
    assert score.packed and score.gradient_checkpointing and score.batch_size == 1


def test_users_settings_pass_through(tmp_path):
    text = GOOD + "sft: {learning_rate: 1e-3, packing: false}\nadapter: {r: 4, use_rslora: true}\n"
    config = load(write(tmp_path, text))
    assert training_arguments(config, "sft")(tmp_path).learning_rate == 1e-3
    assert lora_config(config).use_rslora and lora_config(config).r == 4


def test_round_trip_and_run_folder(tmp_path):
    config = load(ARITHMETIC / "config.yaml", {"sft.max_steps": 7, "seed": 3})
    assert config.sft["max_steps"] == 7 and config.seed == 3
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load(tmp_path) == config
    (tmp_path / "stages.json").write_text("{}")
    again = load(tmp_path)  # a run folder stands for its config.yaml, wherever it was moved to
    assert again == dataclasses.replace(config, run_dir=str(tmp_path))


def test_paths_are_relative_to_the_file():
    config = load(ARITHMETIC / "config.yaml")
    assert config.data.train == str((ARITHMETIC / "train.jsonl").resolve())
    assert config.model == str((ARITHMETIC / "base").resolve())


def test_masks_off_and_overrides(tmp_path):
    assert load(write(tmp_path, GOOD + "partition: null\n")).partition is None
    assert parse_override("sft.max_steps=10") == ("sft.max_steps", 10)
    with pytest.raises(UserError, match="expected key=value"):
        parse_override("sft.max_steps")


def test_the_released_preset(tmp_path):
    config = load(write(tmp_path, GOOD + "preset: released\nrl: {beta: 0.1}\n"))
    assert config.data.select == "all" and config.adapter["lora_dropout"] == 0.0
    assert all(name.startswith("released_") for name in config.rewards)
    assert config.rl == {"max_prompt_length": 128, "beta": 0.1}  # the user's own keys stay
    assert config.eval.scorer == "released_answer_tag"
    assert set(PRESETS) == {"released"}


def test_a_template_of_ones_own(tmp_path):
    text = GOOD + "template: {prompt: '{question} =', completion: '{answer}'}\n"
    config = load(write(tmp_path, text))
    assert config.template == {"prompt": "{question} =", "completion": "{answer}"}
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml())
    assert load(path) == config
    with pytest.raises(UserError, match="template must be str or dict, found 5"):
        load(write(tmp_path, GOOD + "template: 5\n"))


def test_presets_and_overrides_meet_data_given_as_a_string(tmp_path):
    path = write(tmp_path, "model: m\ndata: rows.jsonl\npreset: released\n")
    config = load(path, {"data.test": "test.jsonl"})
    assert config.data.select == "all"
    assert (config.data.train, config.data.test) == ("rows.jsonl", "test.jsonl")


def test_overridden_paths_are_relative_to_the_current_folder(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    for folder in (tmp_path, here):
        (folder / "t.jsonl").write_text("{}")
    monkeypatch.chdir(here)
    path = write(tmp_path, GOOD)
    assert load(path).data.train == str(tmp_path / "t.jsonl")
    assert load(path, {"data.train": "t.jsonl"}).data.train == str(here / "t.jsonl")


def test_overrides_that_are_no_yaml():
    with pytest.raises(UserError, match=r"--set a=\[1: '\[1' is not valid YAML"):
        parse_override("a=[1")


def test_reward_weights_of_the_user_win(tmp_path):
    config = load(write(tmp_path, GOOD + "rl: {reward_weights: [3.0, 2.0, 1.0]}\n"))
    assert training_arguments(config, "rl")(tmp_path).reward_weights == [3.0, 2.0, 1.0]


def test_a_prompt_given_on_the_command_line_is_found_from_there(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").write_text("{question}{answer}")
    monkeypatch.chdir(tmp_path / "here")
    config = load(write(tmp_path, GOOD), {"labels.prompt": "mine.txt"})
    assert config.labels.prompt == str(tmp_path / "here" / "mine.txt")
    (tmp_path / "here" / "plain").mkdir()
    assert load(write(tmp_path, GOOD), {"labels.prompt": "plain"}).labels.prompt == "plain"


def test_the_configuration_in_the_guide_to_labelling_can_be_loaded(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", (REPO / "docs/labelling.md").read_text(), re.S)
    (tmp_path / "config.yaml").write_text(block)
    config = load(tmp_path / "config.yaml")
    assert [t.kind for t in config.labels.teachers] == ["openai", "openai", "transformers"]
    for teacher in config.labels.teachers:
        check_teacher(teacher)


def test_the_guide_to_labelling_has_the_defaults():
    text = (REPO / "docs/labelling.md").read_text()
    for key in ("kind", "weight", "concurrency", "timeout", "retries", "structured"):
        default = str(getattr(Teacher("x"), key)).removesuffix(".0").lower().strip("'")
        assert re.search(rf"^\| `{key}` \| `?{default}`? \|", text, re.M), key
